"""Peak memory of tensors on a device."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(device: torch.device | str) -> "PeakMemory":
    """Watches a device inside a `with` block; `peak_bytes` has the peak of all tensors, earlier ones included.

        with peak_memory("cuda") as memory:
            ...
        memory.peak_bytes

    On CUDA it is the peak of PyTorch's allocator, on the CPU a sum over the storages of all tensors. Workspaces of
    operations count on CUDA only, and on the CPU tensors of other threads do not count.

    Raises:
        ValueError: For devices whose memory PyTorch does not report.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _CudaMemory(device)
    if device.type == "cpu":
        return _StorageMemory("cpu", _all_tensors)
    raise ValueError(f"the peak of the memory can be measured on cuda and on the cpu, not on {device}")


def added_memory(device: torch.device | str, there: Iterable[Tensor] = ()) -> "_StorageMemory":
    """Watches the CPU or the meta device: `peak_bytes` counts `there` from the start, and what the block makes.

    An earlier tensor counts once an operation returns it. On the meta device it is the memory that tensors of these
    shapes would take.
    """
    there = tuple(there)
    return _StorageMemory(torch.device(device).type, lambda: there)


class _CudaMemory:
    def __init__(self, device: torch.device) -> None:
        self.peak_bytes = 0
        self._device = device

    def __enter__(self) -> Self:
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *error: Any) -> None:
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device)


class _StorageMemory(TorchDispatchMode):
    """Sums the storages on one kind of device, existing ones included."""

    def __init__(self, kind: str, there: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._kind = kind
        self._there = there
        self._live_bytes = 0
        self._watched: dict[int, weakref.finalize] = {}  # by storage; its Python object lives as long as the storage

    def __enter__(self) -> Self:
        for tensor in self._there():
            self._watch(tensor)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for end in self._watched.values():
            end.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return out

    def _watch(self, tensor: Tensor) -> None:
        # Fake tensors of `torch.compile` claim to be on the CPU, but take no memory there.
        if isinstance(tensor, FakeTensor) or tensor.device.type != self._kind or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if id(storage) not in self._watched:
            self._watched[id(storage)] = weakref.finalize(storage, self._end, id(storage), storage.nbytes())
            self._live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _end(self, storage: int, size: int) -> None:
        del self._watched[storage]
        self._live_bytes -= size


PeakMemory = _CudaMemory | _StorageMemory


def _all_tensors() -> Iterator[Tensor]:
    gc.collect()  # frees unreachable tensors, so that the result does not depend on when Python collects them
    for candidate in gc.get_objects():
        if issubclass(type(candidate), Tensor):  # isinstance would wake up lazy modules
            yield candidate
