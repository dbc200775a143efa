"""A simulated accelerator for machines that have none: a device whose tensors keep their numbers on the CPU.

Every operation is computed by the CPU, so control flow is real and results can be compared with the CPU's. The rules
are those of CUDA: operands on different devices raise, but for 0-dim operands and index tensors from the host, and
everything for which the host waits until the device is done is noted, with the line of code that asks for it.

    with noted_waits() as waits:
        images = pipe.to(DEVICE)(...).images
    assert not waits, listed(waits)

It borrows the name of PyTorch's device type "lazy", which has no kernels of its own, so nothing else in the process
changes, and backward runs in the thread that asks for it.

What is not simulated: kernels (attention takes PyTorch's plain way), generators on the device, streams, and memory.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("lazy", 0)
ROOT = Path(__file__).parents[1]
OURS = f"{ROOT / 'lora_compose'}/"


@dataclass(frozen=True)
class Wait:
    """One time that the host waits for the device.

    Attributes:
        operation: What it waits for.
        line: The innermost line of code outside PyTorch.
        caller: The innermost line of ours that has led there, if it is another.
    """

    operation: str
    line: str
    caller: str | None

    def __str__(self) -> str:
        called = "" if self.caller is None else f", called by {self.caller}"
        return f"{self.operation} at {self.line}{called}"


class MixedDevicesError(RuntimeError):
    """Operands that CUDA would refuse to take from different devices."""


_waits: list[Wait] | None = None  # of the innermost block that notes them


@contextmanager
def noted_waits() -> Iterator[list[Wait]]:
    """Inside this block every wait for the device is put into the list."""
    global _waits
    before, found = _waits, []
    _waits = found
    try:
        yield found
    finally:
        _waits = before


def listed(waits: Sequence[Wait]) -> str:
    """The waits for the message of a failing test, one a line."""
    return "\n".join(["the host waits for the device:", *(f"  {wait}" for wait in waits)])


def beyond(waits: Sequence[Wait], others: Sequence[Wait]) -> list[Wait]:
    """The waits that others do not have, whoever has called for them."""
    had = Counter((wait.operation, wait.line) for wait in others)
    found = []
    for wait in waits:
        had[wait.operation, wait.line] -= 1
        if had[wait.operation, wait.line] < 0:
            found.append(wait)
    return found


def _note(operation: str) -> None:
    if _waits is not None:
        _waits.append(Wait(operation, *_source()))


def _source() -> tuple[str, str | None]:
    """The innermost line outside PyTorch, and the innermost of ours if it is another."""
    frame: FrameType | None = sys._getframe(2)
    innermost = None
    while frame is not None:
        code = frame.f_code
        ours = code.co_filename.startswith(OURS)
        if ours or (innermost is None and "/torch/" not in code.co_filename and code.co_filename != __file__):
            file = code.co_filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[-1]
            line = f"{file}:{frame.f_lineno} {code.co_name}"
            if ours:
                return (line, None) if innermost is None else (innermost, line)
            innermost = line
        frame = frame.f_back
    return innermost or "?", None


class SimTensor(torch.Tensor):
    """A tensor on the simulated device.

    Attributes:
        host: Its numbers.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> Any:
        if host.is_meta:  # accelerate makes one parameter of another by its class, also where it takes the numbers away
            return torch.nn.Parameter(host, requires_grad)
        host = _on_host(host)
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )

    def __init__(self, host: Tensor, requires_grad: bool = False) -> None:
        self.host = _on_host(host)

    def __repr__(self, **_: Any) -> str:
        return f"SimTensor({self.host})"

    @property
    def data(self) -> Tensor:
        return torch.Tensor.data.__get__(self)  # pyright: ignore[reportAttributeAccessIssue]

    @data.setter
    def data(self, other: Tensor) -> None:
        torch.Tensor.data.__set__(self, other)  # pyright: ignore[reportAttributeAccessIssue]
        self.host = _on_host(other)

    # Makes `Module.to` keep the parameter objects, as it does for CUDA.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "SimTensor":
        return SimTensor(inner["host"])

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert lazy:0 device type tensor to numpy. Use Tensor.cpu() first")

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation with at least one operand on the device."""
    name = func.overloadpacket.__name__
    if name == "_to_copy":
        return _copied(func, *args, **kwargs)
    if name == "copy_":
        return _copy(*args, **kwargs)
    if name in _INDEXING:
        _check_indexing(func, args)
    else:
        _check(func, args, kwargs)
        if _waits is not None and not _WAITS.isdisjoint(func.tags) and kwargs.get("output_size") is None:
            _note(name)
    options = {key: "cpu" if key == "device" else _on_host(value) for key, value in kwargs.items()}
    out = func(*map(_on_host, args), **options)
    written = _written(func)
    if written is None:
        return _from_host(out)
    tensor = kwargs[written] if isinstance(written, str) else args[written]
    if (tensor.shape, tensor.stride()) != (tensor.host.shape, tensor.host.stride()):
        raise NotImplementedError(f"{func} changes the shape of its operand, which is not simulated")
    return tensor


_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_TAKES_A_NUMBER = ("fill_", "index_fill", "index_fill_", "masked_fill", "masked_fill_")


def _check(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuses what CUDA refuses: anything from the host but a 0-dim operand where numbers are combined one by one."""
    host = list(_of_the_host([*args, *kwargs.values()]))
    if not host:
        return
    takes_numbers = torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _TAKES_A_NUMBER
    writes_to_host = _written(func) == 0 and not isinstance(args[0], SimTensor)
    if not takes_numbers or writes_to_host or any(x.dim() for x in host):
        raise MixedDevicesError(
            f"Expected all tensors to be on the same device, but {func} gets {[tuple(x.shape) for x in host]} from the "
            f"host at {_source()[0]}"
        )


