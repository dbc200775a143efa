"""What a model of ComfyUI is made of: every layer that a LoRA may change, with the sequence that it works on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from lora_compose.attention import Site
from lora_compose.attention.device import is_linear

_FLUX = (
    (r"(time|vector|guidance)_in\.\w+_layer", Site("modulation")),
    (r".+_blocks\.\d+\.(img_mod|txt_mod|modulation)\.lin", Site("modulation", extra_axis=True)),
    (r"(double|single)_stream_modulation(_img|_txt)?\.lin", Site("modulation", extra_axis=True)),
    (r"final_layer\.adaLN_modulation\.1", Site("modulation", extra_axis=True)),
    (r"distilled_guidance_layer\..+", Site("modulation", extra_axis=True)),
    (r"single_blocks\.\d+\.linear[12]", Site("text", "image", level=1)),
    (r"txt_in|double_blocks\.\d+\.txt_(attn|mlp)\..+", Site("text")),
    (r"img_in|final_layer\.linear|double_blocks\.\d+\.img_(attn|mlp)\..+", Site("image", level=1)),
)
_QWEN_IMAGE = (
    (r"time_text_embed\..+|transformer_blocks\.\d+\.(img|txt)_mod\.1|norm_out\.linear", Site("modulation")),
    (r"txt_in|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|txt_mlp\..+)", Site("text")),
    (r"img_in|proj_out|transformer_blocks\.\d+\.(attn\.to_([qkv]|out\.0)|img_mlp\..+)", Site("image", level=1)),
)
_ANIMA = (
    (r"t_embedder\.1\.linear_[12]|.+\.adaln_modulation(_\w+)?\.[12]", Site("modulation", extra_axis=True)),
    (r"x_embedder\.proj\.1|blocks\.\d+\.mlp\.layer[12]|final_layer\.linear", Site("image", level=1, planar=True)),
    (r"blocks\.\d+\.(self_attn\.(q|k|v|output)_proj|cross_attn\.q_proj)", Site("image", level=1)),
    (r"blocks\.\d+\.cross_attn\.[kv]_proj", Site("text")),
    (r"blocks\.\d+\.cross_attn\.output_proj", Site("image", level=1, reads_text=True)),
)
_IN_KREA2 = r"\d+\.(attn\.(w[qkvo]|gate)|mlp\.(gate|up|down))"
_KREA2 = (
    (r"tmlp\.[02]|tproj\.1", Site("modulation", extra_axis=True)),
    # Attention among the layers of the text encoder, for each token apart.
    (rf"txtfusion\.layerwise_blocks\.{_IN_KREA2}", Site("text", flat=True, extra_axis=True)),
    (r"txtfusion\.projector", Site("text", extra_axis=True)),
    (rf"txtfusion\.refiner_blocks\.{_IN_KREA2}|txtmlp\.[13]", Site("text")),
    (rf"blocks\.{_IN_KREA2}|last\.linear", Site("text", "image", level=1)),
    (r"first", Site("image", level=1)),
)
_IN_BLOCK = r"\d+\.(attention\.(qkv|out)|feed_forward\.w[123])"
_Z_IMAGE = (
    (r"t_embedder\.mlp\.\d|.+\.adaLN_modulation\.\d", Site("modulation")),
    (r"cap_embedder\.1", Site("text")),
    (r"x_embedder", Site("image", level=1)),
    (rf"context_refiner\.{_IN_BLOCK}", Site("text", multiple=32)),
    (rf"noise_refiner\.{_IN_BLOCK}", Site("image", level=1, multiple=32)),
    (rf"layers\.{_IN_BLOCK}|final_layer\.linear", Site("text", "image", level=1, multiple=32)),
)
_IS_FLUX = frozenset({"txt_in", "vector_in.in_layer", "double_blocks.0.img_mod.lin", "single_blocks.0.modulation.lin"})
_IS_FLUX2 = frozenset({"txt_in", "double_stream_modulation_img.lin", "single_stream_modulation.lin"})
_IS_ANIMA = frozenset({"x_embedder.proj.1", "llm_adapter.blocks.0.cross_attn.q_proj", "blocks.0.cross_attn.q_proj"})
_IS_CHROMA = frozenset({"txt_in", "distilled_guidance_layer.in_proj", "double_blocks.0.img_mlp.0", "img_in"})
_IS_QWEN_IMAGE = frozenset({"txt_in", "transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.img_mod.1"})
_IS_Z_IMAGE = frozenset({"cap_embedder.1", "noise_refiner.0.attention.qkv", "layers.0.adaLN_modulation.0"})
_IS_KREA2 = frozenset({"first", "txtfusion.projector", "txtmlp.1", "tproj.1", "blocks.0.attn.wq", "last.linear"})
_IS_UNET = frozenset({"time_embed.0", "input_blocks.0.0", "middle_block.0.in_layers.2", "out.2"})
_SIDES = ("input_blocks", "output_blocks")
_SUPPORTED = (
    "the UNets of Stable Diffusion 1.x, 2.x and XL, FLUX.1, FLUX.2, Chroma, Krea 2, Qwen-Image, Z-Image and Anima"
)


@dataclass(frozen=True)
class Family:
    """What is known of a model.

    Attributes:
        sites: The layers that a LoRA may change, by name.
        attention: The modules whose `forward` runs one attention: what is in its sequence, and whether it reads text.
        maps: The modules whose attention shows where subjects are; all of one grid.
        zeros: Where ComfyUI fills short texts with zeros; None where it repeats them to the length of longer ones.
        positions: The module that turns positions into rotary embeddings, where regional prompts each begin at the
            first position; None where they follow one another.
    """

    sites: Mapping[str, Site]
    attention: Mapping[str, Site]
    maps: Sequence[str]
    zeros: Literal["before", "behind"] | None = None
    positions: str | None = None

    @property
    def map_level(self) -> int:
        """The level of the maps."""
        return self.attention[self.maps[0]].level

    @property
    def joint(self) -> Site | None:
        """How text and image lie in one sequence; None in UNets."""
        return next((site for site in self.attention.values() if site.joint), None)


def family_of(model: nn.Module) -> Family:
    """What is known of a `diffusion_model`. Raises ValueError for a family that is not supported."""
    modules = model.named_modules()
    layers = [name for name, layer in modules if is_linear(layer) or isinstance(layer, nn.Conv2d)]
    if _IS_FLUX.issubset(layers) or _IS_CHROMA.issubset(layers):
        return _flux(layers, level=1)
    if _IS_FLUX2.issubset(layers) and not any("gate_proj" in name for name in layers):
        return replace(_flux(layers, level=0), zeros="before")  # a cell of its latents is a patch
    if _IS_ANIMA.issubset(layers):  # an adapter makes the text before sampling
        return replace(_of(_by(_ANIMA, layers), ".output_proj"), zeros="behind")
    if _IS_KREA2.issubset(layers) and _has(model, patch=2):
        return _of(_by(_KREA2, layers), ".wq")
    if _IS_QWEN_IMAGE.issubset(layers) and _has(model, patch_size=2):  # text has positions of its own
        sites, both = _by(_QWEN_IMAGE, layers), Site("text", "image", level=1)
        return replace(_of(sites, ".to_q", both), positions="pe_embedder")
    if _IS_Z_IMAGE.issubset(layers) and _has(model, patch_size=2, pad_tokens_multiple=32):
        return _of(_by(_Z_IMAGE, layers), ".qkv")
    reads_text = any(name.endswith(".attn2.to_k") for name in layers)
    if _IS_UNET.issubset(layers) and reads_text and not any("time_stack" in name for name in layers):
        return _unet(model, layers)
    raise ValueError(
        f"concepts cannot act in this model, a {type(model).__name__} in ComfyUI; they act in {_SUPPORTED}. A "
        "quantised model may have layers of another kind: then load it in fp16 or bf16"
    )


def _has(model: nn.Module, **settings: int) -> bool:
    """Whether it is built so; others have layers of the same names."""
    return all(getattr(model, name, None) == value for name, value in settings.items())


def _by(table: Sequence[tuple[str, Site]], layers: Sequence[str]) -> Mapping[str, Site]:
    return {name: site for name in layers for pattern, site in table if re.fullmatch(pattern, name)}


def _of(sites: Mapping[str, Site], layer: str, attends: Site | None = None) -> Family:
    """A family whose attention modules are those with a layer of this name, and attend on its site or another one."""
    attention = {
        name.removesuffix(layer): attends or site
        for name, site in sites.items()
        if name.endswith(layer) and not site.flat
    }
    with_text = [name for name, site in attention.items() if site.joint or site.reads_text]
    return Family(sites, attention, _last_third(with_text))


def _flux(layers: Sequence[str], level: int) -> Family:
    """A block runs one attention; those of single-stream blocks have maps."""
    sites = {name: Site(*site.parts, level=level) if site.level else site for name, site in _by(_FLUX, layers).items()}
    matches = (re.match(r"(double|single)_blocks\.\d+", name) for name in layers)
    blocks = dict.fromkeys((match[0] for match in matches if match), Site("text", "image", level=level))
    return Family(sites, blocks, [name for name in blocks if name.startswith("single")])


def _last_third(names: Sequence[str]) -> Sequence[str]:
    """The attention whose maps show subjects, as in our pipelines."""
    return names[-max(1, len(names) // 3) :]


def _unet(model: nn.Module, layers: Sequence[str]) -> Family:
    """Blocks are numbered in the order in which they run, and the grid is halved and doubled between them."""
    sites: dict[str, Site] = {"out.2": Site("image")}
    sites |= {name: Site("row") for name in layers if name.startswith(("time_embed.", "label_emb."))}
    level = 0
    for block in _blocks(model):
        inside = [name for name in layers if name.startswith(f"{block}.")]
        level += any(name.endswith(".op") for name in inside)  # a strided convolution, whose output is coarser
        upsampled = {name for name in inside if re.fullmatch(r"output_blocks\.\d+\.\d+\.conv", name)}
        for name in inside:
            sites[name] = _in_block(name, level - (name in upsampled))
        level -= bool(upsampled)
    family = _of(sites, ".to_out.0")
    cross = {name: site.level for name, site in family.attention.items() if site.reads_text}
    down, up = ({level for name, level in cross.items() if name.startswith(side)} for side in _SIDES)
    # The coarsest grid with cross-attention on the way down and up, as in our pipelines.
    return replace(family, maps=[name for name, level in cross.items() if level == max(down & up, default=0)])


def _blocks(model: nn.Module) -> Sequence[str]:
    down, up = ([f"{side}.{i}" for i, _ in model.get_submodule(side).named_children()] for side in _SIDES)
    return [*down, "middle_block", *up]


def _in_block(name: str, level: int) -> Site:
    if ".emb_layers." in name:
        return Site("row")
    if name.endswith((".attn2.to_k", ".attn2.to_v")):
        return Site("text")
    return Site("image", level=level, reads_text=name.endswith(".attn2.to_out.0"))
