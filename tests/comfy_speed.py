"""Seconds per step in ComfyUI: the base model, its own ways to load LoRAs, and ours, side by side in one run.

`COMFYUI_PATH=... PYTHONPATH=tests python -m comfy_speed` prints a table. The UNet is built like that of SD 1.5, with
random weights, in fp32 on the CPU. The rows take turns, so that a slow minute of the machine is in all of them.
"""
# ruff: noqa: C408

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import comfy_models as core

# isort: split
# Found once comfy_models has put ComfyUI on the path, and chosen the CPU.
import comfy.hooks  # pyright: ignore[reportMissingImports]
import comfy.sample  # pyright: ignore[reportMissingImports]
import comfy.sd  # pyright: ignore[reportMissingImports]
import comfy.supported_models  # pyright: ignore[reportMissingImports]
import comfyui_version  # pyright: ignore[reportMissingImports]

from lora_compose.compose.comfyui.composition import ComposedConcepts
from lora_compose.compose.comfyui.hooks import compose, marked
from lora_compose.pipelines.scene.strength import WeightSchedule

TOKENS, RANK, CFG, SHARE = 77, 16, 7.0, 0.02


@dataclass(frozen=True, eq=False)
class Way:
    """A model and its conditionings, as nodes make them, with what was measured.

    Attributes:
        steps: Seconds of each step but the first of a sampling.
        samplings: Seconds of each sampling beyond its steps: putting LoRAs in and out, and changes in the first step.
        rows: Rows of latents that went through the UNet.
    """

    name: str
    model: Any
    positive: list
    negative: list
    steps: list[float] = field(default_factory=list)
    samplings: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def sd15(width: int) -> Any:
    """SD 1.5's UNet; its width is 320."""
    config: dict[str, Any] = dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=width, num_res_blocks=[2, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1, channel_mult=(1, 2, 4, 4), legacy=False, use_spatial_transformer=True,
        context_dim=768, use_linear_in_transformer=False, use_temporal_attention=False, adm_in_channels=None,
    )  # fmt: skip
    family = comfy.supported_models.SD15(config)
    family.unet_config |= {"num_heads": 8, "num_head_channels": -1}
    return core.patcher_of(family, torch.float32, None)


def lora(patcher: Any, seed: int) -> dict[str, Tensor]:
    """A LoRA of the layers that trainers choose by default: those of transformer blocks."""
    every = core.tensors_of(patcher, seed, RANK)
    return {
        key: tensor * SHARE if "lora_up" in key else tensor for key, tensor in every.items() if "transformer_" in key
    }


def text(seed: int) -> list[list[Any]]:
    return [[torch.randn(1, TOKENS, 768, generator=torch.Generator().manual_seed(seed)), {}]]


def ways(patcher: Any, side: int, folder: Path) -> Sequence[Way]:
    """The rows of the table. Two LoRAs act in the left and in the right half."""
    positive, negative, tensors = text(1), text(2), [lora(patcher, seed) for seed in (1, 2)]
    halves = [torch.zeros(side, side), torch.zeros(side, side)]
    halves[0][:, : side // 2], halves[1][:, side // 2 :] = 1, 1
    found = [Way("base model", patcher, positive, negative)]
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        bypass = comfy.sd.load_bypass_lora_for_models(patcher, None, tensors[0], 1.0, 0)[0]
        found.append(Way("ComfyUI: one bypass LoRA", bypass, positive, negative))
    loras = [core.read(patcher, one, folder) for one in tensors]
    plan = ComposedConcepts(loras, [WeightSchedule.of(1.0)] * 2, halves, torch.ones(1, 2))
    found.append(
        Way("ours: two LoRAs in regions (`regional`)", compose(patcher, plan), marked(positive, plan), negative)
    )
    hooked, masked = patcher, []
    for one, half in zip(tensors, halves, strict=True):
        hooked, _, group = comfy.hooks.load_hook_lora_for_models(hooked, None, one, 1.0, 0)
        mine = comfy.hooks.set_hooks_for_conditioning(positive, group)
        masked += comfy.hooks.set_mask_for_conditioning(mine, half, "default", 1.0)
    return [*found, Way("ComfyUI: two LoRA hooks by mask", hooked, masked, negative)]


def measure(way: Way, side: int, steps: int) -> Tensor:
    """Samples once; the latents."""
    latents, at = torch.zeros(1, 4, side, side), []

    def count(_: Any, given: tuple) -> None:
        way.rows.append(len(given[0]))

    handle = way.model.model.diffusion_model.register_forward_pre_hook(count)
    start = time.perf_counter()
    noise = comfy.sample.prepare_noise(latents, 7)
    with torch.inference_mode():
        out = comfy.sample.sample(
            way.model, noise, steps, CFG, "euler", "normal", way.positive, way.negative, latents,
            callback=lambda *_: at.append(time.perf_counter()), disable_pbar=True, seed=7,
        )  # fmt: skip
    whole = time.perf_counter() - start
    handle.remove()
    each = [after - before for before, after in pairwise(at)]
    way.steps.extend(each)
    way.samplings.append(whole - steps * statistics.median(each))
    return out


def compare(side: int, steps: int, rounds: int, width: int) -> Sequence[Way]:
    """Every row in turn, after a first sampling of each that is not counted."""
    with TemporaryDirectory() as folder:
        found = ways(sd15(width), side, Path(folder))
    for way in found:
        measure(way, side, 2)
        for measured in (way.steps, way.samplings, way.rows):
            measured.clear()
    for _ in range(rounds):
        for way in found:
            measure(way, side, steps)
    return found


def table(found: Sequence[Way], samplings: int, steps: int) -> str:
    """Medians, and the range of the steps."""
    base = statistics.median(found[0].steps)
    lines = ["| | rows per step | seconds per step | of the base model | more per sampling |", "|---|---|---|---|---|"]
    for way in found:
        step = statistics.median(way.steps)
        cells = (
            way.name,
            f"{sum(way.rows) / samplings / steps:g}",
            f"{step:.2f} ({min(way.steps):.2f} to {max(way.steps):.2f})",
            f"{step / base:.2f}",
            f"{statistics.median(way.samplings):.2f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="comfy_speed", description=__doc__)
    parser.add_argument("--side", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--steps", type=int, default=4, help="steps of a sampling; the first is not counted")
    parser.add_argument("--rounds", type=int, default=5, help="samplings of each row")
    parser.add_argument("--width", type=int, default=320, help="channels of the UNet; SD 1.5's are 320")
    given = parser.parse_args(arguments)
    if given.steps < 2:
        parser.error("--steps is at least 2, since the first step is not counted")
    found = compare(given.side, given.steps, given.rounds, given.width)
    size = sum(weight.numel() for weight in found[0].model.model.parameters()) / 1e6
    print(
        f"ComfyUI {comfyui_version.__version__}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores ({platform.machine()}); a UNet of {size:.0f} million weights in fp32, latents of "
        f"{given.side} x {given.side}, guidance, LoRAs of rank {RANK}; {given.rounds} samplings of {given.steps} "
        "steps\n"
    )
    print(table(found, given.rounds, given.steps))


if __name__ == "__main__":
    main()