def _check_indexing(func: Any, args: tuple) -> None:
    """Index tensors may come from the host, for which it waits, as it does to count what a mask chooses."""
    tensor, indices, values = args[0], [x for x in args[1] if x is not None], args[2] if len(args) > 2 else None
    if not isinstance(tensor, SimTensor) or (values is not None and not isinstance(values, SimTensor) and values.dim()):
        raise MixedDevicesError(
            f"indices should be either on cpu or on the same device as the indexed tensor, in {func} at {_source()[0]}"
        )
    for index in indices:
        if not isinstance(index, SimTensor):
            _note("indices from the host")
        elif index.dtype in (torch.bool, torch.uint8) and (values is None or values.dim()):
            _note("indexing by a mask")  # but to fill it with a number is no indexing


def _copied(func: Any, source: Tensor, **how: Any) -> Tensor:
    """`Tensor.to` and whatever is made of it, of a tensor on the device."""
    wait, _ = not how.pop("non_blocking", False), how.pop("pin_memory", None)
    device = how.pop("device", None)
    copied = func(_on_host(source), **how)
    if device is None or torch.device(device).type == DEVICE.type:
        return SimTensor(copied)
    if torch.device(device).type == "meta":
        return copied.to("meta")
    if wait:
        _note("copy to the host")
    return copied


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`Tensor.copy_`, in either direction."""
    if source.is_meta or target.is_meta:
        return target
    to_device = isinstance(target, SimTensor)
    if to_device != isinstance(source, SimTensor) and not non_blocking and source.numel():
        _note(f"copy to the {'device' if to_device else 'host'}")
    _on_host(target).copy_(_on_host(source))
    return target


def _on_host(value: Any) -> Any:
    """Operands as the CPU takes them."""
    if type(value) is SimTensor:
        return value.host
    if isinstance(value, (list, tuple)):
        return [_on_host(one) for one in value]
    return value


def _from_host(value: Any) -> Any:
    """Results as the device gives them."""
    if isinstance(value, torch.Tensor):
        return SimTensor(value)
    if isinstance(value, list | tuple):
        return type(value)(_from_host(one) for one in value)
    return value


def _of_the_host(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among operands that are not on the device."""
    for value in values:
        if type(value) is SimTensor:
            continue
        if isinstance(value, (list, tuple)):
            yield from _of_the_host(value)
        elif isinstance(value, torch.Tensor):
            yield value


@cache
def _written(func: Any) -> int | str | None:
    """The operand that an operation writes to and returns, by position or name."""
    if not func._schema.is_mutable or not func._schema.returns:
        return None
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return argument.name if argument.kwarg_only else position
    return None


def numbers(tree: Any) -> Any:
    """Tensors of the device as tensors of the CPU, without a wait."""
    return tree_map_only(SimTensor, lambda tensor: tensor.host.clone(), tree)


@contextmanager
def parameters_that_move() -> Iterator[None]:
    """Inside this block a parameter stays the same object when it is moved back, and when its `data` are replaced.

    Those of CUDA always do. Here the parameters of a module do so only when they are moved to the device.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _ReplacedData():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@contextmanager
def autocast_switched_off() -> Iterator[None]:
    """Inside this block `torch.autocast` may be switched off for the device, on which it is never on.

    PyTorch refuses the name of a device type that has no autocast, also when it is asked whether that is on, as text
    encoders of older versions of transformers do.
    """
    autocast, asked = torch.autocast, torch.is_autocast_enabled
    torch.autocast = _Autocast
    torch.is_autocast_enabled = lambda *device_type: DEVICE.type not in device_type and asked(*device_type)
    try:
        yield
    finally:
        torch.autocast, torch.is_autocast_enabled = autocast, asked


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        computing = "cpu" if device_type == DEVICE.type and not enabled else device_type
        super().__init__(computing, dtype, enabled, cache_enabled)


class _ReplacedData(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__ and args[0].device != args[1].device:  # pyright: ignore[reportAttributeAccessIssue]
            tensor, other = args
            if isinstance(tensor, torch.nn.Parameter):
                other = torch.nn.Parameter(other, requires_grad=tensor.requires_grad)
            torch.utils.swap_tensors(tensor, other)
            return None
        return func(*args, **(kwargs or {}))


class _Module:
    """What PyTorch and diffusers ask of a device as `torch.lazy`."""

    @staticmethod
    def is_available() -> bool:
        return False  # to be used only by those who name it

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def synchronize(device: Any = None) -> None:
        _note("synchronize")

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass


torch._register_device_module(DEVICE.type, _Module)

# What is made on the device has no operand there.
_kernels = torch.library.Library("aten", "IMPL")
_FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m",
    "randperm",
)  # fmt: skip


def _factory(name: str) -> Any:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> SimTensor:
        return SimTensor(func(*args, **options, device="cpu"))

    return make


for _name in _FACTORIES:
    _kernels.impl(_name, _factory(_name), "Lazy")
# Where numbers become a tensor, PyTorch leaves `__torch_dispatch__` out.
_kernels.impl("copy_", _copy, "Lazy")
