"""Tiny random models of ComfyUI's own classes, sampled by its own KSampler: for tests that are run with `-m comfyui`.

The environment variable COMFYUI_PATH is a checkout of ComfyUI.
"""
# ruff: noqa: C408, E402

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

if not os.environ.get("COMFYUI_PATH"):
    raise RuntimeError("set COMFYUI_PATH to a checkout of ComfyUI: make comfyui COMFYUI_PATH=...")
sys.path.insert(0, os.environ["COMFYUI_PATH"])

from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

args.cpu = True  # before anything else of ComfyUI looks for a device

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.sample  # pyright: ignore[reportMissingImports]
import comfy.supported_models  # pyright: ignore[reportMissingImports]

from lora_compose.compose.comfyui.composition import Composition
from lora_compose.compose.comfyui.files import read_concept

logging.getLogger().setLevel(logging.ERROR)  # ComfyUI's log
GRID, WIDTH, TOKENS = (12, 16), 16, 8
CPU = torch.device("cpu")


def unet(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None, *, xl: bool = False) -> Any:
    """Stable Diffusion 1.x, or XL."""
    config = dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=(1, 2),
        transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, legacy=False,
        use_spatial_transformer=True, context_dim=WIDTH, use_linear_in_transformer=xl, use_temporal_attention=False,
        adm_in_channels=6 * 256 + 8 if xl else None, num_classes="sequential" if xl else None,
    )  # fmt: skip
    family = (comfy.supported_models.SDXL if xl else comfy.supported_models.SD15)(config)
    family.unet_config |= {"num_heads": 2, "num_head_channels": -1}
    return patcher_of(family, dtype, cast)


