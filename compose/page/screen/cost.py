"""Costs of images: in seconds, and relative to a plain image; passes are in the help."""

from lora_compose.compose.check.report import RunCost
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.work import Result

_ROW = "A row is one image through the whole model, once; a plain image with guidance takes two per step."


def cost_words(session: PageSession, cost: RunCost) -> str:
    """The estimated seconds of an image, and the ratio to one without concepts."""
    times = f"{cost.flops / cost.plain_flops:.1f} times a plain image"
    speed = session.model.seconds_per_flop
    if speed is None:
        return f"Takes {times}; how many seconds is known after the first one"
    return f"Takes about {seconds_words(speed * cost.flops)}, {times}"


def cost_help(cost: RunCost, steps: int) -> str:
    """The passes behind that."""
    return f"{cost.rows} latent rows in {steps} steps, {cost.flops / 1e12:.3g} TFLOPs. {_ROW}"


def result_cost(result: Result) -> str | None:
    """The passes that an image took; None without concepts."""
    return None if result.cost is None else f"{result.cost.words} latent rows{result.cost.each}. {_ROW}"


def seconds_words(seconds: float) -> str:
    """A time as short text."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
