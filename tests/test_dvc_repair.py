"""Repair of truncated lock files. `tests/test_pipeline.py` tests it on a real run."""

from pathlib import Path

import pytest

from pipeline.dvc_repair import repair
from tests.command_line import git


def test_a_truncated_lock_file_is_restored_from_git(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    valid = "schema: '2.0'\nstages:\n  prepare:\n    cmd: 'true'\n"
    (tmp_path / "data" / "mine").mkdir(parents=True)
    for path in (lock := tmp_path / "dvc.lock", other := tmp_path / "data" / "mine" / "dvc.lock"):
        path.write_text(valid)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "locks")
    other.write_text("schema: '2.0'\nstages:\n  prep")
    lock.write_text(new := valid + "  tokenize:\n    cmd: 'true'\n")
    assert repair(tmp_path) == [other]
    assert other.read_text() == valid
    assert lock.read_text() == new


@pytest.mark.parametrize("content", ["", "schema: '2.0'\nstages: [", "[]", "date: 2024-13-45", "[" * 2000])
def test_a_damaged_lock_file_that_is_not_in_git_is_removed(tmp_path: Path, content: str) -> None:
    git(tmp_path, "init", "--quiet")
    lock = tmp_path / "dvc.lock"
    lock.write_text(content)
    assert repair(tmp_path) == [lock]
    assert not lock.exists()
    assert repair(tmp_path) == []
