"""Several processes that do one piece of work, on one host or many, as `torchrun` starts them."""

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

from pipeline.publish import work_folder

T = TypeVar("T")

# A rank may wait for another process's lock, or for a rank that reads from a slow disk.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, as one of them sees them: `rank` of 0 to `size - 1`."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process is the one that publishes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Collect the values of all ranks, in their order. All ranks have to call this."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the ranks. All ranks have to call this."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def from_first(self, value: T) -> T:
        """Give all ranks the value of the first. All ranks have to call this."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def work_folder(self, root: Path, stage: str, name: str) -> AbstractContextManager[Path]:
        """Open the work folder of one stage and fingerprint, in which the first rank holds the lock for all."""
        return work_folder(root, stage, name) if self.first else nullcontext(root / stage / name)


ALONE = Ranks(rank=0, size=1)


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Meet the other processes that `torchrun` started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # It keeps the group that it finds when it is first imported, which DistributedDataParallel does. That group would
    # never be taken down, and a thread of gloo that still runs while the interpreter ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size())
    except BaseException as error:
        # Its frames hold what was at work. DistributedDataParallel that goes after the group waits, with Python's lock,
        # for a thread of gloo that waits for this lock.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()
