"""diffusers' attention processors: how each computes attention, and how ours takes its place."""

from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from lora_compose.attention.claims import Journal
from lora_compose.attention.kernels import Kernel, PlainKernel, SlicedKernel, XFormersKernel, sdpa


def kernel_of(name: str, attn: Attention) -> Kernel:
    """The kernel of a layer's attention processor, for ours to use.

    Fused projections are copies of the layer's own, which ours uses: that is where its LoRAs are. Raises ValueError if
    ours would lose something that the processor or the layer does.
    """
    for part in ("spatial_norm", "group_norm", "norm_q", "norm_k", "add_k_proj"):
        if getattr(attn, part, None) is not None:
            raise ValueError(f"{name} has {part}, which cannot be combined with concepts")
    processor = attn.processor
    if type(processor) in (AttnProcessor2_0, IPAdapterAttnProcessor2_0, FusedAttnProcessor2_0):
        return sdpa
    if isinstance(processor, IPAdapterXFormersAttnProcessor) or type(processor) is XFormersAttnProcessor:
        return XFormersKernel(attn.scale, processor.attention_op)
    plain = PlainKernel(attn.scale, attn.upcast_attention, attn.upcast_softmax)
    if type(processor) in (AttnProcessor, IPAdapterAttnProcessor):
        return plain
    if type(processor) is SlicedAttnProcessor:
        return SlicedKernel(plain, processor.slice_size)
    raise ValueError(
        f"{name} has a {type(processor).__name__}, which cannot be combined with concepts. Supported: "
        "AttnProcessor2_0, XFormersAttnProcessor, AttnProcessor, their fused and sliced variants, and those of "
        "IP-Adapters. Undo what installed it, or call `pipe.unet.set_default_attn_processor()`"
    )


def replace_processor(attn: nn.Module, processor: Any, undo: Journal) -> None:
    """Gives an attention layer another processor; `undo` puts the one found back.

    Without `set_processor`: one found that is a module (of an IP-Adapter) stays a child of the layer, so that keys of
    the state dict stay.
    """
    attributes = vars(attn)
    if "processor" in attributes:
        undo.callback(attributes.__setitem__, "processor", attributes["processor"])
    else:
        undo.callback(attributes.pop, "processor", None)
    attributes["processor"] = processor
