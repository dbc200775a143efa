"""Layer names in files: diffusers' own, those of original checkpoints, and older ones."""

import re
from collections.abc import Iterator, Mapping
from itertools import count

from torch import nn

from lora_compose.attention.device import is_adaptable, modules_of, uncompiled
from lora_compose.attention.lora_bank import base_layer
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.formats.transformer_names import original_layers

# Modules that diffusers names and original checkpoints ("LDM" for SD, "SGM" for SDXL) number, with underscores for
# dots.
_RESNET = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
}
# Attention processors and old text encoders have other names for the projections; the last one is of LoRAs for FLUX.2,
# whose export cut off a part of the name.
_OLDER = (
    (r"_self_attn_to_([qkv])$", r"_self_attn_\1_proj"),
    (r"_self_attn_to_out(?:_0)?$", "_self_attn_out_proj"),
    (r"_processor_(to_[qkv])$", r"_\1"),
    (r"(?:_processor)?_to_out$", "_to_out_0"),
    (r"^sformer_blocks_", "transformer_blocks_"),
)


_OUTER = re.compile(r"text_model\.|(?:model\.)?language_model\.|model\.(?=layers\.)")


def present_name(module: str) -> str:
    """The present name of a layer, with underscores for dots, for a name that older trainers use."""
    for pattern, present in _OLDER:
        module, changed = re.subn(pattern, present, module)
        if changed:
            return module
    return module


def spellings(model: nn.Module, part: Part) -> Mapping[str, tuple[str, ...]]:
    """The layers that a LoRA may change, by every name that files use for them, with underscores for dots.

    One layer of an original checkpoint may be several of diffusers'; they are in the order of its outputs.

    Args:
        model: A UNet, a transformer or a text encoder.
    """
    model = uncompiled(model)
    layers = [name for name, module in modules_of(model).items() if is_adaptable(base_layer(module))]
    own = {name.replace(".", "_"): name for name in layers}
    if part == "transformer":
        fused = {spelled.replace(".", "_"): names for spelled, names in original_layers(model, layers).items()}
        # The Open Model Initiative numbers the parts of a fused layer.
        parts = {f"{spelled}_{i}": name for spelled, names in fused.items() for i, name in enumerate(names)}
        return _each(parts) | fused | _each(own)
    if part == "unet":
        return _each(_original(model, own) | own)
    # CLIP had an outer `text_model` module until transformers 5; other text encoders may be in a `model`.
    bare = {_OUTER.sub("", name).replace(".", "_"): name for name in layers}
    outer = {f"{outer}_{spelled}": name for outer in ("text_model", "model") for spelled, name in bare.items()}
    return _each(bare | outer | own)


def _each(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {spelled: (name,) for spelled, name in names.items()}


def original_names(unet: nn.Module) -> Mapping[str, str]:
    """The original checkpoint's names of a UNet's layers, with underscores for dots, by the UNet's own names."""
    own = {name.replace(".", "_"): name for name, _ in uncompiled(unet).named_modules()}
    return {name: spelled for spelled, name in _original(uncompiled(unet), own).items()}


def _original(unet: nn.Module, own: Mapping[str, str]) -> dict[str, str]:
    """Layers by their names in original checkpoints, which number all down blocks, and all up blocks, consecutively."""
    by_original = {theirs: own[ours] for ours, theirs in _OUTSIDE.items() if ours in own}
    for theirs, ours in _original_blocks(unet):
        if ours in own:
            by_original[theirs] = own[ours]
        for spelled, name in own.items():
            if spelled.startswith(f"{ours}_"):
                inner = spelled.removeprefix(f"{ours}_")
                by_original[f"{theirs}_{_RESNET.get(inner, inner)}"] = name
    return by_original


def _original_blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """The original checkpoints' name and ours for every block inside a block."""
    number = count(1)
    for i, block in enumerate(unet.get_submodule("down_blocks").children()):
        for j in range(_length(block, "resnets")):
            theirs, ours = f"input_blocks_{next(number)}", f"down_blocks_{i}"
            yield f"{theirs}_0", f"{ours}_resnets_{j}"
            yield f"{theirs}_1", f"{ours}_attentions_{j}"
        if _length(block, "downsamplers"):
            yield f"input_blocks_{next(number)}_0_op", f"down_blocks_{i}_downsamplers_0_conv"
    yield "middle_block_0", "mid_block_resnets_0"
    yield "middle_block_1", "mid_block_attentions_0"
    yield "middle_block_2", "mid_block_resnets_1"
    number = count()
    for i, block in enumerate(unet.get_submodule("up_blocks").children()):
        resnets, attentions = _length(block, "resnets"), _length(block, "attentions")
        for j in range(resnets):
            theirs, ours = f"output_blocks_{next(number)}", f"up_blocks_{i}"
            yield f"{theirs}_0", f"{ours}_resnets_{j}"
            yield f"{theirs}_1", f"{ours}_attentions_{j}"
            if j == resnets - 1 and _length(block, "upsamplers"):
                yield f"{theirs}_{2 if attentions else 1}_conv", f"{ours}_upsamplers_0_conv"


def _length(block: nn.Module, name: str) -> int:
    inner = getattr(block, name, None)
    return len(inner) if isinstance(inner, nn.ModuleList) else 0
