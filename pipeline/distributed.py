"""The process group of a run that `torchrun` started, on one or more hosts."""

import gc
import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor

from pipeline.artifacts import original_path, work_folder

T = TypeVar("T")

# Another process may wait for a lock, or read from a slow disk.
_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The process group of a run, as seen by one process."""

    rank: int
    """Rank of this process, from 0 to `world_size - 1`."""
    world_size: int
    """Number of processes."""

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which logs and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. Every process must call this."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place. Every process must call this."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value. Every process must call this."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def work_folder(self, root: Path, stage: str, name: str) -> AbstractContextManager[Path]:
        """Open the work folder of a stage and fingerprint. Rank 0 holds its lock for all processes."""
        return work_folder(root, stage, name) if self.is_main else nullcontext(original_path(root) / stage / name)


SINGLE_PROCESS = Processes(rank=0, world_size=1)


@contextmanager
def init_processes() -> Iterator[Processes]:
    """Join the process group that `torchrun` started, or run as a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    # DistributedDataParallel imports this module, which keeps the process group that exists at that time. Imported
    # after init_process_group, it would keep a group that is never destroyed, and a gloo thread that is alive when the
    # interpreter exits aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield Processes(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
    except BaseException as error:
        # The traceback's frames reference DistributedDataParallel. Freed after the group, it would wait, holding the
        # GIL, for a gloo thread that waits for the GIL.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()
