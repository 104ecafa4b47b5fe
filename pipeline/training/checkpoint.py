"""Checkpoints: everything a training run needs to go on to the same bits, in one safetensors file.

Nothing is unpickled: tensors are stored as tensors, the rest as JSON in the file's header.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.artifacts import write_atomically
from pipeline.errors import UserError


@dataclass(kw_only=True)
class Progress:
    """Where a run stands."""

    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches finished of the epoch under way."""
    loss_sum: float = 0.0
    """Sum of the cross-entropies of their words, in nats."""
    words: int = 0
    """Their words."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row of metrics an epoch finished."""
    best_score: float | None = None
    best_epoch: int = 0
    """Epoch, counted from 1, of the best score; 0 where none is finished."""


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of this process's random generators, on the CPU and on a GPU in use."""
    return {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )


def save_checkpoint(
    path: Path,
    progress: Progress,
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    best: dict[str, Tensor],
    generators: Sequence[dict[str, Tensor]],
) -> None:
    """Write the state of a run, with the `random_state` of each rank, atomically."""
    tensors = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{slot}": tensor for slot, tensor in slots.items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for rank, generator in enumerate(generators):
        tensors |= {f"random.{rank}.{kind}": state for kind, state in generator.items()}
    content = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={"progress": json.dumps(asdict(progress))},
    )
    write_atomically(path, content)


def load_checkpoint(
    path: Path, decoder: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None, rank: int
) -> tuple[Progress, dict[str, Tensor]]:
    """Bring decoder, optimizer, average and a rank's random generators to the state of a checkpoint.

    Returns progress and best weights.

    Raises `UserError`, naming the file, where it is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            parts: dict[str, dict[str, Tensor]] = {
                part: {} for part in ("decoder", "best", "optimizer", "average", "random")
            }
            for name in file.keys():  # noqa: SIM118
                part, rest = name.split(".", 1)
                parts[part][rest] = file.get_tensor(name)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no checkpoint ({error}); delete it to train from the start") from error
    decoder.load_state_dict(parts["decoder"])
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, slot = name.split(".")
        slots.setdefault(int(number), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    if average is not None:
        average.load_state_dict(parts["average"])
    torch.set_rng_state(parts["random"][f"{rank}.cpu"])
    if f"{rank}.cuda" in parts["random"]:
        torch.cuda.set_rng_state(parts["random"][f"{rank}.cuda"])
    return progress, parts["best"]
