"""Files as real trainers write them are recognised, and every key finds its layer in the full architectures."""

import json
import re
from functools import cache
from typing import Any

import pytest
from torch import nn

from layouts import NAMES, file_of, layout, shapes_of, written_out
from lora_compose.compose.benchmark.architectures import FAMILIES, TRANSFORMERS, without_weights
from lora_compose.compose.lora.inspection import inspect
from lora_compose.pipelines.concepts.loading import LoraError, match
from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.formats.recognise import form, guess_family
from pairs import in_pairs, slow_but

USABLE = [name for name in NAMES if "refused" not in layout(name)]
REFUSED = [name for name in NAMES if "refused" in layout(name)]
ONE_OF_EACH = {(side, layout(name)[side]): name for name in reversed(USABLE) for side in ("form", "family")}.values()
"""The first layout of each form and of each family."""


@cache
def file(name: str) -> LoraFile:
    """The file of a layout, for tests that leave it as it is."""
    return file_of(layout(name))


def test_patterns_of_the_fixtures_are_written_out() -> None:
    assert list(written_out("a_{0..2}_b_{q,out_0}")) == [f"a_{i}_b_{p}" for i in range(3) for p in ("q", "out_0")]
    assert list(written_out("plain.weight")) == ["plain.weight"]


def test_there_are_layouts_of_many_trainers_each_with_a_source() -> None:
    known = [layout(name) for name in NAMES]
    assert len(known) >= 16
    assert len({one["form"] for one in known}) >= 10
    assert all(one["source"].startswith("https://github.com/") and one["writer"] for one in known)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_recognised(name: str) -> None:
    known = layout(name)
    shapes = shapes_of(known)
    assert form([*shapes]) == known["form"]
    guess = guess_family(shapes, known["metadata"])
    assert guess.family == known["family"]
    assert guess.supported == (known["family"] in FAMILIES)
    assert guess.why


@pytest.mark.parametrize(
    "name", slow_but(ONE_OF_EACH, [name for name in USABLE if layout(name).get("told_by") != "metadata"])
)
def test_the_family_is_known_from_keys_and_shapes_alone(name: str) -> None:
    known = layout(name)
    assert guess_family(shapes_of(known), {}).family == known["family"]


@pytest.mark.parametrize(
    "name", slow_but({*ONE_OF_EACH} - {"kohya-flux-oft"}, USABLE)
)  # it inverts thousands of blocks
def test_every_key_finds_its_layer_and_inspect_tells_the_same(name: str) -> None:
    known = layout(name)
    tensors = file(name).tensors
    said, factors = inspect(file(name), alpha=known.get("alpha"))
    assert factors is not None
    found = {factors.part: len(factors.model)} | {part: len(lora) for part, lora in factors.text_encoders.items()}
    assert found == known["layers"]
    assert factors.unmatched == ()
    assert [*factors.embeddings] == known.get("triggers", [])
    if "noted" in known:
        assert known["noted"] in " ".join(factors.notes)
    else:
        assert factors.complete or known.get("cut")
    if "scale" in known:
        assert {lora.scale for lora in factors.model.values()} == {known["scale"]}
    assert not set(known.get("dropped", ())) & tensors.keys()

    assert (said.form, said.family, said.problem) == (form([*tensors]), known["family"], None)
    json.dumps(said.model_dump())
    assert said.matched == len(tensors) - known.get("left_out", 0)
    counted = {part: sum(b.layers for b in said.blocks if b.part == part) for part in known["layers"]}
    assert counted == known["layers"]
    if known["form"].startswith(("DoRA", "OFT")):  # their changes depend on weights, which are not there
        assert all(block.norm is None for block in said.blocks)
    elif known["form"].startswith("T-LoRA"):  # with one number in all tensors the change is 0
        assert all(block.norm == 0 for block in said.blocks)
    else:
        assert all((block.norm or 0) > 0 for block in said.blocks)
    assert {word for word, where in said.triggers if "vectors" in where} == set(known.get("triggers", []))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_composed_is_refused_with_the_reason(name: str) -> None:
    known = layout(name)
    with pytest.raises(LoraError, match=known["refused"]):
        match(file(name), without_weights("SDXL" if known["family"] == "SDXL" else "SD 1.x"))


@pytest.mark.parametrize(("name", "family"), in_pairs(["kohya-sdxl", "kohya-sd15", "kohya-sd21"], FAMILIES))
def test_files_of_one_family_do_not_fit_another(name: str, family: str) -> None:
    known = layout(name)
    if family != known["family"]:
        with pytest.raises(LoraError, match=r"does not fit this model|fits this model in|matches no layer"):
            match(file(name), without_weights(family))


