"""Java programs of others, which some scores and one tokenizer need."""

import re
import shutil
import subprocess
from collections.abc import Sequence


class UnavailableError(Exception):
    """What this machine cannot compute; the message says why and what would help."""


def find_java() -> str:
    """The path of `java`. Raises `UnavailableError` where there is none."""
    java = shutil.which("java")
    if java is None:
        raise UnavailableError("there is no java on the PATH; install a Java runtime, version 8 or later")
    return java


def java_version() -> int:
    """The number of Java's release, such as 8 or 17.

    Raises `UnavailableError` where there is no Java or it does not tell.
    """
    told = subprocess.run([find_java(), "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', told)
    if found is None:
        raise UnavailableError(f"java -version says {told.strip()!r}, which names no version")
    return int(found[1])


def run_java(name: str, arguments: Sequence[str], asked: str, timeout: float) -> str:
    """Run Java with `asked` as its input until it ends; returns what it printed. Text is UTF-8 either way.

    Java is stopped when this returns or raises, and after `timeout` seconds in any case. Raises `UnavailableError`,
    which calls the program by `name`, where it cannot be started, fails or takes longer.
    """
    # Otherwise the machine's locale decides how text is read and whether numbers have a decimal comma.
    machine = ["-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Duser.language=en"]
    try:
        done = subprocess.run(
            [find_java(), *machine, *arguments],
            input=asked.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{name} did not end within {timeout:g} s") from None
    except OSError as error:
        raise UnavailableError(f"{name} could not be started: {error}") from None
    if done.returncode != 0:
        complaints = done.stderr.decode(errors="replace").strip().splitlines()
        raise UnavailableError(f"{name} failed: {complaints[0] if complaints else f'exit status {done.returncode}'}")
    return done.stdout.decode(errors="replace")
