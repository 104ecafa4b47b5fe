"""Where tensors are computed: chosen by a flag, since it is the machine's affair and no param."""

import os

import torch

from pipeline.errors import UserError


def setup_device(name: str) -> torch.device:
    """Choose `cpu`, `cuda` (`cuda:1`, ...) or `auto`, and make PyTorch compute the same bits on every run.

    `auto` is the CPU where there is no GPU, and under `torchrun` each process's own GPU.

    Raises `UserError` for a device that this machine lacks.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN finds reads of unwritten memory, and takes a third of the time of training.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: this machine cannot use it ({error}); choose cpu or auto") from error
