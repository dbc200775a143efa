"""What FLUX.3 alone has: texts padded to multiples of 80 tokens, a distilled model, one reference kept whole."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_flux3_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import save_file

from components import seeded
from flux3 import FLUX3, FLUX3_DISTILLED, flux3_transformer
from lora_compose import ComposePipeline, Concept, Merge, Tara
from lora_compose.attention import backbone_of
from lora_compose.pipelines.families import ComposeFlux3DistilledPipeline, ComposeFlux3Pipeline
from lora_compose.pipelines.formats.transformer_names import original_layers, swaps_halves
from pairs import slow_but
from transformer_families import (
    BOXES,
    CALL,
    CELLS,
    METHODS,
    PROMPT,
    Places,
    assert_equals_dense_deltas,
    dense_loras,
    last_layer,
    latents_of,
    merged,
    own_words,
    pipeline_with_concepts,
    plain_latents,
    random_lora_of_all,
)

LONG = f"{PROMPT}{' and a photo of grass' * 14}"
"""With the template 107 tokens, which are padded to 160."""
WHOLE = {**CALL, "max_sequence_length": 8192}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(FLUX3, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(FLUX3_DISTILLED, tmp_path_factory.mktemp("loras"))


def of_lengths(places_of: Any, rows: Sequence[bool], prompt: int, negative: int) -> Places:
    """Places in the texts of one call of diffusers' pipeline, which has conditional or unconditional rows alone."""
    found, tokens = places_of(FLUX3, rows), negative if rows[0] else prompt
    text = torch.nn.functional.pad(found.text, (0, 0, 0, max(0, tokens - found.text.shape[1])), mode="replicate")
    return Places(text[:, :tokens], found.image, found.modulation)


@pytest.mark.parametrize(("method", "places_of"), [(Merge(), merged), (Tara(), own_words)], ids=["merge", "tara"])
@pytest.mark.parametrize(("negative", "read"), [("the photo", 80), (f"the photo{' of grass' * 80}", 240)])
def test_each_row_reads_its_own_text_with_its_own_padding(pipe, method, places_of, negative, read):
    given = {**WHOLE, **FLUX3.guided, "prompt": LONG, "negative_prompt": negative}
    found = latents_of(pipe, **given, concepts=["cat", "dog"], method=method)
    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    with dense_loras(FLUX3, pipe.transformer, loras, lambda rows: of_lengths(places_of, rows, 160, read), guided=True):
        expected = plain_latents(FLUX3, pipe, **given)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("method", slow_but(["draft"], ["merge", "regional", "draft"]))
def test_prompts_that_are_padded_to_different_lengths_give_the_images_of_separate_calls(pipe, method):
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    given = {**WHOLE, **FLUX3.guided, "concepts": BOXES if method == "regional" else ["cat", "dog"], "method": method}
    both = latents_of(pipe, **given | {"prompt": [PROMPT, LONG]}, latents=noise)
    for i, prompt in enumerate((PROMPT, LONG)):
        alone = latents_of(pipe, **given | {"prompt": prompt}, latents=noise[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=3e-5, rtol=0)


@pytest.mark.parametrize("negative", ["the photo", f"the photo{' of grass' * 40}"])
def test_unconditional_rows_beside_texts_of_regions_are_those_of_the_base_model(pipe, negative):
    """Also where a region has a longer text than the image, or the negative prompt is the longest of all."""
    own = [BOXES[0].model_copy(update={"prompt": LONG.replace("zwx ", "")}), BOXES[1]]
    given = {**WHOLE, **FLUX3.guided, "num_inference_steps": 1, "negative_prompt": negative}
    seen: list[torch.Tensor] = []
    hook = last_layer(pipe.transformer).register_forward_hook(lambda _, __, output: seen.append(output[:1]))
    try:
        latents_of(pipe, **given, concepts=own, method="regional")
        latents_of(pipe, **given, concepts=[Concept(name="cat", weight=0.0)], method="merge")
    finally:
        hook.remove()
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("prompt", "tokens"), [(PROMPT, 80), (LONG, 160)])
def test_attention_has_a_mask_only_where_texts_are_padded_to_different_lengths(pipe, monkeypatch, prompt, tokens):
    attend, masks = torch.nn.functional.scaled_dot_product_attention, []

    def kept(query: torch.Tensor, *args: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        if query.shape[-2] == tokens + CELLS**2:  # no text encoder
            masks.append(attn_mask)
        return attend(query, *args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kept)
    given = {**WHOLE, **FLUX3.guided, "num_inference_steps": 1, "prompt": prompt}
    latents_of(pipe, **given, concepts=["cat", "dog"], method="merge")
    assert len(masks) == 3
    assert {mask is not None for mask in masks} == {prompt is LONG}


@pytest.mark.parametrize("method", METHODS)
def test_a_distilled_model_equals_dense_deltas(distilled, method):
    assert_equals_dense_deltas(FLUX3_DISTILLED, distilled, method, guided=False)


def test_a_distilled_model_without_concepts_is_diffusers_own(distilled):
    given = FLUX3_DISTILLED.unguided
    assert torch.equal(latents_of(distilled, **given), plain_latents(FLUX3_DISTILLED, distilled, **CALL, **given))


def test_a_distilled_model_reads_where_each_step_leads(distilled):
    """Also in the steps of a draft."""
    seen = []
    hook = distilled.transformer.register_forward_pre_hook(
        lambda _, __, named: seen.append((named["timestep"], named["target_timestep"])), with_kwargs=True
    )
    try:
        for method in ("merge", "draft"):
            latents_of(distilled, concepts=["cat", "dog"], method=method, **FLUX3_DISTILLED.unguided)
    finally:
        hook.remove()
    first, second = 1.0, distilled.scheduler.timesteps[1].item() / 1000
    pairs = {(round(t.item(), 4), round(target.item(), 4)) for t, target in seen}
    assert pairs == {(first, round(second, 4)), (round(second, 4), 0.0)}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of norms, which read fp32
def test_in_half_precision_a_concept_of_weight_0_changes_nothing(tmp_path):
    half = pipeline_with_concepts(FLUX3, tmp_path).to(torch.bfloat16)
    found = latents_of(half, concepts=[Concept(name="cat", weight=0.0)], method="merge", **FLUX3.unguided)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plain_latents(FLUX3, half, **CALL, **FLUX3.unguided))


