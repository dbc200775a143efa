"""A small stand-in for what the nodes need of ComfyUI, so that their code also runs where there is none.

It has ComfyUI's protocol between patcher, sampler and model, and a tiny UNet with its names of layers. ComfyUI itself
is run by the tests that are marked with `comfyui`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial, reduce
from importlib import import_module
from itertools import pairwise
from math import lcm
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import uuid4
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_compose.compose.comfyui.needed import NEEDED
from lora_compose.compose.comfyui.weights import read_weights

CPU = torch.device("cpu")
OURS = "lora_compose.compose.comfyui"
IMPORTING = ("hooks", "composing", "nodes", "file_nodes")
"""Modules of ours that import ComfyUI."""
GRID, WIDTH = (8, 12), 8
CallbacksMP = SimpleNamespace(ON_EJECT_MODEL="on_eject_model", ON_INJECT_MODEL="on_inject_model")
WrappersMP = SimpleNamespace(SAMPLER_SAMPLE="sampler_sample", APPLY_MODEL="apply_model")


class ModelPatcher:
    """A model with what is done around it; clones share the model."""

    def __init__(
        self, model: nn.Module, load_device: torch.device, offload_device: torch.device, size: int = 0
    ) -> None:
        self.model: Any = model
        self.load_device, self.offload_device, self.size = load_device, offload_device, size
        self.attachments: dict[str, Any] = {}
        self.additional_models: dict[str, list[Any]] = {}
        self.callbacks: list[tuple[str, Callable[..., Any]]] = []
        self.wrappers: list[tuple[str, Callable[..., Any]]] = []

    def clone(self) -> "ModelPatcher":
        other = copy(self)
        for name in ("attachments", "additional_models", "callbacks", "wrappers"):
            setattr(other, name, copy(getattr(self, name)))
        return other

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def set_additional_models(self, key: str, models: list[Any]) -> None:
        self.additional_models[key] = models

    def add_callback_with_key(self, kind: str, key: str, callback: Callable[..., Any]) -> None:
        self.callbacks.append((kind, callback))

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.append((kind, wrapper))

    def call(self, kind: str) -> None:
        """As ComfyUI does around a change of weights in the middle of a sampling."""
        for of, callback in self.callbacks:
            if of == kind:
                callback(self)


class Executor:
    """The wrappers of a function, the first one outermost."""

    def __init__(self, function: Callable[..., Any], class_obj: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.function, self.class_obj, self.wrappers = function, class_obj, wrappers

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.wrappers:
            return self.function(*arguments, **options)
        first, *more = self.wrappers
        return first(Executor(self.function, self.class_obj, more), *arguments, **options)


def wrapped(patcher: ModelPatcher, kind: str, function: Callable[..., Any], class_obj: Any) -> Executor:
    return Executor(function, class_obj, [wrapper for of, wrapper in patcher.wrappers if of == kind])


class Cond:
    """A part of a conditioning as a model reads it."""

    def __init__(self, cond: Tensor) -> None:
        self.cond = cond


def encode_model_conds(
    function: Callable[..., Any], conds: list[dict[str, Any]], noise: Tensor, device: Any, kind: str, **given: Any
) -> list[dict[str, Any]]:
    made = [function(**{**given, **one, "noise": noise, "device": device, "prompt_type": kind}) for one in conds]
    return [{**one, "model_conds": {**one["model_conds"], **new}} for one, new in zip(conds, made, strict=True)]


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *, skip_reshape: bool = False,
    skip_output_reshape: bool = False, transformer_options: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention that other nodes may change: they mask it, or leave out cells."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(context, WIDTH), nn.Linear(context, WIDTH)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor, transformer_options: Mapping[str, Any]) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, mask = q[:, :: transformer_options.get("every", 1)], transformer_options.get("mask")
        override = transformer_options.get("optimized_attention_override")
        run: Callable[..., Tensor] = attention if override is None else partial(override, attention)
        out = run(q, k, v, 2, mask, transformer_options=transformer_options)
        return self.to_out(out)


class Transformer(nn.Module):
    """Self- and cross-attention; another node may cut the cells of the former into tiles, as rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, WIDTH)
        self.attn1, self.attn2 = Attention(WIDTH), Attention(WIDTH)

    def forward(self, x: Tensor, context: Tensor, options: Mapping[str, Any]) -> Tensor:
        cells, tiles = self.norm(x).flatten(2).transpose(1, 2), options.get("tiles", 1)
        tiled = cells.unflatten(1, (tiles, -1)).flatten(0, 1)
        tiled = self.attn1(tiled, tiled, transformer_options=options)
        cells = cells + tiled.unflatten(0, (-1, tiles)).flatten(1, 2)
        cells = cells + self.attn2(cells, context, transformer_options=options)
        return x + cells.transpose(1, 2).unflatten(2, x.shape[2:])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(2, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.in_layers(x) + self.emb_layers(time)[..., None, None]


class UNet(nn.Module):
    """Two blocks and one between them, on one grid, which another node may halve at low noise."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        down = nn.ModuleList([Residual(), Transformer()])
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, WIDTH, 3, padding=1)]), down])
        self.middle_block = nn.ModuleList([Residual()])
        self.output_blocks = nn.ModuleList([nn.ModuleList([Residual(), Transformer()])])
        self.out = nn.Sequential(nn.GroupNorm(2, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, 4, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, context: Tensor, transformer_options: Mapping[str, Any]) -> Tensor:
        halved = bool(time.max() < transformer_options.get("halved_below", 0))
        time = self.time_embed(torch.cos(time[:, None] * torch.arange(1, WIDTH + 1)))
        first, down = self.input_blocks
        (up,) = self.output_blocks
        modules: list[Any] = [*down.children(), *self.middle_block, *up.children()]
        x = next(first.children())(x)
        x = F.avg_pool2d(x, 2) if halved else x
        for module in modules:
            x = module(x, time) if isinstance(module, Residual) else module(x, context, transformer_options)
        return self.out(F.interpolate(x, scale_factor=2.0) if halved else x)


class Model(nn.Module):
    """What ComfyUI has around a denoiser."""

    manual_cast_dtype = None

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = UNet()

    def get_dtype(self) -> torch.dtype:
        return torch.float32

    def extra_conds(self, **given: Any) -> dict[str, Cond]:
        return {"c_crossattn": Cond(given["cross_attn"])}

    def apply_model(
        self, x: Tensor, t: Tensor, concat: Any, text: Tensor, control: Any, options: Mapping[str, Any]
    ) -> Tensor:
        return self.diffusion_model(x, t, text, transformer_options=options)


def patcher() -> ModelPatcher:
    torch.manual_seed(0)
    return ModelPatcher(Model().eval().requires_grad_(False), CPU, CPU)


def text(seed: int, tokens: int = 6) -> list[list[Any]]:
    """A conditioning."""
    return [[torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed)), {}]]


class Clip:
    """A tokenizer as ComfyUI's are asked: a token for each word, between a start and an end; and an encoder."""

    def __init__(self) -> None:
        self.tokenizer, self.l = self, self

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        return {"l": self.tokenize_with_weights(text, return_word_ids)}

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, disable_weights: bool = False) -> Any:
        plain = text if disable_weights else read_weights(text).text
        words = [(crc32(word.encode()), 1.0, n) for n, word in enumerate(plain.split(), start=1)]
        return [[(crc32(b"<"), 1.0, 0), *words, (crc32(b">"), 1.0, 0)]]

    def encode_from_tokens_scheduled(self, tokens: Any) -> list[list[Any]]:
        each = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(number)) for number, *_ in tokens["l"][0]]
        return [[torch.stack(each)[None], {}]]


