"""What a golden run is: a family of small pipelines, a method, and the arguments of a call."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from all_transformers import EVERY
from components import EVERYTHING, FAMILIES, lora_tensors, random_lora, seeded, text_loras
from lora_compose import ComposePipeline, Concept
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines.methods import make_method
from transformer_families import TOKENS, as_file, lokr_of_all, random_lora_of_all

PROMPT = "a sks cat and a zwx dog on grass"
LEFT, RIGHT, WIDE = (0, 0, 60, 128), (64, 10, 128, 120), (30, 20, 128, 128)
BOXES = {"cat": LEFT, "dog": RIGHT}


@dataclass(frozen=True)
class Golden:
    """One run.

    Attributes:
        family: A name in `PIPELINES`.
        method: Its name.
        settings: What differs from the defaults.
        fields: Fields of the concepts, by name.
        arguments: Of the call.
        scheduler: In place of the pipeline's own.
        cheap: Whether the default suite runs it.
    """

    family: str
    method: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"cat": {}, "dog": {}})
    arguments: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    cheap: bool = False

    def latents(self) -> Tensor:
        """What the run gives. Shape: [images, channels, height, width]."""
        pipe = PIPELINES[self.family]()
        given: dict[str, Any] = {
            "prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent",
            "generator": seeded(3), "height": 128, "width": 128,
        }  # fmt: skip
        if self.family in EVERY:
            del given["guidance_scale"]  # which each family means in its own way
            given |= {"max_sequence_length": TOKENS, **EVERY[self.family].unguided}
        made = {name: value(pipe) if callable(value) else value for name, value in self.arguments.items()}
        concepts = [Concept(name=name, **fields) for name, fields in self.fields.items()]
        method = make_method(self.method, self.settings) if self.method else None
        if self.scheduler:
            pipe.scheduler = self.scheduler.from_config(pipe.scheduler.config)
        return pipe(**{**given, "concepts": concepts, "method": method, **made}).images


def boxed(**more: Any) -> dict[str, dict[str, Any]]:
    """Two concepts with a box each."""
    return {name: {"region": box, **more} for name, box in BOXES.items()}


def small(family: str) -> Any:
    """A tiny pipeline with four concepts of random LoRAs on every kind of layer."""
    pipe = FAMILIES[family]()
    words = {"cat": ("sks", "cat"), "dog": ("zwx", "dog"), "bear": ("xlo", "bear"), "style": (None, None)}
    with TemporaryDirectory() as folder:
        for seed, (name, (trigger, class_word)) in enumerate(words.items()):
            loras = {"unet": random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.15), **text_loras(pipe, 5 + seed)}
            path = Path(folder) / f"{name}.safetensors"
            save_file(lora_tensors(**loras), path)
            pipe.load_concept(path, trigger=trigger, class_word=class_word)
    if family == "sd":
        load_kinds(pipe, pipe.unet)
    return pipe


def playground() -> Any:
    """The trained model of the repository with two of its LoRAs, ordinary and trained with TARA."""
    pipe = ComposePipeline.from_pretrained(playground_model())
    pipe.set_progress_bar_config(disable=True)
    for name in ("cat", "dog", "cat-tara", "dog-tara"):
        pipe.load_concept(playground_lora(name), name=name)
    return pipe


def transformer(family: str) -> Any:
    """A tiny pipeline with two concepts of random LoRAs on every linear layer; FLUX.1 has a style and a LoKr, too."""
    pipe = EVERY[family].pipeline()
    words: dict[str, tuple[str | None, str | None]] = {"cat": ("sks", "cat"), "dog": ("zwx", "dog")}
    if family == "flux":
        words |= {"style": (None, None), "kron": ("sks", "cat")}
    with TemporaryDirectory() as folder:
        for seed, (name, (trigger, class_word)) in enumerate(words.items()):
            path = Path(folder) / f"{name}.safetensors"
            low_rank = as_file(random_lora_of_all(pipe.transformer, seed))
            save_file(lokr_of_all(pipe.transformer) if name == "kron" else dict(low_rank), path)
            pipe.load_concept(path, trigger=trigger, class_word=class_word)
    if family == "flux":
        load_kinds(pipe, pipe.transformer)
    return pipe


KINDS = ("loha", "lokr", "difference", "dora", "oft", "t-lora")
"""Further concepts of the smallest UNet and of FLUX.1, whose LoRAs are of these kinds."""


def load_kinds(pipe: Any, model: nn.Module) -> None:
    """Loads a concept for each of `KINDS`, named after it: a cat for every second, a dog for the others."""
    prefix = "unet" if model is getattr(pipe, "unet", None) else "transformer"
    linear = {name: layer.weight.detach() for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    with TemporaryDirectory() as folder:
        for seed, kind in enumerate(KINDS):
            generator, tensors = seeded(20 + seed), {}
            for name, weight in linear.items():
                named = _of_kind(kind, weight, generator) if min(weight.shape) % 4 == 0 else {}
                tensors |= {f"{prefix}.{name}.{slot}": tensor.contiguous() for slot, tensor in named.items()}
            path = Path(folder) / f"{kind}.safetensors"
            save_file(tensors, path)
            pipe.load_concept(path, **dict(zip(("trigger", "class_word"), WORDS[seed % 2], strict=True)))


WORDS = (("sks", "cat"), ("zwx", "dog"))


def _of_kind(kind: str, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a layer in a file of this kind; its change is far from zero."""
    outputs, inputs = weight.shape

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.06

    if kind == "loha":
        return {f"hada_w{i}_{side}": 2 * values(*shape) for i in (1, 2)
                for side, shape in (("a", (outputs, 2)), ("b", (2, inputs)))}  # fmt: skip
    if kind == "lokr":
        return {"lokr_w1": 5 * values(2, 2), "lokr_w2": values(outputs // 2, inputs // 2)}
    if kind == "difference":
        return {"diff": values(outputs, inputs)}
    if kind == "oft":
        turn = values(outputs // 4, 4, 4)
        return {"oft_blocks": turn - turn.mT, "alpha": torch.tensor(0.0)}
    down, up = 2 * values(4, inputs), 2 * values(outputs, 4)
    if kind == "dora":
        norms = (weight + up @ down).norm(dim=1, keepdim=True)
        return {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": norms * (1 + values(outputs, 1).abs())}
    return {
        "q_layer.weight": down, "p_layer.weight": up, "lambda_layer": 1 + values(1, 4),
        "base_q.weight": 2 * values(4, inputs), "base_p.weight": 2 * values(outputs, 4),
        "base_lambda_buf": 1 + values(1, 4),
    }  # fmt: skip


def copies(make: Callable[[], Any]) -> Callable[[], Any]:
    """A pipeline made once; every caller has a shallow copy, so a scheduler set by one test stays in that test."""
    made = cache(make)
    return lambda: copy(made())


PIPELINES: Mapping[str, Callable[[], Any]] = {
    "sd": copies(lambda: small("sd")),
    "sdxl": copies(lambda: small("sdxl")),
    "playground": copies(playground),
    **{name: copies(partial(transformer, name)) for name in EVERY},
}


def squares(size: int = 128) -> Image.Image:
    """A control image."""
    image = Image.new("RGB", (size, size), "navy")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 30, 70, 110), fill="white")
    draw.ellipse((60, 10, 120, 70), fill="orange")
    return image


@cache
def mask_file() -> str:
    """A mask image (white = inside)."""
    path = Path(_folder().name) / "mask.png"
    image = Image.new("L", (128, 128))
    ImageDraw.Draw(image).ellipse((50, 20, 120, 120), fill=255)
    image.save(path)
    return str(path)


@cache
def _folder() -> TemporaryDirectory:
    return TemporaryDirectory()
