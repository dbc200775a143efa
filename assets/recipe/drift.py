"""How far the transformer's velocity is from its teacher's, on the teacher's way from noise to image and on its own.

    PYTHONPATH=assets python -m recipe.drift UNET_MODEL FLUX

A training on noised images makes the first small. Where the second is larger, errors add up from step to step, which
training on its own images mends (`rollouts.py`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from diffusers import FluxPipeline, StableDiffusionPipeline
from torch import Tensor

from lora_compose.attention.backbones.joint import image_positions, packed, unpacked
from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.plain import GUIDANCE, PROMPTS, STEPS
from recipe.teacher import Teacher
from recipe.transformer import MAX_TOKENS
from recipe.world import SIZE

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Noise minus image, of latents at times."""


class Drift(NamedTuple):
    """Mean squared differences from the teacher's velocity at a time.

    Attributes:
        time: From 1, noise, to 0.
        taught: On the teacher's way.
        own: On the transformer's.
    """

    time: float
    taught: float
    own: float


@torch.no_grad()
def drifts(student: Velocity, teacher: Velocity, noise: Tensor, steps: int) -> Iterator[Drift]:
    """The differences before each of so many Euler steps, both from the same noise."""
    taught = own = noise
    for step in range(steps):
        time = 1 - step / steps
        times = torch.full((len(noise),), time)
        right, mine = teacher(taught, times), student(own, times)
        differences = ((student(taught, times) - right), (mine - teacher(own, times)))
        yield Drift(time, *(float(each.square().mean()) for each in differences))
        taught, own = taught - right / steps, own - mine / steps


@torch.no_grad()
def velocity_of(pipe: FluxPipeline, prompts: list[str]) -> Velocity:
    """The velocity that a transformer predicts for prompts, with guidance as an input."""
    text, pooled, text_ids = pipe.encode_prompt(prompts, None, max_sequence_length=MAX_TOKENS)  # pyright: ignore[reportArgumentType]
    guidance = torch.full((len(prompts),), GUIDANCE)
    transformer: Any = pipe.transformer

    def predicted(latents: Tensor, times: Tensor) -> Tensor:
        velocity = transformer(
            packed(latents), text, pooled, times, img_ids=image_positions(latents), txt_ids=text_ids,
            guidance=guidance, return_dict=False,
        )[0]  # fmt: skip
        return unpacked(velocity, latents.shape[2:])

    return predicted


@handle_errors()
def main(
    base: Annotated[Path, typer.Argument(help="The UNet's model.")],
    flux: Annotated[Path, typer.Argument(help="The transformer's.")],
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Prints a table by time, for the plain prompts of `recipe.plain`."""
    parts: dict[str, Any] = {"dtype": torch.float32, "safety_checker": None}
    teacher = Teacher(StableDiffusionPipeline.from_pretrained(base, **parts))
    pipe = FluxPipeline.from_pretrained(flux, dtype=torch.float32)
    prompts, channels, side = [*PROMPTS], pipe.vae.config.latent_channels, SIZE // 8
    noise = torch.randn(len(prompts), channels, side, side, generator=torch.Generator().manual_seed(seed))
    guidance = torch.full((len(prompts),), GUIDANCE)

    def right(latents: Tensor, times: Tensor) -> Tensor:
        return teacher.velocity(latents, times, prompts, guidance)

    echo(f"difference from the teacher's velocity, {len(prompts)} prompts, guidance {GUIDANCE:g}")
    echo("  time   on its way   on the transformer's")
    for number, drift in enumerate(drifts(velocity_of(pipe, prompts), right, noise, STEPS)):
        if number % 3 == 0:
            echo(f"{drift.time:6.2f} {drift.taught:12.3f} {drift.own:22.3f}")


if __name__ == "__main__":
    typer.run(main)
