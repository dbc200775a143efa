"""What a suite costs before it starts: two of its images are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_compose.compose.evaluation.batches import Batch, batches
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.evaluation.worker import Images, Worker
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.images import png_bytes
from lora_compose.compose.generate.processes import own_device


@dataclass(frozen=True)
class Tried:
    """An image that was made to see what the whole costs."""

    arm: str
    path: Path
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Estimate:
    """What a suite costs: images, FLOPs as counted, and seconds at the pace of the images that were tried."""

    images: int
    flops: int
    seconds: float
    tried: tuple[Tried, ...]


def estimate(suite: Suite, out: Path) -> Estimate:
    """Makes and scores two images, of the baseline and of the first other method, and counts the rest.

    Raises:
        ValueError: If something cannot be opened, or one of the two cannot be made.
    """
    worker = Worker.open(suite, own_device(suite.device))
    tried, flops, seconds = [], 0, 0.0
    for batch in _two(suite):
        for result in worker.do(batch):
            if isinstance(result, Images):
                path = out / "smoke" / f"{batch.arm.name}.png"
                write_whole(path, png_bytes(result.made[0].image, result.made[0].record))
                tried.append(Tried(batch.arm.name, path, result.cost.seconds, result.cost.peak_bytes))
                flops, seconds = flops + result.cost.flops, seconds + result.cost.seconds
            elif (error := getattr(result, "error", None)) is not None:
                raise ValueError(f"{batch.arm.name}, scene {batch.scene.name!r}: {error}")
    every = list(batches(suite))
    whole = sum(worker.count(batch).flops * len(batch.seeds) for batch in every)
    return Estimate(sum(len(batch.seeds) for batch in every), whole, seconds * whole / flops, tuple(tried))


def _two(suite: Suite) -> Sequence[Batch]:
    small = suite.model_copy(update={"scenes": suite.scenes[:1], "seeds": suite.seeds[:1]})
    methods = [batch for batch in batches(small) if batch.arm.method is not None]
    baseline = [batch for batch in methods if batch.arm.name == suite.baseline]
    return [*baseline, *(batch for batch in methods if batch.arm.name != suite.baseline)][:2]
