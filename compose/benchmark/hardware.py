"""What models of full size need: GiB and FLOPs of whole images, without weights, and graphics cards for many images.

Text encoders count their weights, the denoiser its weights, two LoRAs with `regional` and one pass, the VAE all that
decoding keeps. Not counted is what the device's libraries and allocator take for themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from rich.table import Table
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from lora_compose.compose.benchmark import counting
from lora_compose.compose.benchmark.architectures import (
    ARCHITECTURES,
    QWEN3_4B,
    RANK,
    VAE,
    attention_lora,
    columns,
    with_lora,
    without_weights,
)
from lora_compose.compose.benchmark.peaks import decoding_bytes, peak
from lora_compose.compose.benchmark.tables import GIB, new_table
from lora_compose.compose.benchmark.transformers import pass_cost
from lora_compose.pipelines.families.quantised import SMALL_TEXT_ENCODERS
from lora_compose.pipelines.methods import Regional

CONCEPTS, SIDE = 2, 1024
NF4_BITS, INT8_BITS = 4.5, 8.5
"""Bits of a weight with its scale: a float32 for 64 weights (bitsandbytes' nf4), a float16 for 32 (GGUF's Q8_0)."""

_QWEN3_VL_4B: Mapping[str, Any] = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
_MORE_TEXT: Mapping[str, Callable[[], nn.Module]] = {
    "Krea 2": lambda: Qwen3VLModel(Qwen3VLConfig(text_config=dict(QWEN3_4B), vision_config=dict(_QWEN3_VL_4B))),
}
"""Text encoders that LoRA files leave alone. Source: `text_encoder/config.json` of Krea-2-Turbo (Qwen3-VL-4B)."""
_STEPS = {"SD 1.5": (50, 2), "SDXL": (50, 2), "FLUX.1": (28, 1), "Krea 2": (28, 2), "Z-Image": (50, 2)}
"""Steps of diffusers' default call, and passes of each: two with classifier-free guidance."""
MODELS = tuple(_STEPS)


CARDS = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100": 989}
"""Dense TFLOPS of the tensor cores in half precision with sums in float32, as NVIDIA's data sheets have them."""
SHARE = 0.3
"""Share of the peak that generation is assumed to reach; an assumption, not a measurement."""
REQUESTS = 1000
"""Images a minute that `capacity_table` is for."""
BANDWIDTH = {"RTX 3090": 936, "RTX 4090": 1008, "A100": 2039, "H100": 3350}
"""GB/s of memory by card, as NVIDIA's data sheets have them (RTX: 384 bits at 19.5 and 21 Gbit/s; A100 with 80 GB; H100
SXM)."""


@dataclass(frozen=True)
class Need:
    """What a model needs for one image of its own size, in bytes and FLOPs.

    Attributes:
        text: Text encoders in half precision.
        text_int8: Text encoders with linear layers of all but CLIP's in 8 bits.
        weights: The denoiser in half precision.
        denoiser: The denoiser in half precision with LoRAs and one pass.
        int8: The denoiser with LoRAs and one pass, linear layers in 8 bits.
        nf4: The denoiser with LoRAs and one pass, linear layers in 4 bits.
        opening_nf4: Text encoders but CLIP's, and the denoiser, with linear layers in 4 bits.
        blocks: The denoiser in half precision with LoRAs and one pass, one block on the device; None for UNets.
        decoding: The VAE while it decodes.
        vae: The VAE alone.
        steps: Of diffusers' default call.
        flops: Of all its steps.
    """

    text: int
    text_int8: int
    weights: int
    denoiser: int
    int8: int
    nf4: int
    opening_nf4: int
    blocks: int | None
    decoding: int
    vae: int
    steps: int
    flops: int

    @property
    def together(self) -> int:
        """Bytes with all models on the device."""
        return self.text + max(self.denoiser + self.vae, self.weights + self.decoding)

    @property
    def apart(self) -> int:
        """Bytes with one model on the device at a time (`model-offload`)."""
        return max(self.text, self.denoiser, self.decoding)

    @property
    def apart_fp8(self) -> int:
        """Bytes with one model on the device at a time, the denoiser in 8 bits (`--quantize fp8`, or a file)."""
        return max(self.text, self.int8, self.decoding)

    @property
    def apart_int8(self) -> int:
        """Bytes with one model at a time, denoiser and large text encoders in 8 bits (`--quantize int8`)."""
        return max(self.text_int8, self.int8, self.decoding)

    @property
    def apart_nf4(self) -> int:
        """Bytes with one model at a time, in 4 bits (`--quantize nf4`); bitsandbytes opens all on the device."""
        return max(self.opening_nf4, self.nf4, self.decoding)


