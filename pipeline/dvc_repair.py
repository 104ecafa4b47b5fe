"""Repair of DVC lock files that a crash truncated.

DVC writes its lock files in place. Killed while it writes, it leaves an empty or truncated file and refuses to start.
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
    """Restore the damaged lock files of a DVC repository from git's last commit, or remove those not in git.

    The next `dvc repro` restores later entries from DVC's run cache.

    Args:
        repository: Root of the repository, in which no `dvc` is running.

    Returns:
        The files that were restored or removed.
    """
    locks = [repository / "dvc.lock", *sorted(repository.glob("data/*/dvc.lock"))]
    damaged = [path for path in locks if path.is_file() and not _is_valid_lock(path)]
    rwlock = repository / ".dvc" / "tmp" / "rwlock"
    if rwlock.is_file() and not _is_json(rwlock):
        damaged.append(rwlock)
    for path in damaged:
        committed = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True)
        if committed.returncode == 0:
            write_atomically(path, committed.stdout)
        else:
            path.unlink()
    return damaged


def _is_valid_lock(path: Path) -> bool:
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