@pytest.mark.parametrize(
    ("known", "kind"),
    [(FLUX3, ComposeFlux3Pipeline), (FLUX3_DISTILLED, ComposeFlux3DistilledPipeline)],
    ids=["guided", "distilled"],
)
def test_it_opens_as_diffusers_saves_it_and_the_other_way_round(known, kind, tmp_path):
    pipe = known.pipeline()
    pipe.save_pretrained(tmp_path)
    opened: Any = ComposePipeline.from_pretrained(tmp_path)
    assert type(opened) is kind
    found, expected = (latents_of(one, **known.unguided) for one in (opened, pipe))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # weights that are mapped lie elsewhere in memory
    plain: Any = known.plain(**opened.components).pipe
    assert type(plain).__name__ == type(opened).__name__
    other: Any = ComposePipeline.from_pipe(plain)
    assert type(other) is kind
    assert other.transformer is opened.transformer


@pytest.mark.parametrize("known", [FLUX3, FLUX3_DISTILLED], ids=["guided", "distilled"])
def test_the_call_has_the_inputs_of_the_modular_pipeline(known):
    pipe = known.pipeline()
    theirs = {one.name: one.default for one in pipe.modular().blocks.inputs if one.name is not None}
    ours = signature(type(pipe).__call__).parameters
    assert theirs.keys() - ours.keys() == {"timesteps", "image_cond_latents", "reference_crop"}
    for name in theirs.keys() & ours.keys():
        own = None if name in ("height", "width") else theirs[name]  # the model's own
        assert ours[name].default == (own if name != "num_images_per_prompt" else 1), name
    if known is FLUX3:
        assert ours["guidance_scale"].default == pipe.modular().guider.guidance_scale


def test_one_reference_is_kept_whole_and_the_image_has_its_size(pipe):
    """Also where it does not have whole tokens: what diffusers adds to it is cut away from the image."""
    reference = Image.effect_noise((70, 90), 80).convert("RGB")
    given = {**CALL, **FLUX3.unguided, "width": None, "height": None, "num_inference_steps": 1, "image": reference}
    nothing = [Concept(name="cat", weight=0.0)]
    ours, plain = (
        pipe(**given, **one, generator=seeded(3), output_type="np").images for one in ({"concepts": nothing}, {})
    )
    assert ours.shape == plain.shape == (1, 90, 70, 3)
    assert abs(ours - plain).max() < 1e-4
    assert pipe.size_from([reference]) == (80, 96)
    found = latents_of(pipe, **{**given, "width": 64, "height": 64}, concepts=nothing)
    assert found.shape[-2:] == (4, 4)