def need(model: str) -> Need:
    """Computes what one of `MODELS` needs."""
    steps, passes = _STEPS[model]
    if model in ARCHITECTURES:
        family = {"SD 1.5": "SD 1.x"}.get(model, model)
        unet = counting.meta_unet(ARCHITECTURES[model]).half()
        side = unet.config["sample_size"] * 8
        concepts = with_lora(columns(CONCEPTS, side, side), attention_lora(unet))
        most = peak(unet, concepts, Regional(), 1, 5.0, (side, side))
        denoiser, whole, blocks, flops = unet, most.peak_bytes, None, most.flops * steps
    else:
        family, side = model, SIDE
        denoiser = without_weights(model).transformer.bfloat16()
        cost = pass_cost(denoiser, CONCEPTS, RANK, (side // 8, side // 8))
        whole, blocks, flops = cost.peak_bytes, cost.offloaded_bytes, cost.flops * passes * steps
    decoder = _vae(model, side)
    encoders = _encoders(family)
    large = [encoder for encoder in encoders if type(encoder).__name__ not in SMALL_TEXT_ENCODERS]
    opening = sum(_less(_half(model), [model], NF4_BITS) for model in (*large, denoiser))
    text = sum(map(_half, encoders))
    return Need(
        text=text, text_int8=_less(text, large, INT8_BITS), weights=_bytes(denoiser), denoiser=whole,
        int8=_less(whole, [denoiser], INT8_BITS), nf4=_less(whole, [denoiser], NF4_BITS), opening_nf4=opening,
        blocks=blocks, decoding=decoding_bytes(decoder, (side, side)), vae=_bytes(decoder), steps=steps, flops=flops,
    )  # fmt: skip


def _less(size: int, models: Sequence[nn.Module], bits: float) -> int:
    """A size with the linear layers of some models in fewer bits than 16."""
    layers = (layer for model in models for layer in model.modules() if isinstance(layer, nn.Linear))
    return round(size - sum(layer.weight.numel() for layer in layers) * (2 - bits / 8))


def _half(model: nn.Module) -> int:
    return sum(parameter.numel() * 2 for parameter in model.parameters())


def _encoders(family: str) -> list[nn.Module]:
    """The text encoders of a model."""
    encoders = [part for name, part in vars(without_weights(family)).items() if name.startswith("text_encoder")]
    with torch.device("meta"):
        return encoders + ([_MORE_TEXT[family]()] if family in _MORE_TEXT else [])


def _vae(model: str, side: int) -> AutoencoderKL | AutoencoderKLQwenImage:
    """SDXL's decodes in float32, as its configuration asks, the others in half precision."""
    with torch.device("meta"):
        if model == "Krea 2":
            return AutoencoderKLQwenImage().bfloat16().eval()
        latent = {} if model in ARCHITECTURES else {"latent_channels": 16, "use_quant_conv": False}
        vae = AutoencoderKL(**dict(VAE) | latent, sample_size=side).eval()
        return vae if model == "SDXL" else vae.half()


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def needs_table(needs: Mapping[str, Need]) -> Table:
    """GiB by model and by way to save memory."""
    table = new_table(
        f"Computed: GiB for one image, two LoRAs of rank {RANK} with regional; half precision where nothing else is "
        "said; offload and what follows: one model on the device at a time; blocks: one block of the denoiser",
        ["model", "text", "denoiser", "decoding", "all", "offload", "fp8", "int8", "nf4", "blocks"],
    )
    for model, it in needs.items():
        sizes = (
            it.text, it.denoiser, it.decoding, it.together, it.apart, it.apart_fp8, it.apart_int8, it.apart_nf4
        )  # fmt: skip
        blocks = "-" if it.blocks is None else f"{it.blocks / GIB:.1f}"
        table.add_row(model, *(f"{size / GIB:.1f}" for size in sizes), blocks)
    return table


def seconds_table(needs: Mapping[str, Need]) -> Table:
    """Seconds of an image by card."""
    table = new_table(
        f"Estimated: seconds for one image with diffusers' default steps: counted FLOPs by {SHARE:.0%} of the peak "
        "that the card's data sheet has for half precision; not measured",
        ["model", "steps", "TFLOP", *CARDS],
    )
    for model, it in needs.items():
        times = (it.flops / (tera * 1e12 * SHARE) for tera in CARDS.values())
        shown = (f"{time:.1f}" if time < 10 else f"{time:.0f}" for time in times)
        table.add_row(model, str(it.steps), f"{it.flops / 1e12:.0f}", *shown)
    return table


def seconds(need: Need, card: str) -> float:
    """Seconds of an image: of FLOPs, or of reading the denoiser's weights once in each step, whichever is more."""
    arithmetic = need.flops / (CARDS[card] * 1e12)
    reading = need.steps * need.weights / (BANDWIDTH[card] * 1e9)
    return max(arithmetic, reading) / SHARE


def capacity_table(needs: Mapping[str, Need]) -> Table:
    """Cards that `REQUESTS` images a minute keep busy, by model."""
    table = new_table(
        f"Estimated: cards for {REQUESTS} images a minute with two LoRAs and regional, at {SHARE:.0%} of the peak in "
        "half precision and of the memory's bandwidth, whichever takes longer; text and decoding are not in it",
        ["model", "TFLOP", "TB read", *CARDS],
    )
    for model, it in needs.items():
        cards = (REQUESTS / 60 * seconds(it, card) for card in CARDS)
        read = it.steps * it.weights / 1e12
        table.add_row(model, f"{it.flops / 1e12:.0f}", f"{read:.2f}", *(f"{number:.0f}" for number in cards))
    return table
