"""Cosmos Predict2, Anima's transformer: the image attends to itself, then to the text, as in a UNet, without a grid."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from math import prod
from typing import Any

from torch import Tensor, nn

from lora_compose.attention.backbones.joint import JointBackbone, with_kernel
from lora_compose.attention.device import modules_of, uncompiled
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.joint_kernel import JointKernel
from lora_compose.attention.kernels import Kernel
from lora_compose.attention.lora_bank import BankLayer, base_layer
from lora_compose.attention.sites import Site

_IMAGE = Site("image", level=1)


class CosmosBackbone(JointBackbone):
    """A `CosmosTransformer3DModel` that makes images: latents of one frame, which the forward pass adds.

    Cross-attention has no positions in its keys, so several texts may follow one another: a cell reads some of them.
    """

    table = (
        # Two time layers shared by all blocks, and two before every norm.
        (r"time_embed\.t_embedder\.linear_[12]|(.+\.)?norm(\d|_out)\.linear_[12]", Site("modulation")),
        (r"patch_embed\.proj", Site("image", level=1, planar=True)),
        (r"transformer_blocks\.\d+\.(attn1\.to_([qkv]|out\.0)|attn2\.to_q|ff\.net\..+)|proj_out", _IMAGE),
        (r"transformer_blocks\.\d+\.attn2\.to_[kv]", Site("text", in_line=True)),
        (r"transformer_blocks\.\d+\.attn2\.to_out\.0", Site("image", level=1, reads_text=True)),
    )
    reads_regions = True

    @property
    def map_layers(self) -> tuple[str, ...]:
        """Cross-attention in the last third of the blocks."""
        names = self.word_layers
        return names[-max(1, len(names) // 3) :]

    @property
    def word_layers(self) -> tuple[str, ...]:
        """Cross-attention of all blocks."""
        return tuple(name for name in modules_of(self.model) if name.endswith(".attn2"))

    @property
    def self_map_layers(self) -> tuple[str, ...]:
        """Self-attention of the same blocks."""
        return tuple(name.removesuffix("2") + "1" for name in self.map_layers)

    def _processor(self, layer: str, processor: Any, state: ForwardState) -> Any:
        site = Site("image", level=1, reads_text=layer.endswith(".attn2"))
        return _finished(with_kernel(processor, CrossKernel, layer, site, state), layer, site, state)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        added: Mapping[str, Tensor] | None,
        several_texts: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """As `Backbone.forward`; the text is that of the conditioner, [(texts,) rows, tokens, channels]."""
        model: Any = uncompiled(self.model)
        with _mask_given(model):
            return self.model(
                hidden_states=with_padding_mask(model, latents.to(text.dtype)[:, :, None]),
                timestep=t.expand(len(latents)).to(text.dtype) / 1000,
                encoder_hidden_states=text.transpose(0, 1).flatten(1, 2) if several_texts else text,
                return_dict=False,
                **inputs,
            )[0][:, :, 0]


@contextmanager
def _mask_given(model: Any) -> Iterator[None]:
    """Inside this block diffusers adds no padding mask, which it would resize with torchvision, if that is there."""
    before = model._internal_dict
    model.register_to_config(concat_padding_mask=False)
    try:
        yield
    finally:
        model._internal_dict = before


def with_padding_mask(model: Any, latents: Tensor) -> Tensor:
    """Latents [rows, channels, frames, height, width] with the padding mask, 0 everywhere, where the model has one."""
    layer: Any = model.patch_embed.proj
    layer = base_layer(layer.layer if isinstance(layer, BankLayer) else layer)
    channels = layer.in_features // prod(model.config.patch_size)
    return nn.functional.pad(latents, (0, 0, 0, 0, 0, 0, 0, channels - latents.shape[1]))


@dataclass(frozen=True)
class CrossKernel(JointKernel):
    """diffusers' attention with what `RegionAttention`, biases on the text and recorders need, where text is apart."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Attends. Shapes: [rows, positions, heads, channels]; with regions there may be several queries of a cell.

        Raises:
            ValueError: For a mask of the caller.
        """
        if attn_mask is not None:
            raise ValueError("attention masks of the caller cannot be combined with concepts")
        inputs, level = self.state.inputs, self.site.level
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.site.reads_text and inputs.texts is not None:
            count = len(inputs.texts)
            key, value = (x.unflatten(2, (count, -1)).permute(2, 0, 1, 3, 4) for x in (key, value))
        out = self.state.attend(
            self._kernel(options), self.layer, level, query, key, value, query.shape[-1] ** -0.5, self.site.reads_text
        )
        return out.transpose(1, 2)

    def _kernel(self, options: Mapping[str, Any]) -> Kernel:
        def kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            return self.attend(query, key, value, attn_mask=bias, **options).transpose(1, 2)

        return kernel


def _finished(processor: Any, layer: str, site: Site, state: ForwardState) -> Any:
    """The processor with what comes after its output projection: the mean over region queries, and recording."""
    kind: Any = type(processor)
    attend: Callable[..., Tensor] = kind.__call__

    @wraps(attend)  # diffusers looks at the parameters
    def call(self: Any, *args: Any, **options: Any) -> Tensor:
        out, regions = attend(self, *args, **options), state.inputs.regions
        if site.reads_text:
            return out if regions is None else regions.mean_over_queries(site.level, out)
        for recorder in state.recorders:
            recorder.take_output(layer, out)
        return out

    processor.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return processor
