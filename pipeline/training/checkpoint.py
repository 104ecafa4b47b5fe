"""Checkpoints: everything that a training run resumes from, in one safetensors file.

Nothing is unpickled: the file contains tensors, and the progress as JSON in its header.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import safetensors
import torch
from pydantic import Field, FiniteFloat, TypeAdapter
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.artifacts import Int64, Schema, write_atomically
from pipeline.errors import UserError

SCHEMA = Schema("gridcap.checkpoint", 2)
_REMEDY = "Delete it to train from the start."
_Count = Annotated[Int64, Field(ge=0)]
_DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
"""Names of dtypes in safetensors."""
_PARTS = ("decoder", "optimizer", "ema", "best", "random")


@dataclass(kw_only=True)
class Progress:
    """Position of a run and its metrics so far."""

    epoch: _Count = 0
    """Completed epochs."""
    batch: _Count = 0
    """Completed batches of the current epoch."""
    loss_sum: FiniteFloat = 0.0
    """Sum of the cross-entropy over the words of these batches, in nats."""
    num_words: _Count = 0
    """Words in these batches."""
    reward_sum: FiniteFloat = 0.0
    """Sum of the rewards of the captions sampled in these batches, in self-critical training."""
    num_samples: _Count = 0
    """Captions sampled in these batches."""
    history: list[dict[str, Int64 | FiniteFloat | None]] = field(default_factory=list)
    """Metrics of each completed epoch."""
    best_score: FiniteFloat | None = None
    """Highest selection score so far."""
    best_epoch: _Count = 0
    """Epoch of the highest score, from 1; 0 during the first epoch, and for the model that `refine` starts from."""

    def next_epoch(self) -> "Progress":
        """Return the position at the start of the next epoch."""
        return Progress(
            epoch=self.epoch + 1, history=self.history, best_score=self.best_score, best_epoch=self.best_epoch
        )

    @property
    def train_loss(self) -> float:
        """Mean cross-entropy of the current epoch so far, in nats per word."""
        return self.loss_sum / self.num_words


@dataclass(kw_only=True)
class TrainingState:
    """State that training updates, without the random states of the processes."""

    decoder: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """State dict of the best epoch; empty during the first epoch."""
    progress: Progress = field(default_factory=Progress)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's random generators: of the CPU, and of `device` if it is a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def save_checkpoint(path: Path, state: TrainingState, random_states: Sequence[Mapping[str, Tensor]]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: Checkpoint file.
        state: State to save.
        random_states: `random_state` of each process, by rank.
    """
    tensors = {f"decoder.{name}": tensor for name, tensor in state.decoder.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best_weights.items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    if state.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for rank, states in enumerate(random_states):
        tensors |= {f"random.{rank}.{device}": tensor for device, tensor in states.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    progress = json.dumps(asdict(state.progress))
    metadata = {
        "schema": SCHEMA.name,
        "schema_version": str(SCHEMA.version),
        "progress": progress,
        "digest": _digest(tensors, progress),
    }
    write_atomically(path, _serialize(tensors, metadata))


def load_checkpoint(path: Path, state: TrainingState, rank: int) -> None:
    """Restore a training state and the random state of this process from a checkpoint.

    Args:
        path: Checkpoint file.
        state: State to overwrite, of the same decoder, optimizer and EMA.
        rank: Rank of this process.

    Raises:
        UserError: The file is damaged, of another schema, or from a run with another decoder or fewer processes.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            schema = (metadata.get("schema"), int(metadata.get("schema_version", 0)))
            SCHEMA.check(path, schema, _REMEDY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(tensors, metadata["progress"]) != metadata["digest"]:
            raise ValueError("its content does not match its digest")
        progress = TypeAdapter(Progress).validate_json(metadata["progress"], strict=True)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for name, tensor in tensors.items():
            part, name_in_part = name.split(".", 1)
            parts[part][name_in_part] = tensor
        _restore(state, parts)
        if f"{rank}.cpu" not in parts["random"]:
            raise ValueError(f"it has no random state of process {rank}")
        torch.set_rng_state(parts["random"][f"{rank}.cpu"])
        if f"{rank}.cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"][f"{rank}.cuda"])
    # The errors of damaged files, and of tensors that do not fit into the state.
    except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        fault = " ".join(str(error).split())
        raise UserError(f"{path}: not a checkpoint of this run ({fault}). {_REMEDY}") from error
    state.progress = progress


def _restore(state: TrainingState, parts: Mapping[str, dict[str, Tensor]]) -> None:
    """Copy the tensors of a checkpoint, by part and name, into a training state."""
    state.decoder.load_state_dict(parts["decoder"])
    if parts["best"] and _shapes(parts["best"]) != _shapes(parts["decoder"]):
        raise ValueError("the weights of the best epoch have other shapes")
    state.best_weights = parts["best"]
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, moment = name.split(".")
        if tensor.shape not in (parameters[int(index)].shape, ()):
            raise ValueError(f"optimizer.{name} has another shape than its parameter")
        moments.setdefault(int(index), {})[moment] = tensor
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})
    if state.ema is not None:
        state.ema.load_state_dict(parts["ema"])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield the parts of a safetensors file. Unlike `safetensors.torch.save`, this does not copy the tensors."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        yield _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor], progress: str) -> str:
    """Compute the SHA-256, in hexadecimal, of named tensors on the CPU and of the progress as JSON."""
    digest = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()