def test_a_whole_unet_asks_for_its_alpha_and_says_which_to_give() -> None:
    whole = file("tara-sd15-whole-unet")
    with pytest.raises(LoraError, match=r"does not contain its alpha.*a quarter.*alpha=32 .*alpha=8"):
        match(whole, without_weights("SD 1.x"))
    factors = match(whole, without_weights("SD 1.x"), alpha=8)
    assert {lora.scale for lora in factors.model.values()} == {1.0}


@pytest.mark.parametrize("name", ["kohya-sd15", "diffusers-0.35-sdxl"])
def test_an_alpha_beside_the_files_own_is_refused(name: str) -> None:
    with pytest.raises(LoraError, match="has its own alpha"):
        match(file(name), without_weights(layout(name)["family"]), alpha=16)


@pytest.mark.parametrize("alpha", [0.0, -4.0, float("nan"), float("inf")])
def test_alphas_that_are_no_positive_number_are_refused(alpha: float) -> None:
    changed = file_of(layout("kohya-sd15"))
    key = next(key for key in changed.tensors if key.endswith(".alpha"))
    changed.tensors[key].fill_(alpha)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(LoraError, match=r"gives .* no usable alpha: alpha is"):
        match(changed, without_weights("SD 1.x"))
    with pytest.raises(LoraError, match="alpha must be a positive number"):
        match(file("diffusers-0.14"), without_weights("SD 1.x"), alpha=alpha)


def test_a_part_that_fits_no_layer_is_reported_in_one_line() -> None:
    known: dict[str, Any] = layout("kohya-sd15")
    known["tensors"]["lora_unet_down_blocks_9_attentions_0_proj_in"] = {".lora_down.weight": [8, 320, 1, 1]}
    factors = match(file_of(known), without_weights("SD 1.x"))
    assert factors.unmatched == ("lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight",)
    assert "1 keys fit no layer and are left out: lora_unet_down_blocks_9" in factors.report
    assert "\n" not in factors.report


def test_text_encoder_layers_without_their_output_projection_are_all_kept() -> None:
    """diffusers' own converter loses keys of such a file."""
    known = layout("kohya-sd15")
    names = "lora_te_text_model_encoder_layers_{0..11}_self_attn_q_proj"
    known["tensors"] = {names: {".lora_down.weight": [8, 768], ".lora_up.weight": [768, 8], ".alpha": []}}
    factors = match(file_of(known), without_weights("SD 1.x"))
    assert len(factors.text_encoders["text_encoder"]) == 12
    assert factors.complete


def test_what_kohya_writes_about_training_is_shown() -> None:
    found, _ = inspect(file("kohya-sd15"))
    assert ("sks cat", "name of a folder of training images") in found.triggers
    assert ("grass", "in 3 captions") in found.triggers
    assert dict(found.facts)["images"] == "120"
    (block,) = [block for block in found.blocks if block.name == "mid_block"]
    assert (block.ranks, block.alphas, block.layers) == ((8,), (1.0,), 12)
    assert re.search(r"cross-attention reads text of width 768", found.why[0])


@pytest.mark.parametrize(("written", "opened"), [("FLUX.1", "Qwen-Image"), ("Qwen-Image", "FLUX.1")])
def test_transformers_that_share_names_and_shapes_of_layers_are_told_apart(written: str, opened: str) -> None:
    model = without_weights(written).transformer
    pattern = {
        f"transformer.{name}": {
            ".lora_A.weight": [4, layer.in_features], ".lora_B.weight": [layer.out_features, 4],
        }
        for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks." in name
    }  # fmt: skip
    with pytest.raises(
        LoraError, match=rf"fits this model in \d+ of its \d+ layers only.*looks like a file for {written}"
    ):
        match(file_of({"tensors": pattern, "metadata": {}}), without_weights(opened))


KOHYA_METADATA = [{"modelspec.architecture": "chroma/lora"}, {"ss_base_model_version": "chroma"}]


@pytest.mark.parametrize("metadata", KOHYA_METADATA)
def test_layers_that_flux_1_and_chroma_share_are_those_of_the_model_that_the_metadata_name(metadata: Any) -> None:
    shapes = shapes_of(layout("kohya-flux"))
    assert guess_family(shapes, metadata).family == "Chroma"
    alone = guess_family(shapes, {})
    assert alone.family == "FLUX.1"
    assert "layers of Chroma have the same names and sizes" in alone.why
    with_modulation = {**shapes, "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": [16, 3072]}
    found = guess_family(with_modulation, metadata)
    assert found.family == "FLUX.1", "Chroma has no layers that make the modulation"
    assert not any("Chroma have" in reason for reason in found.why)


