"""A marker for tests that need Java, and shell scripts in place of `java`."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def needs_java(test: Callable[..., Any]) -> Any:
    """Mark a test that runs Java, and skip it if there is none."""
    skip = pytest.mark.skipif(shutil.which("java") is None, reason="java is not on the PATH")
    return pytest.mark.java(pytest.mark.slow(skip(test)))


def install_as_java(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put a shell script on the PATH as `java`."""
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
