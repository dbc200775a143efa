"""Models are known by the names of their modules: here trees of torch's own layers with ComfyUI's names."""

import pytest
from torch import nn

from lora_compose.attention import Site
from lora_compose.compose.comfyui.families import family_of

UNET = """time_embed.0 time_embed.2 input_blocks.0.0* input_blocks.1.0.in_layers.2* input_blocks.1.0.emb_layers.1
input_blocks.1.1.proj_in* input_blocks.1.1.transformer_blocks.0.attn1.to_q
input_blocks.1.1.transformer_blocks.0.attn2.to_k input_blocks.1.1.transformer_blocks.0.attn2.to_out.0
input_blocks.2.0.op* input_blocks.3.0.in_layers.2* middle_block.0.in_layers.2*
output_blocks.0.0.in_layers.2* output_blocks.0.1.conv* output_blocks.1.0.in_layers.2* out.2*"""
FLUX = """img_in txt_in time_in.in_layer vector_in.in_layer double_blocks.0.img_mod.lin double_blocks.0.txt_attn.qkv
double_blocks.0.img_mlp.0 single_blocks.0.linear1 single_blocks.0.modulation.lin final_layer.linear
final_layer.adaLN_modulation.1"""


class Tree(nn.Module):
    """Layers by name; a star is a convolution."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names.split():
            *path, last = name.removesuffix("*").split(".")
            here: nn.Module = self
            for part in path:
                if part not in here._modules:
                    here.add_module(part, nn.Module())
                here = here.get_submodule(part)
            here.add_module(last, nn.Conv2d(4, 4, 3) if name.endswith("*") else nn.Linear(4, 4))


def test_layers_of_a_unet_lie_on_the_grid_of_their_block() -> None:
    family, block = family_of(Tree(UNET)), "input_blocks.1.1.transformer_blocks.0"
    sites = family.sites
    assert len(sites) == len(UNET.split())
    assert family.attention == {f"{block}.attn2": Site("image", reads_text=True)}
    assert family.joint is None
    assert sites["time_embed.2"] == sites["input_blocks.1.0.emb_layers.1"] == Site("row")
    assert sites[f"{block}.attn2.to_k"] == Site("text")
    assert sites[f"{block}.attn2.to_out.0"] == Site("image", reads_text=True)
    levels = {
        name: site.level for name, site in sites.items() if name.endswith(("in_layers.2", ".op", ".conv", "out.2"))
    }
    assert levels == {
        "input_blocks.1.0.in_layers.2": 0, "input_blocks.2.0.op": 1, "input_blocks.3.0.in_layers.2": 1,
        "middle_block.0.in_layers.2": 1, "output_blocks.0.0.in_layers.2": 1, "output_blocks.0.1.conv": 0,
        "output_blocks.1.0.in_layers.2": 0, "out.2": 0,
    }  # fmt: skip


def test_layers_of_flux_work_on_text_and_image() -> None:
    family = family_of(Tree(FLUX))
    sites = family.sites
    assert list(family.attention) == ["double_blocks.0", "single_blocks.0"]
    assert list(family.maps) == ["double_blocks.0"]
    assert family.joint == Site("text", "image", level=1)
    assert len(sites) == len(FLUX.split())
    assert sites["single_blocks.0.linear1"] == Site("text", "image", level=1)
    assert sites["double_blocks.0.txt_attn.qkv"] == sites["txt_in"] == Site("text")
    assert sites["double_blocks.0.img_mlp.0"] == sites["final_layer.linear"] == Site("image", level=1)
    assert sites["double_blocks.0.img_mod.lin"] == Site("modulation", extra_axis=True)
    assert sites["vector_in.in_layer"] == Site("modulation")


def test_layers_of_flux2_share_their_modulation_and_work_on_all_cells_of_the_latents() -> None:
    names = FLUX.replace("vector_in.in_layer", "double_stream_modulation_img.lin")
    names = names.replace("double_blocks.0.img_mod.lin", "double_stream_modulation_txt.lin")
    family = family_of(Tree(names.replace("single_blocks.0.modulation.lin", "single_stream_modulation.lin")))
    assert len(family.sites) == len(FLUX.split())
    assert family.sites["single_blocks.0.linear1"] == Site("text", "image")
    assert family.sites["double_blocks.0.img_mlp.0"] == Site("image")
    assert family.sites["single_stream_modulation.lin"] == Site("modulation", extra_axis=True)
    assert family.joint == Site("text", "image")


@pytest.mark.parametrize(
    "names",
    [
        "layers.0.attention.qkv x_embedder",
        FLUX.replace("vector_in.in_layer", "distilled_guidance_layer.in_proj"),  # Chroma
        UNET + " input_blocks.1.1.time_stack.0.attn1.to_q",  # video
    ],
)
def test_other_families_are_refused_by_name(names: str) -> None:
    with pytest.raises(ValueError, match=r"a Tree in ComfyUI; they act in the UNets of .*, FLUX\.1 and FLUX\.2"):
        family_of(Tree(names))
