"""Counts a call while it runs, for transformers, which have no copy on the meta device."""

from typing import Any

from lora_compose.compose.benchmark.counting import Counted
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.compose.benchmark.outside import around_passes
from lora_compose.compose.generate.making import make_batch
from lora_compose.pipelines.scene.scene import Run


def needs_running(pipe: Any) -> bool:
    """Whether the calls of a pipeline are counted by running one: `count_run` supports UNets only."""
    return "unet" not in pipe.components


def count_by_running(pipe: Any, run: Run) -> Counted:
    """Makes one image of a run, and counts the operations in all passes of the model."""
    operations, rows = Operations(), [0]

    def begin(model: Any, positional: tuple, named: dict[str, Any]) -> None:
        latents = named.get("hidden_states", positional[0] if positional else ())
        rows[0] += len(latents)
        operations.__enter__()

    def end(*_: Any) -> None:
        operations.__exit__(None, None, None)

    with around_passes(pipe.model, begin, end):
        cost = make_batch(pipe, run, (run.seed,)).cost
    if cost is None:
        return Counted(rows[0], 0.0, 0.0, operations.flops, 0)
    return Counted(cost.rows_forward, cost.rows_stopped, cost.rows_backward, operations.flops, 0)
