"""FLUX.1: text and image tokens in one sequence, in double-stream blocks and then in single-stream ones."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention.backbones.truncation import replaced
from lora_compose.attention.device import uncompiled
from lora_compose.attention.sites import Site
from lora_compose.attention.slot import Slot

PATCH = 2
"""Latent cells per image token and side, so that image tokens are on level 1."""

STREAMS = (
    # The time embedding is read by modulation layers alone.
    (r"time_text_embed\.\w+_embedder\.linear_[12]|(.+\.)?norm\w*\.linear", Site("modulation")),
    (r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)", Site("joint", level=1)),
    (
        r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.net\..+)",
        Site("text"),
    ),
    (r"x_embedder|proj_out|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|ff\.net\..+)", Site("image", level=1)),
)
"""Sites by layer name. A layer that no pattern names has none, and no LoRA can change it."""


class FluxBackbone:
    """A `FluxTransformer2DModel`.

    Args:
        model: The transformer, compiled or not.
    """

    levels = frozenset({1})
    map_level = 1
    self_map_layers: tuple[str, ...] = ()
    text_layers = 1
    embeds_guidance = False
    reads_regions = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = flux_sites(model)

    @property
    def map_layers(self) -> tuple[str, ...]:
        """The attention layers of the last third of the double-stream blocks, where words and image have met."""
        names = [name for name, _ in self._attention() if name.startswith("transformer_blocks.")]
        return tuple(names[-max(1, len(names) // 3) :])

    @property
    def native_side(self) -> int:
        """Side of the latents for which the model was made: 1024 pixels."""
        return 128

    def steer(self, slot: Slot, undo: ExitStack) -> None:
        """Puts a recording kernel into every attention processor; `undo` puts them back.

        Raises:
            ValueError: For processors that do not end in diffusers' attention dispatch, and for fused projections.
        """
        found = dict(self._attention())
        if fused := [name for name, attn in found.items() if getattr(attn, "fused_projections", False)]:
            raise ValueError(
                f"{fused[0]} has fused projections, which drop LoRAs silently: call `unfuse_qkv_projections()`"
            )
        ours = {name: with_kernel(attn.processor, name, slot) for name, attn in found.items()}
        for name, attn in found.items():
            undo.callback(attn.set_processor, attn.processor)
            attn.set_processor(ours[name])

    def truncated_after(self, layers: Iterable[str]) -> AbstractContextManager[None]:
        """Inside this block the transformer stops after the block that holds the last of some layers."""
        return stopped_after(self.model, layers)

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        """One forward pass.

        Args:
            latents: Shape: [rows, channels, height, width].
            t: The timestep, 0 to 1000.
            text: Features of the T5 encoder. Shape: [rows, tokens, channels].
            added: "pooled_projections" of the CLIP encoder. Shape: [rows, channels].
            inputs: "guidance" of a guidance-distilled model, shape [rows], and "joint_attention_kwargs".

        Returns:
            The velocity. Shape: as the latents.
        """
        rows, _, height, width = latents.shape
        packed = self.model(
            hidden_states=nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            pooled_projections=(added or {})["pooled_projections"],
            timestep=t.expand(rows).to(latents.dtype) / 1000,
            img_ids=_positions(height // PATCH, width // PATCH, latents),
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device, dtype=latents.dtype),
            return_dict=False,
            **inputs,
        )[0]
        cells = packed.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
        return nn.functional.pixel_shuffle(cells, PATCH)

    def _attention(self) -> Iterator[tuple[str, Any]]:
        for name, module in uncompiled(self.model).named_modules():
            if hasattr(module, "set_processor") and hasattr(module, "processor"):
                yield name, module


def flux_sites(model: nn.Module) -> Mapping[str, Site]:
    """Every layer that a LoRA may adapt, by name."""
    names = [name for name, _ in uncompiled(model).named_modules()]
    return {name: site for pattern, site in STREAMS for name in names if re.fullmatch(pattern, name)}


@contextmanager
def stopped_after(transformer: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Inside this block the transformer runs no block after the last that holds one of some layers.

    Its last norm and projection, which are small, run on what there is then; the output is meaningless.

    Args:
        transformer: The model.
        layers: Names of layers.
    """
    model: Any = uncompiled(transformer)
    blocks = {name: list(getattr(model, name)) for name in ("transformer_blocks", "single_transformer_blocks")}
    names = [f"{name}.{i}." for name, of_kind in blocks.items() for i in range(len(of_kind))]
    layers = tuple(layers)
    needed = [i for i, name in enumerate(names, start=1) if any(layer.startswith(name) for layer in layers)]
    double, single = blocks.values()
    keep = max(needed, default=0)
    with replaced(
        model,
        transformer_blocks=nn.ModuleList(double[:keep]),
        single_transformer_blocks=nn.ModuleList(single[: max(0, keep - len(double))]),
    ):
        yield


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of every image token, for the rotary embedding. Shape: [tokens, 3]."""
    to: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    rows, columns = torch.meshgrid(torch.arange(height, **to), torch.arange(width, **to), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class RecordingKernel:
    """diffusers' attention, of which the maps are recorded.

    Attributes:
        layer: Name of the layer.
        slot: What the current pass needs.
        attend: diffusers' `dispatch_attention_fn`.
    """

    layer: str
    slot: Slot
    attend: Callable[..., Tensor]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attends. Shapes: [rows, text tokens and image tokens, heads, channels]."""
        for recorder in self.slot.recorders:
            tokens = recorder.readout.shape[-2]
            image, keys = query[:, tokens:].transpose(1, 2), key.transpose(1, 2)
            recorder.take(self.layer, image, keys, query.shape[-1] ** -0.5)
        return self.attend(query, key, value, **options)


def with_kernel(processor: Any, layer: str, slot: Slot) -> Any:
    """The processor found, with a recording kernel in the place of the function that it calls for attention.

    diffusers' processors share no signature, but end in one call, `dispatch_attention_fn` of queries, keys and values
    after the rotary embedding. So all that a processor does before and after it stays diffusers'.

    Raises:
        ValueError: If the processor does not call it.
    """
    kind = type(processor)
    call = kind.__call__
    if not isinstance(call, FunctionType) or "dispatch_attention_fn" not in call.__code__.co_names:
        raise ValueError(f"{layer} has a {kind.__name__}, which cannot be combined with concepts")
    names = dict(call.__globals__)
    names["dispatch_attention_fn"] = RecordingKernel(layer, slot, names["dispatch_attention_fn"])
    del names["__name__"]  # torch.compile would look names up in the module of that name
    ours = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    ours.__kwdefaults__ = call.__kwdefaults__
    made = copy.copy(processor)
    made.__class__ = type(f"Compose{kind.__name__}", (kind,), {"__call__": ours})
    return made