def sampled(
    model: ModelPatcher, positive: list[list[Any]], negative: list[list[Any]], steps: int = 5, batch: int = 1,
    cfg: float = 3.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Latents by Euler's method, with one pass for all conditionings of a step.

    Args:
        options: Options of the model, which every pass gets.
    """
    noise = torch.randn(batch, 4, *GRID, generator=torch.Generator().manual_seed(1))
    given = {"positive": positive, "negative": negative}
    conds = {
        kind: [{**more, "cross_attn": words, "uuid": uuid4(), "model_conds": {}} for words, more in several]
        for kind, several in given.items()
    }
    guider = SimpleNamespace(conds=conds, model_patcher=model, inner_model=model.model)
    guider.conds = {
        kind: encode_model_conds(model.model.extra_conds, several, noise, CPU, kind) for kind, several in conds.items()
    }

    def sample(guider: Any, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor, *further: Any) -> Tensor:
        latents = noise
        every = [(one, kind) for kind, several in guider.conds.items() for one in several]
        for before, after in pairwise(sigmas):
            read = [one["model_conds"]["c_crossattn"].cond for one, _ in every]
            tokens = lcm(*[words.shape[1] for words in read])
            read = torch.cat([words.repeat(len(noise), tokens // words.shape[1], 1) for words in read])
            rows, level = latents.repeat(len(every), 1, 1, 1), before.expand(len(read))
            asked = {**options, "uuids": [one["uuid"] for one, _ in every]}
            run = wrapped(model, WrappersMP.APPLY_MODEL, model.model.apply_model, model.model)
            out = run(rows, level, None, read, None, asked).unflatten(0, (len(every), -1))
            means = {
                kind: torch.stack([o for o, (_, of) in zip(out, every, strict=True) if of == kind]).mean(dim=0)
                for kind in guider.conds
            }
            change = means["negative"] + cfg * (means["positive"] - means["negative"])
            latents = latents + (after - before) * change
        return latents

    sigmas = torch.linspace(1, 0, steps + 1)
    run = wrapped(model, WrappersMP.SAMPLER_SAMPLE, sample, None)
    return run(guider, sigmas, {"seed": 1}, None, noise, torch.zeros_like(noise), None)


class Recorded:
    """Anything of a schema: its arguments are kept as they were given."""

    def __init__(self, kind: str, *arguments: Any, **options: Any) -> None:
        self.kind, self.id, self.options = kind, arguments[0] if arguments else "", options


def kind_of(name: str) -> Any:
    """What ComfyUI has of a type: its inputs and outputs."""
    return SimpleNamespace(Input=partial(Recorded, name), Output=partial(Recorded, name))


def modules() -> dict[str, Any]:
    """Modules of ComfyUI, by name, with what our nodes need, and nothing else."""
    types = {"Int": "INT", "Float": "FLOAT", "String": "STRING", "Combo": "COMBO"}
    types |= {name: name.upper() for name in ("Model", "Clip", "Vae", "Conditioning", "Latent", "Image", "Mask")}
    io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}), Custom=kind_of, Schema=lambda **given: SimpleNamespace(**given),
        NodeOutput=lambda *args, **options: SimpleNamespace(args=args, **options),
        **{name: kind_of(kind) for name, kind in types.items()},
    )  # fmt: skip
    ui = SimpleNamespace(PreviewImage=lambda images, cls: ("images", images), PreviewText=lambda said: ("text", said))
    found = {
        "comfy": {},
        "comfy.lora": {"model_lora_keys_unet": names_of_layers},
        "comfy.model_management": {"unload_all_models": None},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.patcher_extension": {"CallbacksMP": CallbacksMP, "WrappersMP": WrappersMP},
        "comfy.samplers": {
            "encode_model_conds": encode_model_conds,
            "KSampler": SimpleNamespace(SAMPLERS=["euler"], SCHEDULERS=["normal"]),
        },
        "comfy.sd": {"load_lora_for_models": None},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": type("ComfyExtension", (), {}), "io": io, "ui": ui},
        "folder_paths": {
            "get_filename_list": lambda kind: [f"{name}.safetensors" for name in ("bird", "cat", "dog", "style")],
            "get_full_path_or_raise": None, "get_output_directory": None, "get_save_image_path": None,
        },
        "nodes": {"common_ksampler": None},
    }  # fmt: skip
    made = {name: ModuleType(name) for name in found}
    for name, contents in found.items():
        for attribute, value in contents.items():
            setattr(made[name], attribute, value)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made


def names_of_layers(model: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """What a layer is called in files."""
    every = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return {**names, **{name: f"{name}.weight" for name in every}}


@contextmanager
def standing_in() -> Iterator[Callable[[str], ModuleType]]:
    """Gives our modules that import ComfyUI, by name; they and the stand-ins are gone afterwards."""
    before = {name: sys.modules.pop(f"{OURS}.{name}", None) for name in IMPORTING}
    made = modules()
    for module, names in NEEDED.items():
        for name in names:
            reduce(getattr, name.split("."), made[module])
    kept = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield lambda name: import_module(f"{OURS}.{name}")
    finally:
        for name, module in {**kept, **{f"{OURS}.{name}": module for name, module in before.items()}}.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
