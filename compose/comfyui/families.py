"""What a model of ComfyUI is made of: every layer that a LoRA may change, with the sequence that it works on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_compose.attention import Site

_FLUX = (
    (r"(time|vector|guidance)_in\.\w+_layer", Site("modulation")),
    (r".+_blocks\.\d+\.(img_mod|txt_mod|modulation)\.lin", Site("modulation", extra_axis=True)),
    (r"(double|single)_stream_modulation(_img|_txt)?\.lin", Site("modulation", extra_axis=True)),
    (r"final_layer\.adaLN_modulation\.1", Site("modulation", extra_axis=True)),
    (r"single_blocks\.\d+\.linear[12]", Site("text", "image", level=1)),
    (r"txt_in|double_blocks\.\d+\.txt_(attn|mlp)\..+", Site("text")),
    (r"img_in|final_layer\.linear|double_blocks\.\d+\.img_(attn|mlp)\..+", Site("image", level=1)),
)
_IS_FLUX = frozenset({"txt_in", "vector_in.in_layer", "double_blocks.0.img_mod.lin", "single_blocks.0.modulation.lin"})
_IS_FLUX2 = frozenset({"txt_in", "double_stream_modulation_img.lin", "single_stream_modulation.lin"})
_IS_UNET = frozenset({"time_embed.0", "input_blocks.0.0", "middle_block.0.in_layers.2", "out.2"})
_SIDES = ("input_blocks", "output_blocks")
_SUPPORTED = "the UNets of Stable Diffusion 1.x, 2.x and XL, FLUX.1 and FLUX.2"


@dataclass(frozen=True)
class Family:
    """What is known of a model.

    Attributes:
        sites: The layers that a LoRA may change, by name.
        attention: The modules whose `forward` runs one attention: the grid of its cells, and the text that they see.
        maps: Those whose attention shows where subjects are; all of one grid.
        least_tokens: To so many tokens ComfyUI fills texts with zeros, in front.
    """

    sites: Mapping[str, Site]
    attention: Mapping[str, Site]
    maps: Sequence[str]
    least_tokens: int = 0

    @property
    def map_level(self) -> int:
        """The level of the maps."""
        return self.attention[self.maps[0]].level

    @property
    def joint(self) -> Site | None:
        """How text and image lie in one sequence; None in UNets."""
        site = next(iter(self.attention.values()))
        return site if site.joint else None


def family_of(model: nn.Module) -> Family:
    """What is known of a `diffusion_model`.

    Raises:
        ValueError: If it is of a family that is not supported.
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if _IS_FLUX.issubset(layers):
        return _joint(layers, level=1)
    if _IS_FLUX2.issubset(layers) and not any("gate_proj" in name for name in layers):
        return _joint(layers, level=0, least_tokens=512)  # a cell of its latents is a patch
    reads_text = any(name.endswith(".attn2.to_k") for name in layers)
    if _IS_UNET.issubset(layers) and reads_text and not any("time_stack" in name for name in layers):
        return _unet(model, layers)
    raise ValueError(
        f"concepts cannot act in this model, a {type(model).__name__} in ComfyUI; they act in {_SUPPORTED}. A "
        "quantised model may have layers of another kind: then load it in fp16 or bf16"
    )


def _joint(layers: Sequence[str], level: int, least_tokens: int = 0) -> Family:
    """FLUX.1 or FLUX.2; maps are those of the last third of the double-stream blocks, as in our pipelines."""
    sites = {name: site for name in layers for pattern, site in _FLUX if re.fullmatch(pattern, name)}
    sites = {name: _on(site, level) for name, site in sites.items()}
    found = (re.match(r"(double|single)_blocks\.\d+", name) for name in layers)
    blocks = dict.fromkeys((match[0] for match in found if match), Site("text", "image", level=level))
    double = [name for name in blocks if name.startswith("double")]
    return Family(sites, blocks, double[-max(1, len(double) // 3) :], least_tokens)


def _on(site: Site, level: int) -> Site:
    return Site(*site.parts, level=level) if site.level else site


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
    found = re.compile(r"(.+\.attn[12])\.to_out\.0")
    attention = {match[1]: site for name, site in sites.items() if (match := found.fullmatch(name))}
    cross = {name: site.level for name, site in attention.items() if site.reads_text}
    down, up = ({level for name, level in cross.items() if name.startswith(side)} for side in _SIDES)
    # The coarsest grid with cross-attention on the way down and up, as in our pipelines.
    return Family(sites, attention, [name for name, level in cross.items() if level == max(down & up, default=0)])


def _blocks(model: nn.Module) -> Sequence[str]:
    down, up = ([f"{side}.{i}" for i, _ in model.get_submodule(side).named_children()] for side in _SIDES)
    return [*down, "middle_block", *up]


def _in_block(name: str, level: int) -> Site:
    if ".emb_layers." in name:
        return Site("row")
    if name.endswith((".attn2.to_k", ".attn2.to_v")):
        return Site("text")
    return Site("image", level=level, reads_text=name.endswith(".attn2.to_out.0"))
