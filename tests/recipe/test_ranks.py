"""Trainings on two processes take the mean gradient and stop together; one process alone needs nothing of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from recipe.ranks import average_gradients, of_first, rank, ranks

SCRIPT = """
import torch
from torch.nn import Parameter
from recipe.muon import Muon, orthogonalised
from recipe.ranks import average_gradients, of_first, rank, ranks, start_ranks
start_ranks()
one, other, frozen = Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(4)), Parameter(torch.zeros(1))
one.grad, other.grad = torch.full((2, 3), float(rank())), torch.arange(4.0) * (1 + 2 * rank())
average_gradients([one, other, frozen])
assert frozen.grad is None
torch.testing.assert_close(one.grad, torch.full((2, 3), 0.5))
torch.testing.assert_close(other.grad, torch.arange(4.0) * 2)
assert (ranks(), of_first(7.0 + rank())) == (2, 7.0)
matrix, kernel = Parameter(torch.zeros(3, 5)), Parameter(torch.zeros(4, 2, 3, 3))
matrix.grad, kernel.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2, 3, 3)
Muon([matrix, kernel], lr=0.5, momentum=0.0).step()
torch.testing.assert_close(matrix.detach(), -0.5 * orthogonalised(matrix.grad))
torch.testing.assert_close(kernel.detach().flatten(1), -0.5 * orthogonalised(kernel.grad.flatten(1)))
print(f"fine {rank()}\\n", end="")  # in one piece: both write to one pipe
"""


def test_a_process_alone_keeps_its_gradients() -> None:
    weight = Parameter(torch.zeros(3))
    weight.grad = torch.arange(3.0)
    average_gradients([weight])
    torch.testing.assert_close(weight.grad, torch.arange(3.0))
    assert (rank(), ranks(), of_first(2.5)) == (0, 1, 2.5)


@pytest.mark.slow
def test_two_processes_have_the_mean_gradient_the_same_step_and_the_first_ones_clock(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT, "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    assets = Path(__file__).resolve().parents[2] / "assets"
    done = subprocess.run(
        command, env={"PYTHONPATH": str(assets), "PATH": ""}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("fine")) == ["fine 0", "fine 1"]
