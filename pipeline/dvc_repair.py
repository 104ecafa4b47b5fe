"""Repair of DVC lock files that a crash truncated.

DVC writes its lock files in place. If it is killed meanwhile, the file is empty or truncated, and DVC refuses to start.
"""

import subprocess
from pathlib import Path
from typing import Any

from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from pipeline.artifacts import read_json, write_atomically
from pipeline.errors import UserError


def repair(repository: Path) -> list[Path]:
    """Restore the damaged lock files of a DVC repository from git's last commit; remove files that are not in git.

    The next `dvc repro` restores later entries from DVC's run cache.

    Args:
        repository: Root of the repository; no `dvc` may be running in it.

    Returns:
        The files that were restored or removed.
    """
    locks = [repository / "dvc.lock", *sorted(repository.glob("data/*/dvc.lock"))]
    damaged = [path for path in locks if path.is_file() and not _is_valid_lock(path)]
    rwlock = repository / ".dvc" / "tmp" / "rwlock"
    if rwlock.is_file() and not _is_valid_json(rwlock):
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
    # Damaged scalars, such as a date of month 13, raise errors of many kinds.
    except (Invalid, YAMLError, ValueError, ArithmeticError, LookupError, RecursionError):
        return False
    return True


def _is_valid_json(path: Path) -> bool:
    try:
        read_json(path, dict[str, Any], remedy="Remove the file.")
    except UserError:
        return False
    return True
