import subprocess
import sys

import pytest

from pipeline.errors import summarize
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("body", "status", "facts"),
    [
        ("return", 0, []),
        ("raise UserError('data/x.json: no such file. Run something.')", 2, ["error: data/x.json: no such file."]),
        ("raise FileNotFoundError(2, 'No such file or directory', 'a.jpg')", 2, ["error: a.jpg", "No such file"]),
        ("raise OSError(28, 'No space left on device')", 2, ["No space left on device", "disk space"]),
        ("import missing_package", 2, ["missing_package", "pip install"]),
        ("raise OSError('internal')", 1, ["Traceback", "internal"]),
        ("import pipeline.missing", 1, ["Traceback", "pipeline.missing"]),
        ("raise KeyboardInterrupt", 130, []),
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


def test_many_faults_are_summarized() -> None:
    assert summarize(["a", "b"]) == "a; b"
    assert summarize(["a", "b", "c", "d", "e"], limit=2) == "a; b; and 3 more"
