"""What methods cost: UNet rows, FLOPs and seconds, next to the plain pipeline in the same run."""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention import LoraFactors
from compose.assets import playground_lora, playground_model
from compose.terminal import kindly
from pipelines.base import ComposePipeline
from pipelines.conditioning import TokenMasks
from pipelines.engine import EncodedText, Engine, LoadedConcept
from pipelines.loading import Factors, LoraFile
from pipelines.methods import METHODS, Settings, make_method
from pipelines.scene import Concept, Region

STEPS = 25
SUBJECTS = ("cat", "dog", "rabbit", "bear", "car", "robot")
PROMPT = "sks cat, zwx dog, ohwx rabbit, xlo bear, pll car, qrt robot, a fox and a lion"
# Eight concepts need eight triggers; the last two are ordinary words, which is as good for counting.
EXTRA = (("cat", "fox"), ("dog", "lion"))
# The UNet of Stable Diffusion 1.5, for counting without its weights.
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
RANK = 8


@dataclass(frozen=True)
class Flops:
    """Operations of one denoising step with guidance, and of everything before the second step that comes on top."""

    step: int
    preparation: int


@kindly(logging.ERROR)
def bench(
    methods: Annotated[list[str] | None, typer.Option("--method", help="A method; repeatable. All by default.")] = None,
    concepts: Annotated[
        list[int] | None, typer.Option("--concepts", "-n", help="How many concepts; repeatable.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of runs that are timed.", min=1)] = 7,
    count: Annotated[bool, typer.Option("--count", help="Count rows and FLOPs only; takes no time.")] = False,
    device: Annotated[str, typer.Option(help="Where to time.")] = "cpu",
) -> None:
    """Counts and times methods on the playground, and counts FLOPs on the architecture of Stable Diffusion 1.5."""
    chosen = {name: make_method(name) for name in methods or METHODS}
    numbers = concepts or [1, 2, 4, 8]
    console = Console()
    pipe = ComposePipeline.from_pretrained(playground_model()).to(device)
    pipe.set_progress_bar_config(disable=True)
    for i in range(max(numbers)):
        load_concept(pipe, i)
    console.print(counts_table(pipe, chosen, numbers))
    if not count:
        console.print(seconds_table(pipe, chosen, numbers, pairs))


def load_concept(pipe: Any, i: int) -> None:
    """Loads the i-th concept of the bench into the playground."""
    if i < len(SUBJECTS):
        pipe.load_concept(playground_lora(f"{SUBJECTS[i]}-tara"), name=f"concept {i}")
    else:
        subject, word = EXTRA[(i - len(SUBJECTS)) % len(EXTRA)]
        pipe.load_concept(playground_lora(f"{subject}-tara"), name=f"concept {i}", trigger=word, class_word="")


def playground_concepts(number: int) -> list[Concept]:
    """The first concepts of the bench, each with a column of the picture as its region."""
    return [Concept(name=f"concept {i}", region=region) for i, region in enumerate(columns(number, 128))]


