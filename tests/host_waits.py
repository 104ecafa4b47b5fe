"""What would make the host wait for a GPU, counted on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
_READING_OPERATORS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select"}


class HostWaits(TorchFunctionMode):
    """Records the reads of tensors while it is active: methods, indices that are masks or lists, and operators."""

    def __init__(self, *on_the_host: Tensor) -> None:
        """Start with no reads.

        Args:
            on_the_host: Tensors that are on the CPU even if the others are on a GPU.
        """
        super().__init__()
        self.reads: list[str] = []
        self._on_the_host = on_the_host
        self._operators = _Operators(self.reads)

    def __enter__(self) -> "HostWaits":
        self._operators.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            if not any(args[0] is tensor for tensor in self._on_the_host):
                self.reads.append(name)
            with self._operators.paused():
                return func(*args, **(kwargs or {}))
        if name in ("__getitem__", "__setitem__") and _is_mask_or_list(args[1]):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Records reading operators, also those that a backward pass or the optimizer calls."""

    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in _READING_OPERATORS and not self._is_paused:
            self._reads.append(name)
        return func(*args, **(kwargs or {}))


def _is_mask_or_list(index: Any) -> bool:
    if isinstance(index, tuple):
        return any(map(_is_mask_or_list, index))
    return isinstance(index, list) or (isinstance(index, Tensor) and index.dtype == torch.bool)
