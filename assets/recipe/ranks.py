"""Training on several processes, each with its share of every batch: `torchrun --nproc-per-node 2 -m recipe.unet ...`.

On a CPU two processes of one thread are faster than one of two threads, since small convolutions do not share well.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


def start_ranks() -> None:
    """Joins the other processes, where torchrun has started some."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo")


def rank() -> int:
    """The number of this process; 0 where it is alone. The first one writes files and progress."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Replaces gradients by their mean over all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    add_up(gradients)
    if ranks() > 1:
        torch._foreach_div_(gradients, ranks())


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their sums over all processes, in one message."""
    if ranks() == 1:
        return
    flat = torch.cat([each.flatten() for each in tensors])
    dist.all_reduce(flat)
    for each, total in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
        each.copy_(total.view_as(each))


def of_first(value: float) -> float:
    """The first process's value, so that all of them stop at the same step."""
    if ranks() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()
