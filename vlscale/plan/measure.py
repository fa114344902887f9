"""What a computation keeps in memory, measured on a CPU: bytes saved for the backward pass, and the peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Return bytes of what autograd saves in ``forward``; each storage counts once, ``known`` tensors do not count.

    Args:
        forward: the computation; what it returns is kept until the count is done.
        known: parameters and inputs.
    """
    known_storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}
    kept: list[Any] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_storages:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(forward())
    return sum(found.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make inside the block and that are still alive.

    What a kernel allocates and frees by itself is not seen. On a CPU the backward pass runs in the calling thread and
    is seen; on a GPU ask the allocator instead.

    Attributes:
        now: bytes alive; peak: most bytes that were alive at the end of an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Leave ``tensors`` out of the count."""
        for tensor in tensors:
            self._note(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen and self._seen[key]() is storage:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size


def peak_bytes(step: Callable[[], None], module: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Return the most bytes that ``step`` (forward and backward) holds beyond parameters, gradients and inputs.

    Gradients are allocated before the step and added to, as an accumulating engine does.
    """
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes()
    live.know([*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None), *inputs])
    with live:
        step()
    return live.peak
