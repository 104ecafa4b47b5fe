"""CUDA graphs: the kernels of a function, recorded once and launched together, without the cost of Python."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_EAGER_CALLS = 3
"""Calls with inputs of one shape before they are captured. Rare shapes are not worth it, and the first calls compile
kernels and allocate workspaces, which is impossible in a capture."""
_MAX_GRAPHS = 32
"""Maximum graphs of a function; inputs of further shapes run eagerly."""

_capture_lock = threading.Lock()

_Key = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


class _Capture(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class GraphedFunction(threading.local):
    """A function of tensors on a GPU that is replayed as a CUDA graph for each frequent shape of its inputs.

    A replay computes the same as the function, random numbers included. The function must not wait for the GPU, and
    all other tensors that it reads or writes, such as weights and their gradients, must stay in place between calls.
    Each thread has graphs of its own. All graphs of a thread share their memory.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """Wrap a function, which runs eagerly the first times."""
        self._function = function
        self._num_calls: Counter[_Key] = Counter()
        self._captures: dict[_Key, _Capture] = {}
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's result, which the next call overwrites."""
        key = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        capture = self._captures.get(key)
        if capture is None:
            self._num_calls[key] += 1
            if self._num_calls[key] <= _EAGER_CALLS or len(self._captures) == _MAX_GRAPHS:
                return self._run(inputs)
            capture = self._captures[key] = self._capture(inputs)
        for static, tensor in zip(capture.inputs, inputs, strict=True):
            static.copy_(tensor)
        capture.graph.replay()
        return capture.output

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run the function on the stream of the captures, which gets its workspaces."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._function(*inputs)
        current.wait_stream(self._stream)
        return output

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Capture:
        static = tuple(map(torch.empty_like, inputs))
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory during the capture, but not capture, too.
        with (
            _capture_lock,
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = self._function(*static)
        return _Capture(graph, static, output)
