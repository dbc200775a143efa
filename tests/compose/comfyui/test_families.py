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

    def __init__(self, names: str, **settings: int | None) -> None:
        super().__init__()
        vars(self).update(settings)
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
    assert list(family.maps) == ["single_blocks.0"]
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


Z_IMAGE = """x_embedder cap_embedder.1 t_embedder.mlp.0 noise_refiner.0.attention.qkv
noise_refiner.0.adaLN_modulation.0 context_refiner.0.attention.qkv context_refiner.0.feed_forward.w1
layers.0.attention.qkv layers.0.attention.out layers.0.adaLN_modulation.0 final_layer.linear"""
QWEN_IMAGE = """img_in txt_in time_text_embed.timestep_embedder.linear_1 transformer_blocks.0.img_mod.1
transformer_blocks.0.attn.to_q transformer_blocks.0.attn.add_q_proj transformer_blocks.0.attn.to_out.0
transformer_blocks.0.attn.to_add_out transformer_blocks.0.txt_mlp.net.0.proj norm_out.linear proj_out"""
KREA2 = """first tmlp.0 tproj.1 txtmlp.1 txtfusion.projector txtfusion.layerwise_blocks.0.attn.wq
txtfusion.refiner_blocks.0.attn.wq txtfusion.refiner_blocks.0.mlp.up blocks.0.attn.wq blocks.0.attn.gate
blocks.0.mlp.down last.linear"""
ANIMA = """x_embedder.proj.1 t_embedder.1.linear_1 blocks.0.self_attn.output_proj blocks.0.cross_attn.q_proj
blocks.0.cross_attn.k_proj blocks.0.cross_attn.output_proj blocks.0.adaln_modulation_self_attn.1 blocks.0.mlp.layer1
final_layer.linear final_layer.adaln_modulation.2"""


def test_text_and_image_of_z_image_are_filled_up_in_its_blocks_and_not_before() -> None:
    family = family_of(Tree(Z_IMAGE, patch_size=2, pad_tokens_multiple=32))
    sites = family.sites
    assert len(sites) == len(Z_IMAGE.split())
    assert family.joint == sites["layers.0.attention.out"] == Site("text", "image", level=1, multiple=32)
    assert family.attention["context_refiner.0.attention"] == Site("text", multiple=32)
    assert family.attention["noise_refiner.0.attention"] == Site("image", level=1, multiple=32)
    assert list(family.maps) == ["layers.0.attention"]
    assert sites["cap_embedder.1"] == Site("text")
    assert sites["x_embedder"] == Site("image", level=1)
    assert sites["noise_refiner.0.adaLN_modulation.0"] == Site("modulation")


def test_text_and_image_of_qwen_image_meet_in_attention_alone() -> None:
    family = family_of(Tree(QWEN_IMAGE, patch_size=2))
    sites = family.sites
    assert len(sites) == len(QWEN_IMAGE.split())
    assert family.attention == {"transformer_blocks.0.attn": Site("text", "image", level=1)}
    assert family.positions == "pe_embedder"
    assert sites["transformer_blocks.0.attn.add_q_proj"] == sites["txt_in"] == Site("text")
    assert sites["transformer_blocks.0.attn.to_q"] == sites["proj_out"] == Site("image", level=1)


def test_krea_2_refines_its_text_before_it_is_joined_to_the_image() -> None:
    family = family_of(Tree(KREA2, patch=2))
    sites = family.sites
    assert len(sites) == len(KREA2.split())
    both = Site("text", "image", level=1)
    assert family.attention == {"txtfusion.refiner_blocks.0.attn": Site("text"), "blocks.0.attn": both}
    assert list(family.maps) == ["blocks.0.attn"]
    assert family.joint == sites["blocks.0.attn.gate"] == sites["last.linear"] == both
    assert sites["txtfusion.layerwise_blocks.0.attn.wq"] == Site("text", flat=True, extra_axis=True)
    assert sites["txtfusion.projector"] == Site("text", extra_axis=True)
    assert sites["txtmlp.1"] == sites["txtfusion.refiner_blocks.0.mlp.up"] == Site("text")
    assert sites["first"] == Site("image", level=1)
    assert sites["tproj.1"] == Site("modulation", extra_axis=True)


def test_the_image_of_anima_reads_text_by_cross_attention() -> None:
    family = family_of(Tree(f"{ANIMA} llm_adapter.blocks.0.cross_attn.q_proj"))
    sites = family.sites
    assert len(sites) == len(ANIMA.split()), "the adapter has run before"
    assert family.joint is None
    assert list(family.maps) == ["blocks.0.cross_attn"]
    assert family.attention["blocks.0.self_attn"] == Site("image", level=1)
    assert sites["blocks.0.cross_attn.k_proj"] == Site("text")
    assert sites["blocks.0.cross_attn.output_proj"] == Site("image", level=1, reads_text=True)
    assert sites["blocks.0.mlp.layer1"] == sites["x_embedder.proj.1"] == Site("image", level=1, planar=True)


def test_one_network_makes_the_modulation_of_all_blocks_of_chroma() -> None:
    names = FLUX.replace("vector_in.in_layer", "distilled_guidance_layer.in_proj").replace("time_in.in_layer", "")
    family = family_of(Tree(names))
    assert family.sites["distilled_guidance_layer.in_proj"] == Site("modulation", extra_axis=True)
    assert family.joint == Site("text", "image", level=1)


@pytest.mark.parametrize(
    "tree",
    [
        Tree("layers.0.attention.qkv x_embedder"),
        Tree(Z_IMAGE, patch_size=2, pad_tokens_multiple=None),  # Lumina 2
        Tree(Z_IMAGE, patch_size=16, pad_tokens_multiple=32),  # Z-Image on pixels
        Tree(QWEN_IMAGE, patch_size=1),  # Mage-Flow
        Tree(KREA2, patch=1),
        Tree(FLUX.replace("img_in", "img_in_patch").replace("vector_in.in_layer", "nerf_blocks.0.norm")),
        Tree(UNET + " input_blocks.1.1.time_stack.0.attn1.to_q"),  # video
    ],
)
def test_other_families_are_refused_by_name(tree: Tree) -> None:
    with pytest.raises(ValueError, match=r"a Tree in ComfyUI; they act in the UNets of .*, FLUX\.1, .* and Anima"):
        family_of(tree)
