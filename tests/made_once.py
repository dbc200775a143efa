"""Small models are made once in a process; who asks again gets a copy of its own, in a fraction of the time."""

import copy
import pickle
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """Makes what belongs to the same arguments once, and returns copies that share no tensor and no module.

    A copy is the same to the bit, and leaves the global random numbers as making it does.
    """
    kept: dict[str, _Kept] = {}

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        key = repr((args, sorted(kwargs.items()), torch.get_default_device(), torch.get_default_dtype()))
        if key not in kept:
            kept[key] = _Kept(make(*args, **kwargs))
        return kept[key].copy()

    return made


class _Kept:
    """Tensors, and everything else as a pickle, which is read many times faster than `copy.deepcopy` copies modules."""

    def __init__(self, made: Any) -> None:
        self.random, self.tensors, file = torch.get_rng_state(), {}, BytesIO()
        _Pickler(file, self.tensors).dump(made)
        self.rest = file.getvalue()

    def copy(self) -> Any:
        made = _Unpickler(BytesIO(self.rest), self.tensors).load()
        torch.set_rng_state(self.random)
        return made


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors[id(obj)] = obj
        return id(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self.copied: dict[int, Tensor] = {}

    def persistent_load(self, pid: int) -> Tensor:
        if pid not in self.copied:
            self.copied[pid] = _copied(self.tensors[pid])
        return self.copied[pid]


def _copied(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return copy.deepcopy(tensor)
