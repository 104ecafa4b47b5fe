import os
from pathlib import Path

import pytest

from pipeline.metrics.java import UnavailableError, java_version, run_java
from tests.java_programs import install_as_java


@pytest.mark.parametrize(
    ("output", "expected"),
    [('openjdk version "17.0.15" 2025-04-15', 17), ('java version "1.8.0_392"', 8), ('openjdk version "9-ea"', 9)],
)
def test_java_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str, expected: int) -> None:
    install_as_java(monkeypatch, tmp_path, f"echo '{output}' >&2")
    assert java_version() == expected


def test_java_without_a_version_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, "echo hello >&2")
    with pytest.raises(UnavailableError, match="hello"):
        java_version()


def test_missing_java_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="PATH"):
        run_java("X", [], "", timeout=1)


def test_input_and_output_are_utf8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, "cat")
    assert run_java("X", [], "café\n", timeout=10) == "café\n"


@pytest.mark.parametrize(
    ("script", "message"), [("echo 'out of memory' >&2; exit 1", "out of memory"), ("exit 3", "exit status 3")]
)
def test_a_failure_gives_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str) -> None:
    install_as_java(monkeypatch, tmp_path, script)
    with pytest.raises(UnavailableError, match=f"X failed: {message}"):
        run_java("X", [], "", timeout=10)


def test_a_program_that_exits_before_it_reads_its_input_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_as_java(monkeypatch, tmp_path, "echo 'out of memory' >&2; exit 1")
    with pytest.raises(UnavailableError, match="out of memory"):
        run_java("X", [], "word " * 200_000, timeout=10)


@pytest.mark.slow
def test_a_program_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with pytest.raises(UnavailableError, match=r"X did not finish within 0\.5 s"):
        run_java("X", [], "", timeout=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