def columns(number: int, side: int) -> list[Region]:
    """Boxes side by side that fill a square picture."""
    return [(side * i // number, 0, side * (i + 1) // number, side) for i in range(number)]


def counts_table(pipe: Any, methods: dict[str, Settings], numbers: Sequence[int]) -> Table:
    """UNet rows of an image and FLOPs of a step, as ratios to the plain pipeline."""
    table = Table(
        title=f"Counted: one image, {STEPS} steps, guidance on; FLOPs of a step relative to the plain pipeline"
    )
    for column in ("method", "concepts", "UNet rows", "FLOPs, playground", "FLOPs, SD 1.5", "preparation, SD 1.5"):
        table.add_column(column, justify="left" if column == "method" else "right")
    plain_small, plain_sd = _plain_flops(pipe.unet), _plain_flops(sd15_unet())
    table.add_row("plain", "0", str(2 * STEPS), "1.000", "1.000", "-")
    for name, settings in methods.items():
        for number in numbers:
            concepts = playground_concepts(number)
            one_step = pipe(PROMPT, concepts=concepts, method=settings, num_inference_steps=1, output_type="latent")
            small = flops(pipe.unet, pipe.resolve_concepts(concepts), settings)
            sd = flops(sd15_unet(), sd15_concepts(number), settings)
            preparation = f"{sd.preparation / plain_sd:.2f} steps"
            ratios = f"{small.step / plain_small:.3f}", f"{sd.step / plain_sd:.3f}"
            table.add_row(name, str(number), f"{one_step.cost.rows_forward * STEPS:g}", *ratios, preparation)
    return table


def seconds_table(pipe: Any, methods: dict[str, Settings], numbers: Sequence[int], pairs: int) -> Table:
    """Seconds of whole calls in interleaved pairs (plain, method, plain, method, ...), as ratios pair by pair."""
    table = Table(
        title=f"Timed on {pipe.device}: whole calls of {STEPS} steps without decoding, {pairs} interleaved pairs"
    )
    for column in ("method", "concepts", "plain, s", "method, s", "ratio: median", "min", "max"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def seconds(**options: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        start = time.perf_counter()
        pipe(
            PROMPT, num_inference_steps=STEPS, output_type="latent", generator=generator, **options
        ).images.sum().item()
        return time.perf_counter() - start

    jobs = [(name, number) for name in methods for number in numbers]
    for name, number in track(jobs, description="timing", transient=True):
        options = {"concepts": playground_concepts(number), "method": methods[name]}
        for warm_up in ({}, options):
            seconds(**warm_up)
        timed = [(seconds(), seconds(**options)) for _ in range(pairs)]
        ratios = [ours / plain for plain, ours in timed]
        plain, ours = (statistics.median(side) for side in zip(*timed, strict=True))
        spread = f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}"
        table.add_row(name, str(number), f"{plain:.2f}", f"{ours:.2f}", *spread)
    return table


def sd15_unet() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5 without numbers, on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15)


def sd15_concepts(number: int) -> list[LoadedConcept]:
    """Concepts of rank 8 on all attention projections of SD 1.5, without numbers."""
    with torch.device("meta"):
        lora = {name: _factors(module) for name, module in sd15_unet().named_modules() if _is_projection(name)}
    file = LoraFile(Path("counted.safetensors"), "", {"method": "tara"}, {})
    return [
        LoadedConcept(Concept(name=f"{i}", trigger="sks", weight=1.0, region=region), Factors(lora), file)
        for i, region in enumerate(columns(number, 512))
    ]


def _is_projection(name: str) -> bool:
    return name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))


def _factors(linear: torch.nn.Module) -> LoraFactors:
    out, inputs = linear.get_parameter("weight").shape
    return LoraFactors(torch.empty(RANK, inputs), torch.empty(out, RANK))


def flops(unet: UNet2DConditionModel, concepts: Sequence[LoadedConcept], settings: Settings) -> Flops:
    """Counts the FLOPs of a method's step on a UNet with or without numbers."""
    device, grid = unet.device, (unet.config["sample_size"],) * 2
    size = (grid[0] * 8, grid[1] * 8)
    tokens, latents, text = _inputs(unet, rows=1)
    mask = torch.eye(tokens, len(concepts))[None]
    engine = Engine(
        {"unet": unet, "scheduler": DDIMScheduler()}, concepts, lambda: EncodedText(text, text),
        TokenMasks(mask, mask), latent_grid=grid, image_size=size, images_per_prompt=1, guidance_scale=5.0,
        guidance_rescale=0.0, device=device, unet_kwargs={},
    )  # fmt: skip
    t = torch.tensor(500, device=device)
    with torch.no_grad():
        process = settings.start(engine)
        with engine.installed():
            with FlopCounterMode(display=False) as first:
                process.prepare(latents)
                process.step(latents, t)
            with FlopCounterMode(display=False) as second:
                process.step(latents, t)
    return Flops(second.get_total_flops(), first.get_total_flops() - second.get_total_flops())


def _plain_flops(unet: UNet2DConditionModel) -> int:
    _, latents, text = _inputs(unet, rows=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latents, torch.tensor(500, device=unet.device), encoder_hidden_states=text)
    return counter.get_total_flops()


def _inputs(unet: UNet2DConditionModel, rows: int) -> tuple[int, Tensor, Tensor]:
    """Number of tokens, latents and text for a UNet."""
    tokens = 77 if unet.config["cross_attention_dim"] >= 768 else 32
    size = unet.config["sample_size"]
    latents = torch.zeros(rows, unet.config["in_channels"], size, size, device=unet.device)
    return tokens, latents, torch.zeros(rows, tokens, unet.config["cross_attention_dim"], device=unet.device)