FLUX3 = (
    "diffusion_model.content_mode_blocks.image.0.q_proj", "diffusion_model.txt_mode_blocks.3.mlp_in",
    "diffusion_model.single_blocks.7.attn_out", "transformer.mode_blocks.image.0.attn.to_q",
    "transformer.single_transformer_blocks.7.ff.linear_in", "transformer.single_transformer_blocks.7.attn.to_out.0",
)  # fmt: skip


@pytest.mark.parametrize("layer", FLUX3)
def test_files_of_flux_3_are_named(layer: str) -> None:
    guess = guess_family({f"{layer}.lora_A.weight": [16, 4608], f"{layer}.lora_B.weight": [4608, 16]}, {})
    assert (guess.family, guess.supported) == ("FLUX.3", True)


PARTS = (
    "", r"attn|attention", r"[._](?:to_)?(?:qkv|[qkv])(?:_proj)?$", r"[._](?:ff|mlp|img_mlp|txt_mlp|feed_forward)[._]",
)  # fmt: skip
"""Layers that people train, of all those in the blocks: all, attention, queries to values, feed-forward."""
SPELLED: dict[str, tuple[str, str]] = {"diffusers": ("transformer.", "."), "kohya": ("lora_unet_", "_")}


@pytest.mark.parametrize(("family", "spelling"), in_pairs(TRANSFORMERS, SPELLED))
def test_a_part_of_a_files_layers_is_not_taken_for_another_familys(family: str, spelling: str) -> None:
    """Also those of one name alone, as `single_transformer_blocks.*.attn.to_q`."""
    (prefix, dot), layers = SPELLED[spelling], {}
    for name, layer in without_weights(family).transformer.named_modules():
        if isinstance(layer, nn.Linear) and re.search(r"blocks\.|layers\.\d", name):
            layers[name] = layer
    parts = {part: [name for name in layers if re.search(part, name)] for part in PARTS}
    for name in layers:
        parts.setdefault(re.sub(r"\.\d+\.", "..", name), []).append(name)
    for part, names in parts.items():
        shapes: dict[str, list[int]] = {}
        for name in names:
            key = prefix + name.replace(".", dot)
            shapes[f"{key}.lora_down.weight"] = [16, layers[name].in_features]
            shapes[f"{key}.lora_up.weight"] = [layers[name].out_features, 16]
        assert shapes
        guess = guess_family(shapes, {})
        # Chroma's blocks are FLUX.1's; some layers are named as in many models.
        named = ("FLUX.1", "Chroma") if family == "Chroma" else (family,)
        assert not guess.supported or guess.family in named, part


def test_queries_of_single_blocks_may_be_those_of_two_families() -> None:
    names = [f"transformer.single_transformer_blocks.{block}.attn.to_q" for block in range(28)]
    shapes = {f"{name}.{side}.weight": [3072, 3072] for name in names for side in ("lora_A", "lora_B")}
    guess = guess_family(shapes, {})
    assert (guess.family, guess.supported) == ("FLUX.1 or FLUX.3", False)


def test_metadata_name_chroma_by_its_repository() -> None:
    guess = guess_family(shapes_of(layout("kohya-flux")), {"base_model": "lodestones/Chroma1-HD"})
    assert (guess.family, guess.supported) == ("Chroma", True)


@pytest.mark.parametrize(
    ("names", "sides", "family"),
    [
        ("transformer_blocks.{}.attn.to_q", (3072, 3072), "Qwen-Image"),
        ("transformer_blocks.{}.attn2.to_k", (2048, 1024), "Anima"),
        ("blocks.{}.mlp.layer1", (8192, 2048), "Anima"),
        ("double_blocks.{}.img_attn.qkv", (18432, 6144), "FLUX.2-dev"),
        ("transformer_blocks.{}.attn.add_q_proj", (4096, 4096), "FLUX.2-klein 9B"),
        ("single_transformer_blocks.{}.attn.to_k", (3072, 3072), "FLUX.1"),
    ],
)
def test_few_layers_are_enough_where_no_other_family_has_them(names: str, sides: tuple[int, int], family: str) -> None:
    outputs, inputs = sides
    shapes = {}
    for block in range(60 if family == "Qwen-Image" else 38 if family == "FLUX.1" else 8):
        layer = f"diffusion_model.{names.format(block)}"
        shapes |= {f"{layer}.lora_A.weight": [8, inputs], f"{layer}.lora_B.weight": [outputs, 8]}
    guess = guess_family(shapes, {})
    assert (guess.family, guess.supported) == (family, True)
