"""Names of a transformer's layers in its original checkpoint; trainers and ComfyUI use them in LoRA files.

One layer of a checkpoint may be several of diffusers' (queries, keys and values), whose outputs follow one another in
the order of the table. Facts: the model's public code, and diffusers' converters of checkpoints.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

_Table = Sequence[tuple[str, str]]
"""Patterns of diffusers' names, and the original name."""

_SCALE_AND_SHIFT = (r"norm_out\.linear", "final_layer.adaLN_modulation.1")
"""The modulation of the last layer: the original gives shift and scale, diffusers' layer scale and shift."""
_SCALE_AND_SHIFT_OF_IMAGE = (r"norm_out\.linear", "final_layer.image.adaLN_modulation.1")
"""FLUX.3's modulation of the last layer, whose halves are in the same order."""


def _double(image: str, text: str) -> _Table:
    """Names of the layers of a double-stream block, on the image side and on the text side."""
    return [
        (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        (rf"transformer_blocks\.(\d+)\.ff\.{image}", r"double_blocks.\1.img_mlp.0"),
        (rf"transformer_blocks\.(\d+)\.ff\.{text}", r"double_blocks.\1.img_mlp.2"),
        (rf"transformer_blocks\.(\d+)\.ff_context\.{image}", r"double_blocks.\1.txt_mlp.0"),
        (rf"transformer_blocks\.(\d+)\.ff_context\.{text}", r"double_blocks.\1.txt_mlp.2"),
    ]


_FLUX: _Table = [
    *_double(r"net\.0\.proj", r"net\.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    # XLabs' attention processors; of the first layer of a single block they change queries, keys and values alone.
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.processor.qkv_lora1"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.processor.qkv_lora2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.processor.proj_lora1"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.processor.proj_lora2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"single_blocks.\1.processor.qkv"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.processor.proj"),
    (r"x_embedder", "img_in"),
    (r"x_embedder", "img_in.proj"),
    (r"context_embedder", "txt_in"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"proj_out", "final_layer.linear"),
    _SCALE_AND_SHIFT,
]
_CHROMA: _Table = [
    *(row for row in _FLUX if "norm" not in row[0] and "time_text_embed" not in row[0]),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_1", r"distilled_guidance_layer.layers.\1.in_layer"),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_2", r"distilled_guidance_layer.layers.\1.out_layer"),
]
_FLUX2: _Table = [
    *_double("linear_in", "linear_out"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"(\w+_modulation(?:_\w+)?)\.linear", r"\1.lin"),
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"proj_out", "final_layer.linear"),
    _SCALE_AND_SHIFT,
]
_FLUX3: _Table = [
    *(
        (rf"{ours}\.{layer}", rf"{theirs}.{original}")
        for ours, theirs in (
            (r"mode_blocks\.(\w+)\.(\d+)", r"content_mode_blocks.\1.\2"),
            (r"txt_mode_blocks\.(\d+)", r"txt_mode_blocks.\1"),
            (r"single_transformer_blocks\.(\d+)", r"single_blocks.\1"),
        )
        for layer, original in (
            (r"attn\.to_q", "q_proj"), (r"attn\.to_k", "k_proj"), (r"attn\.to_v", "v_proj"),
            (r"attn\.to_out\.0", "attn_out"), (r"ff\.linear_in", "mlp_in"), (r"ff\.linear_out", "mlp_out"),
        )
    ),
    (r"(\w+_stream_modulations\.\w+)\.linear", r"\1.lin"),
    (r"x_embedders\.(\w+)", r"emb_in.\1"),
    (r"context_embedder", "txt_in"),
    (r"timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"target_timestep_embedder\.linear_1", "ref_time_in.in_layer"),
    (r"target_timestep_embedder\.linear_2", "ref_time_in.out_layer"),
    (r"proj_out", "final_layer.image.linear"),
    _SCALE_AND_SHIFT_OF_IMAGE,
]  # fmt: skip
_IDEOGRAM4: _Table = [
    (r"layers\.(\d+)\.attention\.to_[qkv]", r"layers.\1.attention.qkv"),
    (r"layers\.(\d+)\.attention\.to_out\.0", r"layers.\1.attention.o"),
]
_KREA2: _Table = [
    *(
        (rf"{ours}\.(\d+)\.{layer}", rf"{theirs}.\1.{original}")
        for ours, theirs in (
            ("transformer_blocks", "blocks"),
            (r"text_fusion\.layerwise_blocks", "txtfusion.layerwise_blocks"),
            (r"text_fusion\.refiner_blocks", "txtfusion.refiner_blocks"),
        )
        for layer, original in (
            (r"attn\.to_q", "attn.wq"), (r"attn\.to_k", "attn.wk"), (r"attn\.to_v", "attn.wv"),
            (r"attn\.to_out\.0", "attn.wo"), (r"attn\.to_gate", "attn.gate"), (r"ff\.gate", "mlp.gate"),
            (r"ff\.up", "mlp.up"), (r"ff\.down", "mlp.down"),
        )
    ),
    (r"text_fusion\.projector", "txtfusion.projector"),
    (r"img_in", "first"),
    (r"final_layer\.linear", "last.linear"),
    (r"time_embed\.linear_1", "tmlp.0"),
    (r"time_embed\.linear_2", "tmlp.2"),
    (r"time_mod_proj", "tproj.1"),
    (r"txt_in\.linear_1", "txtmlp.1"),
    (r"txt_in\.linear_2", "txtmlp.3"),
]  # fmt: skip
_Z_IMAGE: _Table = [
    (r"(layers|noise_refiner|context_refiner)\.(\d+)\.attention\.to_[qkv]", r"\1.\2.attention.qkv"),
    (r"(layers|noise_refiner|context_refiner)\.(\d+)\.attention\.to_out\.0", r"\1.\2.attention.out"),
    (r"all_x_embedder\.2-1", "x_embedder"),
    (r"all_final_layer\.2-1\.linear", "final_layer.linear"),
    (r"all_final_layer\.2-1\.adaLN_modulation\.1", "final_layer.adaLN_modulation.1"),
]
_COSMOS: _Table = [
    *(
        (rf"transformer_blocks\.(\d+)\.{ours}\.{layer}", rf"blocks.\1.{theirs}.{original}")
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for layer, original in (
            ("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), (r"to_out\.0", "output_proj"),
        )
    ),
    *(
        (rf"transformer_blocks\.(\d+)\.{norm}\.linear_([12])", rf"blocks.\1.adaln_modulation_{original}.\2")
        for norm, original in (("norm1", "self_attn"), ("norm2", "cross_attn"), ("norm3", "mlp"))
    ),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.mlp.layer1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.mlp.layer2"),
    (r"norm_out\.linear_([12])", r"final_layer.adaln_modulation.\1"),
    (r"proj_out", "final_layer.linear"),
    (r"time_embed\.t_embedder\.linear_([12])", r"t_embedder.1.linear_\1"),
    (r"patch_embed\.proj", "x_embedder.proj.1"),
]  # fmt: skip
_TABLES: Mapping[str, _Table] = {
    "ChromaTransformer2DModel": _CHROMA,
    "CosmosTransformer3DModel": _COSMOS,
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX2,
    "Flux3Transformer2DModel": _FLUX3,
    "Ideogram4Transformer2DModel": _IDEOGRAM4,
    "Krea2Transformer2DModel": _KREA2,
    "ZImageTransformer2DModel": _Z_IMAGE,
}


def original_layers(model: nn.Module, names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """For each layer of the original checkpoint, the model's layers that it is, in the order of its outputs."""
    by_original: dict[str, list[tuple[int, str]]] = {}
    for number, (pattern, original) in enumerate(_TABLES.get(type(model).__name__, ())):
        for name in names:
            if match := re.fullmatch(pattern, name):
                by_original.setdefault(match.expand(original), []).append((number, name))
    return {original: tuple(name for _, name in sorted(layers, key=_order)) for original, layers in by_original.items()}


def swaps_halves(name: str, spelled: str) -> bool:
    """Whether a layer's output halves are swapped in the original checkpoint; `spelled` as a file has its name."""
    swapped = [original.replace(".", "_") for _, original in (_SCALE_AND_SHIFT, _SCALE_AND_SHIFT_OF_IMAGE)]
    return name == "norm_out.linear" and spelled in swapped


def _order(layer: tuple[int, str]) -> tuple[int, int]:
    """By row of the table; queries before keys before values."""
    number, name = layer
    kind = re.search(r"(?:to|add)_([qkv])(?:_proj)?$", name)
    return number, "qkv".index(kind[1]) if kind else 0
