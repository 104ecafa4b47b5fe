"""What a kill leaves of DVC's own files.

Artifacts are published whole, but DVC writes its lock files in place: killed in those milliseconds, it leaves
one empty or cut, and refuses to start from then on. What such a file knew, DVC's run cache knows too.
"""

import json
import subprocess
from pathlib import Path

from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from pipeline.artifacts import write_atomically


def repair(repository: Path) -> list[Path]:
    """Put lock files of a DVC repository that a kill has cut back to git's last commit, or remove them.

    Returns which; whole ones are left alone. What was done since that commit, the next `dvc repro` takes from
    the run cache.
    """
    locks = [repository / "dvc.lock", *sorted(repository.glob("data/*/dvc.lock"))]
    cut = [path for path in locks if path.is_file() and not _is_whole_lock(path)]
    processes = repository / ".dvc" / "tmp" / "rwlock"
    if processes.is_file() and not _is_json(processes):
        cut.append(processes)
    for path in cut:
        committed = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True)
        if committed.returncode == 0:
            write_atomically(path, committed.stdout)
        else:
            path.unlink()
    return cut


def _is_whole_lock(path: Path) -> bool:
    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe", pure=True).load(path.read_bytes()))
    except (Invalid, YAMLError):
        return False
    return True


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
