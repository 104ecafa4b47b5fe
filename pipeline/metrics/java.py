"""Runs the Java programs behind METEOR, SPICE and the PTB tokenizer."""

import re
import shutil
import subprocess
from collections.abc import Sequence

from pipeline.captions.languages import ENGLISH


class UnavailableError(Exception):
    """A metric or tokenizer that this machine cannot run. The message gives the reason."""


def require_english(name: str, language: str) -> None:
    """Raise `UnavailableError` if captions are not in English, the language of these programs.

    Args:
        name: Name of the program for the error message.
        language: Code of the language of the captions.
    """
    if language != ENGLISH:
        raise UnavailableError(f"{name} is for English, and the language of the captions is {language}.")


def find_java() -> str:
    """Return the path of `java`, or raise `UnavailableError` if there is none."""
    java = shutil.which("java")
    if java is None:
        raise UnavailableError("java is not on the PATH. Install a Java runtime, version 8 or later.")
    return java


def java_version() -> int:
    """Return the major version of Java, such as 8 or 17.

    Raises:
        UnavailableError: Java is missing or does not report a version.
    """
    output = subprocess.run([find_java(), "-version"], capture_output=True, text=True, check=False).stderr
    match = re.search(r'version "(?:1\.)?(\d+)', output)
    if match is None:
        raise UnavailableError(f"`java -version` reports no version: {output.strip()!r}. Install another Java runtime.")
    return int(match[1])


def run_java(name: str, arguments: Sequence[str], text: str, timeout: float) -> str:
    """Run a Java program.

    Args:
        name: Name of the program for error messages.
        arguments: Arguments of `java`.
        text: Standard input, sent as UTF-8.
        timeout: Seconds until the program is stopped. Callers set it far above the usual time, so that it only stops a
            program that hangs.

    Returns:
        Standard output, decoded as UTF-8.

    Raises:
        UnavailableError: Java is missing, or the program cannot start, fails or exceeds the timeout.
    """
    # Without these flags the locale decides the text encoding and whether numbers have a decimal comma.
    flags = ["-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Duser.language=en"]
    try:
        process = subprocess.run(
            [find_java(), *flags, *arguments],
            input=text.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{name} did not finish within {timeout:g} s. Run again on an idle machine.") from None
    except OSError as error:
        raise UnavailableError(f"{name} cannot start: {error}. Check the Java runtime.") from None
    if process.returncode != 0:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[0] if lines else f"exit status {process.returncode}"
        raise UnavailableError(f"{name} failed: {reason}. Check the Java runtime.")
    return process.stdout.decode(errors="replace")