def sdxl(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    return unet(dtype, cast, xl=True)


def flux(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> Any:
    from comfy.ldm.flux.model import FluxParams  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = dict(
        image_model="flux", in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=WIDTH, hidden_size=32,
        mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True,
    )  # fmt: skip
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []
    return patcher_of(comfy.supported_models.Flux(config), dtype, cast)


FAMILIES = {"sd": unet, "sdxl": sdxl, "flux": flux}


def patcher_of(family: Any, dtype: torch.dtype, cast: torch.dtype | None) -> Any:
    family.set_inference_dtype(dtype, cast)
    torch.manual_seed(0)
    model = family.get_model({}, "")
    for name, weight in model.named_parameters():
        last = name.endswith(("out.2.weight", "final_layer.linear.weight"))
        if weight.dim() > 1:
            random = torch.randn(weight.shape) * weight[0].numel() ** -0.5 * (0.1 if last else 1)
        else:
            random = torch.randn(weight.shape) * 0.05 + ("bias" not in name)
        weight.data = random.to(dtype)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def tensors_of(patcher: Any, seed: int, rank: int = 3) -> dict[str, Tensor]:
    """A LoRA of all layers, by ComfyUI's own names."""
    torch.manual_seed(seed)
    found = {}
    for name, layer in patcher.model.diffusion_model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            inputs = (layer.in_channels, *layer.kernel_size) if isinstance(layer, nn.Conv2d) else (layer.in_features,)
            ones, start = [1] * (len(inputs) - 1), f"diffusion_model.{name}"
            found[f"{start}.lora_down.weight"] = torch.randn(rank, *inputs) * torch.Size(inputs).numel() ** -0.5
            found[f"{start}.lora_up.weight"] = torch.randn(layer.weight.shape[0], rank, *ones) * 0.7
            found[f"{start}.alpha"] = torch.tensor(2.0)
    return found


def read(patcher: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The factors of a file with these tensors, as the nodes read it."""
    path = folder / f"{len([*folder.iterdir()])}.safetensors"
    save_file(dict(tensors), path)
    return read_concept(path, patcher.model.diffusion_model, comfy.lora.model_lora_keys_unet(patcher.model, {}))[0]


def text(seed: int, tokens: int = TOKENS) -> list[list[Any]]:
    """A conditioning."""
    torch.manual_seed(seed)
    return [[torch.randn(1, tokens, WIDTH), {"pooled_output": torch.randn(1, 8)}]]


def drawn(
    patcher: Any,
    positive: list,
    negative: list,
    cfg: float = 4.0,
    batch: int = 1,
    sampler: str = "euler",
    grid: tuple[int, int] = GRID,
    steps: int = 3,
) -> Tensor:
    """Latents, by ComfyUI's KSampler."""
    latents = torch.zeros(batch, 4, *grid)
    noise = comfy.sample.prepare_noise(latents, 7)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        return comfy.sample.sample(
            patcher, noise, steps, cfg, sampler, "normal", positive, negative, latents, disable_pbar=True, seed=7
        )


class Reference:
    """Dense deltas by plain hooks, one conditioning at a time: it knows no sites, levels, ranks or bank.

    Masks follow from the shapes of outputs, our conditioning is known by its numbers.
    """

    def __init__(self, patcher: Any, plan: Composition, positive: list, masks: Sequence[Tensor | None]) -> None:
        self.plan, self.masks, self.mine = plan, masks, positive[0][0]
        self.model, self.patcher = patcher.model.diffusion_model, patcher.clone()
        self.patcher.set_model_unet_function_wrapper(self.each)
        self.ours, self.tokens, self.grid = False, 0, GRID

    @contextmanager
    def hooked(self) -> Iterator[Any]:
        deltas = [{name: factors.delta() for name, factors in lora.items()} for lora in self.plan.loras]
        handles = []
        for name in {name for lora in deltas for name in lora}:

            def hook(layer: nn.Module, given: tuple, out: Tensor, name: str = name) -> Tensor:
                return self.added(name, layer, given[0], out, deltas)

            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        try:
            yield self.patcher
        finally:
            for handle in handles:
                handle.remove()

    def draw(self, positive: list, negative: list, **options: Any) -> Tensor:
        self.grid = options.get("grid", GRID)
        with self.hooked() as patcher:
            return drawn(patcher, positive, negative, **options)

    def each(self, apply: Any, given: Any) -> Tensor:
        parts, chunks, length = [], len(given["cond_or_uncond"]), self.mine.shape[1]
        size = len(given["input"]) // chunks
        for i in range(chunks):
            rows = slice(i * size, (i + 1) * size)
            c = {name: x[rows] if torch.is_tensor(x) else x for name, x in given["c"].items()}
            read = c["c_crossattn"]
            self.ours = read.shape[1] >= length and torch.equal(read[:1, :length], self.mine)
            if self.ours:
                c["c_crossattn"] = read[:, :length]  # ComfyUI repeats shorter texts
            self.tokens = c["c_crossattn"].shape[1]
            parts.append(apply(given["input"][rows], given["timestep"][rows], **c))
        return torch.cat(parts)

    def added(self, name: str, layer: Any, x: Tensor, out: Tensor, deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
        for n, lora in enumerate(deltas):
            if name in lora:
                delta = lora[name].to(x.dtype)
                conv = delta.dim() == 4
                change = F.conv2d(x, delta, None, layer.stride, layer.padding) if conv else F.linear(x, delta)
                gate = self.gate(name, n, out)
                out = out + (self.plan.weights[n] * gate * change).to(out.dtype)
        return out

    def gate(self, name: str, n: int, out: Tensor) -> Tensor | float:
        on_image = self.ours or self.plan.image_of_others
        on_text = self.ours or self.plan.text_of_others
        mask = self.masks[n]
        if re.search(r"time_embed|label_emb|emb_layers", name):
            return float(on_image)
        if re.search(r"(time|vector|guidance)_in|_mod\.|modulation|adaLN", name):
            return float(on_image and mask is None)
        # On other conditionings only methods without token gates act, and on all tokens.
        words = self.plan.words[:, n, None].expand(-1 if len(self.plan.words) > 1 else self.tokens, 1)
        words = words if self.ours else torch.full((self.tokens, 1), float(words.mean()))
        if re.search(r"attn2\.to_[kv]|txt_", name):
            return words * float(on_text)
        if out.dim() == 4:
            return self.small(mask, out.shape[2:]) * float(on_image)
        single = name.startswith("single")
        cells = out.shape[1] - (self.tokens if single else 0)
        grid = next(grid for grid in self.grids() if grid[0] * grid[1] == cells)
        here = self.small(mask, grid).flatten()[:, None] * float(on_image)
        return torch.cat([words * float(on_text), here]) if single else here

    def grids(self) -> Iterator[tuple[int, int]]:
        height, width = self.grid
        for _ in range(4):
            yield height, width
            height, width = -(-height // 2), -(-width // 2)

    def small(self, mask: Tensor | None, grid: Sequence[int]) -> Tensor:
        if mask is None:
            return torch.ones(*grid)
        mean = F.adaptive_avg_pool2d(mask[None], (grid[0], grid[1]))[0]
        return mean / mean.max().clamp(min=1e-9)
