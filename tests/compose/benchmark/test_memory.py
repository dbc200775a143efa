"""The peak of the memory of tensors, on known allocations."""

import pytest
import torch
from torch import Tensor

from lora_compose.compose.benchmark.memory import added_memory, peak_memory

MIB = 2**20
pytestmark = pytest.mark.usefixtures("tensors_of_others_do_not_count")


def block(size: int, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)


def before() -> int:
    with peak_memory("cpu") as memory:
        pass
    return memory.peak_bytes


def test_what_was_there_counts():
    small = before()
    kept = block(5 * MIB)
    assert before() - small == 5 * MIB
    del kept
    assert before() == small


def test_the_peak_is_the_largest_sum_of_live_tensors():
    start = before()
    with peak_memory("cpu") as memory:
        first = block(MIB)
        second = block(2 * MIB)
        del first
        third = block(MIB)
        del second, third
        assert block(2 * MIB).sum() == 0
    assert memory.peak_bytes - start == 3 * MIB


def test_a_view_keeps_its_storage_and_counts_once():
    start = before()
    with peak_memory("cpu") as memory:
        view = block(MIB).view(2, -1)[1]
        other = block(MIB)
        other.add_(1)
        del view
        third = block(MIB)
    assert memory.peak_bytes - start == 2 * MIB
    assert third.numel() == MIB


def test_what_a_graph_keeps_counts():
    x = torch.zeros(MIB // 4, requires_grad=True)
    start = before()
    with peak_memory("cpu") as memory:
        y = x.exp()  # kept for the backward pass, as is the next one
        z = y.exp()
        del y
        total = z.sum()
        del z
        more = block(MIB)
    assert memory.peak_bytes - start == 3 * MIB + 4
    del total, more
    assert before() == start


def test_what_came_before_can_go():
    start = before()
    old = block(4 * MIB)
    with peak_memory("cpu") as memory:
        del old
        new = block(3 * MIB)
    assert memory.peak_bytes - start == 4 * MIB
    assert new.numel() == 3 * MIB


def test_tensors_without_numbers_take_nothing():
    start = before()
    with peak_memory("cpu") as memory:
        kept = block(MIB, "meta")
    assert memory.peak_bytes == start
    assert kept.is_meta


def test_what_a_block_adds_counts_without_what_was_there():
    kept, used = block(64 * MIB), block(2 * MIB)
    with added_memory("cpu") as memory:
        made = block(8 * MIB)
        del made
        used += 1
    assert memory.peak_bytes == 8 * MIB
    with added_memory("cpu", [kept]) as memory:
        used += 1
    assert memory.peak_bytes == (64 + 2) * MIB


def test_nothing_is_watched_after_an_error():
    with pytest.raises(ValueError, match="could not convert"), peak_memory("cpu") as memory:
        float("no number")
    peak = memory.peak_bytes
    kept = block(64 * MIB)
    assert memory.peak_bytes == peak
    assert kept.numel() == 64 * MIB


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="cuda and on the cpu, not on meta"):
        peak_memory("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_on_a_gpu():
    kept = block(MIB, "cuda")
    with peak_memory("cuda") as start:
        pass
    big = block(8 * MIB, "cuda")
    del big
    with peak_memory("cuda") as memory:
        first = block(2 * MIB, "cuda")
        second = block(MIB, "cuda")
        del first
        third = block(MIB, "cuda")
    assert memory.peak_bytes - start.peak_bytes == 3 * MIB
    assert kept.numel() == second.numel() == third.numel()
