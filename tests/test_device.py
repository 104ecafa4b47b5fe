import subprocess
import sys

import pytest
import torch

from pipeline.device import setup_device
from pipeline.errors import UserError


def test_auto_selects_a_gpu_if_there_is_one() -> None:
    assert setup_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.are_deterministic_algorithms_enabled()


def test_the_compiler_is_deterministic_but_not_imported() -> None:
    program = """
import sys, torch
from pipeline.device import setup_device
setup_device("cpu")
assert "torch._inductor" not in sys.modules
from torch._inductor import config
assert config.deterministic
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_a_missing_or_invalid_device_is_an_error(name: str) -> None:
    with pytest.raises(UserError) as caught:
        setup_device(name)
    assert f"--device {name}" in str(caught.value)
