import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError, printable, summarize, write_error
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("body", "status", "facts"),
    [
        ("return", 0, []),
        ("raise UserError('data/x.json: no such file. Run something.')", 2, ["error: data/x.json: no such file."]),
        ("raise FileNotFoundError(2, 'No such file or directory', 'a.jpg')", 2, ["error: a.jpg", "No such file"]),
        ("raise OSError(28, 'No space left on device')", 2, ["No space left on device", "disk space"]),
        (
            "raise OSError(28, 'No space left', 'a/b.h5')",
            2,
            ["error: a/b.h5: ", "(No space left). ", " bytes are free"],
        ),
        (
            "raise UserError('a\\x1b]0;t\\x07\\nb: fault', 'second\\u2028line')",
            2,
            [r"a\u001b]0;t\u0007\u000ab", r"d\u2028l"],
        ),
        ("import missing_package", 2, ["missing_package", "pip install"]),
        ("raise OSError('internal')", 1, ["Traceback", "internal"]),
        ("import pipeline.missing", 1, ["Traceback", "pipeline.missing"]),
        ("raise KeyboardInterrupt", 130, ["interrupted"]),
    ],
)
def test_exit_status_and_message_of_a_command(body: str, status: int, facts: list[str]) -> None:
    program = f"from pipeline.errors import UserError, run\ndef main() -> None:\n    {body}\nrun(main)\n"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    assert [fact for fact in facts if fact not in result.stderr] == []
    assert status == 1 or "Traceback" not in result.stderr


def test_log_messages_go_to_standard_error() -> None:
    program = (
        "import logging\nfrom pipeline.errors import run\n"
        "def main() -> None:\n    logging.getLogger('gridcap').info('epoch %d', 3)\n    print('output')\nrun(main)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("output\n", "epoch 3\n")


def test_log_messages_are_printable() -> None:
    program = (
        "import logging\nfrom pipeline.errors import run\n"
        "def main() -> None:\n    logging.getLogger('gridcap').info('%s', 'a\\x1b[2J\\nb')\nrun(main)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr == "a\\u001b[2J\\u000ab\n"


def test_a_full_standard_output_is_one_sentence() -> None:
    program = "from pipeline.errors import run\ndef main() -> None:\n    print('x' * 10)\nrun(main)\n"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 2
    assert result.stderr.startswith("error: No space left on device")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_only_a_full_disk_asks_to_free_space(tmp_path: Path, number: int, is_full: bool) -> None:
    message = str(write_error(OSError(number, os.strerror(number)), tmp_path / "scores.json", "Name another file."))
    assert message.startswith(f"{tmp_path / 'scores.json'}: cannot be written ({os.strerror(number)}). ")
    assert ("bytes are free now. Free disk space" in message) == is_full
    assert ("Name another file." in message) == (not is_full)


def test_printable_text_has_the_escapes_of_json() -> None:
    text = "Mädchen 犬\x00\x1b\x9b\r\n\u202e\u2028\udc80\U000e0001"
    assert printable(text) == r"Mädchen 犬\u0000\u001b\u009b\u000d\u000a\u202e\u2028\udc80\udb40\udc01"
    assert json.loads(f'"{printable(text)}"') == text


def test_an_error_may_have_several_lines() -> None:
    assert str(UserError("first", "second")) == "first\nsecond"


def test_many_faults_are_summarized() -> None:
    assert summarize(["a", "b"]) == "a; b"
    assert summarize(["a", "b", "c", "d", "e"], limit=2) == "a; b; and 3 more"