def test_latents_are_taken_with_patches_as_channels_too(pipe):
    packed = torch.randn(1, 16, CELLS, CELLS, generator=seeded(1))
    cells = torch.nn.functional.pixel_shuffle(packed, 2)
    for concepts in ({}, {"concepts": ["cat"], "method": "merge"}):
        found = [latents_of(pipe, latents=one, **FLUX3.unguided, **concepts) for one in (packed, cells)]
        assert torch.equal(*found)


def original(transformer: Any) -> Mapping[str, str]:
    """The names of the original checkpoint, by ours."""
    names = original_layers(transformer, list(backbone_of(transformer).sites))
    return {ours: theirs for theirs, each in names.items() for ours in each}


def test_the_names_of_the_original_checkpoint_are_those_of_diffusers_converter() -> None:
    transformer = flux3_transformer(flow_map=True)
    names = original(transformer)
    assert names.keys() == {name for name, one in transformer.named_modules() if isinstance(one, torch.nn.Linear)}
    weights: dict[str, Any] = {
        f"{theirs}.weight": transformer.get_submodule(ours).weight for ours, theirs in names.items()
    }
    converted = convert_flux3_transformer_checkpoint_to_diffusers(dict(weights))
    for ours in names:
        weight = weights[f"{names[ours]}.weight"]
        swapped = swaps_halves(ours, names[ours].replace(".", "_"))
        assert torch.equal(converted[f"{ours}.weight"], weight.roll(weight.shape[0] // 2, 0) if swapped else weight)
        assert swapped is (ours == "norm_out.linear")


def test_files_with_the_original_names_change_what_diffusers_converter_names(pipe, tmp_path):
    lora, names = random_lora_of_all(pipe.transformer, 2), original(pipe.transformer)
    in_blocks = {ours: theirs for ours, theirs in names.items() if "blocks." in ours}  # it knows no others
    file = {f"diffusion_model.{in_blocks[key]}.lora_A.weight": lora[key].down for key in in_blocks}
    file |= {f"diffusion_model.{in_blocks[key]}.lora_B.weight": lora[key].up for key in in_blocks}
    theirs = _convert_non_diffusers_flux3_lora_to_diffusers(file)
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, tmp_path / "bird.safetensors")
    pipe.load_concept(tmp_path / "bird.safetensors", trigger="xlo")
    (bird,) = pipe.resolve_concepts(["bird"])
    pipe.unload_concept("bird")
    assert {f"transformer.{name}.lora_A.weight" for name in bird.factors.model} == {
        key for key in theirs if key.endswith("lora_A.weight")
    }
    for name, factors in bird.factors.model.items():
        assert torch.equal(factors.down, theirs[f"transformer.{name}.lora_A.weight"])


REFUSED = {
    "no text": ({"max_sequence_length": 0}, "max_sequence_length must be at least 1"),
    "less guidance than none": ({"guidance_scale": 0.5}, "guidance_scale must be at least 1 with concepts"),
    "inpainting": ({"image": torch.zeros(1, 3, 128, 128), "mask_image": (0, 0, 8, 8)}, "inpaints nothing here"),
    "no prompt": ({"prompt": None}, "prompt"),
    "a method with gradients": ({"method": "lora-composer"}, "lora-composer needs cross-attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_in_words(pipe, case):
    given, why = REFUSED[case]
    with pytest.raises(ValueError, match=why):
        pipe(**{**CALL, "method": "merge", **given}, concepts=BOXES)


def test_a_distilled_model_has_neither_guidance_nor_negative_prompt(distilled):
    for name, value in (("guidance_scale", 3.5), ("negative_prompt", "a photo")):
        with pytest.raises(TypeError, match=f"unknown argument '{name}'"):
            distilled(**CALL, **{name: value}, concepts=["cat"])
    assert distilled.guided(5.0, None) == {}
    with pytest.raises(ValueError, match=r"FLUX\.3 distilled reads no negative prompt"):
        distilled.guided(5.0, "a photo")


def test_without_concepts_a_list_of_one_prompt_is_that_prompt_and_there_are_no_callbacks(pipe):
    given = {**FLUX3.unguided, "num_inference_steps": 1}
    assert torch.equal(latents_of(pipe, prompt=[PROMPT], **given), latents_of(pipe, **given))
    with pytest.raises(ValueError, match="modular pipelines have no callbacks"):
        latents_of(pipe, callback_on_step_end=lambda *_: {}, **given)
    with pytest.raises(ValueError, match=r"models of FLUX\.3 are opened with quantize='fp8' or without"):
        type(pipe).from_pretrained("nowhere", quantize="nf4")
