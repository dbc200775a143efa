"""Reference images, several and of different sizes: LoRAs act in the cells of the image, elsewhere on request."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as diffusers_own
from torch import Tensor

from components import seeded
from flux2 import FLUX2
from flux2_dev import FLUX2_DEV
from flux3 import FLUX3
from flux_kontext import KONTEXT
from lora_compose import Clora, ComposePipeline, Composite, Concept, Draft, FreeFuse, Merge, Regional, Switch
from lora_compose.attention import backbone_of
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.pipelines.calls.memory import least_bytes
from lora_compose.pipelines.families import ComposeFluxKontextPipeline
from lora_compose.pipelines.families.opening import configuration
from pairs import in_pairs, slow_but
from qwen_image_edit import NAVY, ORANGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2511, REFERENCE_TOKENS
from transformer_families import (
    BOXES,
    CALL,
    CELLS,
    METHODS,
    PROMPT,
    TOKENS,
    Family,
    Places,
    as_file,
    dense_loras,
    latents_of,
    pipeline_with_concepts,
    plain_latents,
    random_lora_of_all,
)


@dataclass(frozen=True)
class Reading:
    """A family that reads reference images.

    Attributes:
        image: Reference images, which are cut to whole tokens of 16 pixels.
        tokens: Of all of them.
        further: Arguments of every call.
        guided: Whether there are unconditional rows.
    """

    family: Family
    image: Any
    tokens: int
    further: Mapping[str, Any] = field(default_factory=dict)
    guided: bool = True

    @property
    def call(self) -> dict[str, Any]:
        guidance = self.family.guided if self.guided else self.family.unguided
        return {**CALL, "num_inference_steps": 1, **guidance, "image": self.image, **self.further}


READING = {
    "klein": Reading(FLUX2, [NAVY, ORANGE], 4 * 6 + 5 * 4),
    "dev": Reading(FLUX2_DEV, [NAVY, ORANGE], 4 * 6 + 5 * 4, guided=False),
    "kontext": Reading(KONTEXT, NAVY, 4 * 6, {"_auto_resize": False}),
    "flux3": Reading(FLUX3, [NAVY, ORANGE], 4 * 6 + 5 * 4),
    "qwen": Reading(QWEN_IMAGE_EDIT, [NAVY, ORANGE], REFERENCE_TOKENS),
    "qwen-2511": Reading(QWEN_IMAGE_EDIT_2511, [NAVY, ORANGE], REFERENCE_TOKENS),
}


ALL = [pytest.param(name, marks=pytest.mark.slow) if name == "qwen" else name for name in READING]


@pytest.fixture(params=ALL, scope="module")
def reading(request: pytest.FixtureRequest) -> Reading:
    return READING[request.param]


@pytest.fixture(scope="module")
def pipe(reading: Reading, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(reading.family, tmp_path_factory.mktemp("loras"))


def expected_of(reading: Reading, pipe: Any, places_of: Any, acts: Sequence[bool] = (False, False)) -> Tensor:
    """diffusers' pipeline with dense deltas; on references those that act there are as strong as in any cell."""

    def placed(unconditional: Any) -> Places:
        found = places_of(reading.family, unconditional)
        most = found.image.amax(dim=1, keepdim=True) * torch.tensor(acts)
        return replace(found, image=torch.cat([found.image, most.expand(-1, reading.tokens, -1)], dim=1))

    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    with dense_loras(reading.family, pipe.transformer, loras, placed, guided=reading.guided):
        return plain_latents(reading.family, pipe, **reading.call)


def test_without_concepts_it_is_diffusers_own(reading, pipe):
    assert torch.equal(latents_of(pipe, **reading.call), plain_latents(reading.family, pipe, **reading.call))


@pytest.mark.parametrize(
    ("reading", "method"), in_pairs(slow_but(["kontext", "flux3", "qwen-2511"], READING), METHODS), indirect=["reading"]
)
def test_loras_act_in_the_cells_of_the_image_alone(reading, pipe, method):
    settings, concepts, places = METHODS[method]
    found = latents_of(pipe, **reading.call, concepts=concepts, method=settings)
    torch.testing.assert_close(found, expected_of(reading, pipe, places), atol=3e-5, rtol=0)


@pytest.mark.parametrize("reading", ["qwen"], indirect=True)
def test_an_edit_of_2509_has_references_at_the_timestep_of_the_image(reading, pipe):
    plain = plain_latents(reading.family, pipe, **reading.call)
    assert torch.equal(latents_of(pipe, **reading.call), plain)
    settings, concepts, places = METHODS["regional"]
    found = latents_of(pipe, **reading.call, concepts=concepts, method=settings)
    torch.testing.assert_close(found, expected_of(reading, pipe, places), atol=3e-5, rtol=0)
    assert (found - plain).abs().max() > 0.01
    of_2511 = QWEN_IMAGE_EDIT_2511.pipeline()  # which has them at timestep 0
    of_2511.transformer.load_state_dict(pipe.transformer.state_dict())
    assert (plain_latents(QWEN_IMAGE_EDIT_2511, of_2511, **reading.call) - plain).abs().max() > 1e-3


ACTING = {
    "both": ("merge", (True, True)),
    "the first": ("merge", (True, False)),
    "regional": ("regional", (False, True)),
}


@pytest.mark.parametrize(
    ("reading", "acting"), in_pairs(slow_but(["klein", "dev", "kontext"], READING), ACTING), indirect=["reading"]
)
def test_a_concept_may_act_on_references_too(reading, pipe, acting):
    method, acts = ACTING[acting]
    settings, concepts, places = METHODS[method]
    named = [concept if isinstance(concept, Concept) else Concept(name=concept) for concept in concepts]
    given = [concept.model_copy(update={"references": on}) for concept, on in zip(named, acts, strict=True)]
    found = latents_of(pipe, **reading.call, concepts=given, method=settings)
    torch.testing.assert_close(found, expected_of(reading, pipe, places, acts), atol=3e-5, rtol=0)


def test_maps_are_those_of_the_cells_of_the_image(reading, pipe):
    output = pipe(**reading.call, concepts=["cat", "dog"], method="draft", record_attention=[0], output_type="latent")
    assert output.attention_maps.shape == (1, 1, 2, CELLS, CELLS)
    assert 0 < output.attention_maps.sum(dim=2).max() < 1, "cells attend to references as well"


def test_nothing_of_a_call_stays_in_the_transformer(reading, pipe):
    before = {name: (module, getattr(module, "processor", None)) for name, module in pipe.transformer.named_modules()}
    latents_of(pipe, **reading.call, concepts=["cat", "dog"], method="tara", record_attention=True)
    after = {name: (module, getattr(module, "processor", None)) for name, module in pipe.transformer.named_modules()}
    assert after == before


@pytest.mark.slow
def test_images_are_decoded_as_in_diffusers(reading, pipe):
    given = {**reading.call, "num_inference_steps": 1, "output_type": "np"}
    nothing = [Concept(name="cat", weight=0.0)]
    ours, plain = (pipe(**given, **one, generator=seeded(3)).images for one in ({"concepts": nothing}, {}))
    assert ours.shape == plain.shape == (1, 128, 128, 3)
    assert abs(ours - plain).max() < 1e-4


@pytest.mark.slow
def test_one_merged_lora_that_acts_on_references_too_is_that_of_diffusers(reading, pipe):
    everywhere = [Concept(name="cat", references=True)]
    found = latents_of(pipe, concepts=everywhere, method="merge", **reading.call)
    other = copy.deepcopy(pipe)
    other.load_lora_weights(as_file(random_lora_of_all(pipe.transformer, 0)))
    torch.testing.assert_close(found, plain_latents(reading.family, other, **reading.call), atol=3e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Switch(), Composite()])
def test_methods_that_take_one_lora_at_a_time_merge_a_single_one(reading, pipe, method):
    alone = latents_of(pipe, concepts=["cat"], method="merge", **reading.call)
    found = latents_of(pipe, concepts=["cat"], method=method, **reading.call)
    torch.testing.assert_close(found, alone, atol=3e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Draft(length=1), FreeFuse(length=1), Clora(fuse="branches")])
def test_methods_that_find_regions_run_with_references_and_change_the_image(reading, pipe, method):
    found = latents_of(pipe, concepts=["cat", "dog"], method=method, **reading.call)
    assert found.isfinite().all()
    assert not torch.allclose(found, plain_latents(reading.family, pipe, **reading.call), atol=1e-3)


@pytest.mark.slow
def test_a_compiled_transformer_gives_the_same(reading, pipe):
    eager = latents_of(pipe, concepts=BOXES, method="regional", **reading.call)
    compiled = copy.copy(pipe)
    compiled.register_modules(transformer=torch.compile(pipe.transformer, backend="eager"))
    found = latents_of(compiled, concepts=BOXES, method="regional", **reading.call)
    torch.testing.assert_close(found, eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reading", ["klein"], indirect=True)
def test_without_a_size_images_have_that_of_the_first_reference(reading, pipe):
    given = {**reading.call, "width": None, "height": None, "num_inference_steps": 1}
    found = pipe(**given, concepts=["cat"], method="merge", output_type="latent").images
    assert found.shape[-2:] == (12, 8)


def test_what_is_no_image_is_refused(reading, pipe):
    with pytest.raises(ValueError, match="reference images are PIL images, paths or 8-bit arrays, not tensors"):
        pipe(**{**reading.call, "image": torch.rand(3, 64, 64)}, concepts=["cat"])


@pytest.mark.parametrize("reading", ["kontext"], indirect=True)
def test_kontext_refuses_another_area_several_images_and_a_strength(reading, pipe):
    call = {**reading.call, "concepts": BOXES}
    with pytest.raises(ValueError, match=r"max_area=16384 pixels, here 128 x 128 for 256 x 256, in which regions .*"):
        pipe(**{**call, "width": 256, "height": 256})
    with pytest.raises(ValueError, match="reads one reference image with concepts, the same for all prompts, not 2"):
        pipe(**{**call, "image": [NAVY, ORANGE]})
    with pytest.raises(ValueError, match=r"no image-to-image for FLUX.1 Kontext; it has inpainting: give mask_image"):
        pipe(**{**call, "image": NAVY}, strength=0.5)


@pytest.mark.parametrize("reading", ["kontext"], indirect=True)
def test_kontext_reads_references_at_a_size_that_it_knows(reading, pipe):
    found = pipe._references(NAVY, True)[0]
    assert found.shape == (1, 3, 1248, 832)
    assert pipe._of_area(640, 640, 1024**2) == (1024, 1024)


@pytest.mark.parametrize("reading", ["kontext"], indirect=True)
def test_kontext_opens_by_its_own_name(reading, pipe, tmp_path):
    assert type(ComposePipeline.from_pipe(FluxKontextPipeline(**pipe.components))) is ComposeFluxKontextPipeline
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxKontextPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}'
    )
    assert ComposePipeline.family_of(configuration(str(tmp_path))) is ComposeFluxKontextPipeline


@pytest.mark.parametrize("reading", ["dev"], indirect=True)
def test_dev_refuses_a_rewritten_prompt_and_masks(reading, pipe):
    call = {**reading.call, "concepts": ["cat"]}
    with pytest.raises(ValueError, match="caption_upsample_temperature has the text encoder rewrite the prompt"):
        pipe(**call, caption_upsample_temperature=0.1)
    with pytest.raises(ValueError, match=r"FLUX\.2-dev reads image as a reference image, and inpaints nothing here"):
        pipe(**{**call, "image": NAVY}, mask_image=(0, 0, 32, 32))


@pytest.mark.parametrize("reading", ["dev", "qwen-2511"], indirect=True)
def test_embeddings_alone_need_no_processor(reading, pipe, monkeypatch):
    given = {name: value for name, value in reading.call.items() if name not in ("prompt", "negative_prompt")}
    how = {name: given[name] for name in ("max_sequence_length", "text_encoder_out_layers") if name in given}
    text = pipe.encode_prompt(PROMPT, **(how if reading.family is FLUX2_DEV else {"image": reading.image}))[0]
    call = {**given, "concepts": ["cat"], "method": Merge(), "prompt_embeds": text}
    expected = latents_of(pipe, **call, prompt=None)
    for name in {"tokenizer", "processor", "text_encoder"} & pipe.components.keys():
        monkeypatch.setattr(pipe, name, None)
    torch.testing.assert_close(latents_of(pipe, **call, prompt=None), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reading", ["qwen-2511"], indirect=True)
def test_a_negative_prompt_beside_shorter_embeddings_is_read_whole(reading, pipe):
    given = {**reading.call, "negative_prompt": " and ".join(["a dog on grass"] * 2), "true_cfg_scale": 2.0}
    given |= {"concepts": ["cat"], "method": Merge()}
    text, further = pipe.read_beside(["a sks cat"], reading.image)
    embeds = text[:, : further["text_mask"].sum()]  # without the padding
    found = latents_of(pipe, **{**given, "prompt": None, "prompt_embeds": embeds})
    torch.testing.assert_close(found, latents_of(pipe, **{**given, "prompt": "a sks cat"}), atol=1e-5, rtol=0)


@pytest.mark.parametrize("adds_special", [True, False], ids=["added-by-the-tokenizer", "in-the-template"])
@pytest.mark.parametrize("reading", ["dev"], indirect=True)
def test_dev_finds_words_as_its_processor_reads_them(reading, pipe, monkeypatch, adds_special):
    if adds_special:
        monkeypatch.setattr(pipe.tokenizer, "chat_template", pipe.tokenizer.chat_template.removeprefix("<s>"))
    template = pipe._template(TOKENS)
    assert template.adds_special is adds_special
    (messages,) = format_input([PROMPT], pipe.system_message)
    read = pipe.tokenizer.apply_chat_template(
        [messages], tokenize=True, return_dict=True, padding="max_length", max_length=TOKENS, truncation=True
    )
    start = PROMPT.index("sks")
    found = template.positions(PROMPT, start, start + 3)
    assert found == reading.family.words[0]
    assert [pipe.tokenizer.tokenizer.decode([read["input_ids"][0][i]]) for i in found] == ["s", "k", "s"]
    assert torch.equal(template.real_tokens([PROMPT]), torch.tensor(read["attention_mask"]).bool())


@pytest.mark.parametrize("reading", ["klein", "dev", "kontext"], indirect=True)
def test_a_row_costs_what_the_operations_of_its_pass_say(reading, pipe):
    call = {**reading.call, "num_inference_steps": 1}
    ratio = flops_of(pipe, **call) / flops_of(pipe, **{**call, "image": None})
    cost = pipe.plan(**call, concepts=["cat"], method="merge").cost
    assert cost.row_factor == pytest.approx(ratio, rel=0.01)  # padding of texts that diffusers cuts
    assert cost.each == f", each {ratio:.2f} times one without reference images"
    assert pipe(**call, concepts=["cat"], method="merge", output_type="latent").cost.row_factor == cost.row_factor
    alone = pipe.plan(**{**call, "image": None}, concepts=["cat"], method="merge").cost
    assert (alone.row_factor, alone.each) == (1.0, "")


def test_memory_that_a_pass_needs_has_the_references(reading, pipe):
    without, kept = least_bytes(backbone_of(pipe.transformer), (16, 16)), 4 * 3 * 4 * 16 * 16
    found: Any = backbone_of(pipe.transformer)
    reads = type(found)(pipe.transformer, reference=True, cells=reading.tokens)
    of_a_cell = (without - kept) / CELLS**2  # input and output of the largest layer
    assert least_bytes(reads, (16, 16)) == without + of_a_cell * reading.tokens


@pytest.mark.parametrize("reading", ["qwen-2511"], indirect=True)
def test_words_of_an_edit_are_found_behind_its_images(reading, pipe):
    images = [pipe._resized(image, diffusers_own.CONDITION_IMAGE_SIZE) for image in (NAVY, ORANGE)]
    before = "".join(f"Picture {n}: <|vision_start|><|image_pad|><|vision_end|>" for n in (1, 2))
    text = pipe.prompt_template_encode.format(before + PROMPT)
    read = pipe.processor(text=[text], images=images, return_tensors="pt")["input_ids"][0, 64:]
    (cat, dog) = pipe.plan(**reading.call, concepts=["cat", "dog"], method="merge").concepts
    assert (cat.trigger[0], dog.trigger[0]) == reading.family.words
    assert [pipe.tokenizer.decode([read[i]]) for i in cat.trigger[0]] == ["s", "k", "s"]
    many = {**reading.call, "prompt": f"{PROMPT}, {'a cat on grass, ' * 8}"}
    with pytest.raises(ValueError, match=r"a text has \d+ tokens with its reference images, and 72 are read: shorten"):
        pipe(**many, concepts=["cat"], method="merge")


@pytest.mark.parametrize("reading", ["qwen-2511"], indirect=True)
def test_each_prompt_and_each_region_of_an_edit_reads_its_images(reading, pipe):
    call, noise = {**reading.call, "num_inference_steps": 1}, torch.randn(2, 4, 16, 16, generator=seeded(1))
    both = latents_of(
        pipe, **{**call, "prompt": [PROMPT, "a zwx dog"]}, concepts=["dog"], method="merge", latents=noise
    )
    alone = latents_of(pipe, **{**call, "prompt": "a zwx dog"}, concepts=["dog"], method="merge", latents=noise[1:])
    torch.testing.assert_close(both[1:], alone, atol=3e-5, rtol=0)
    regions = latents_of(pipe, **call, concepts=BOXES, method=Regional(texts="regions"))
    assert regions.isfinite().all()
    assert (regions - latents_of(pipe, **call, concepts=BOXES, method="regional")).abs().max() > 0.01


@pytest.mark.parametrize("reading", ["qwen-2511"], indirect=True)
def test_an_edit_has_the_shape_of_its_last_image_and_needs_one(reading, pipe):
    assert pipe.size_from([NAVY, ORANGE]) == diffusers_own.calculate_dimensions(1024 * 1024, 80 / 64) == (1152, 928)
    for concepts in (["cat"], None):
        with pytest.raises(ValueError, match=r"Qwen-Image-Edit-Plus needs a reference image: give image; for text al"):
            pipe(**{**reading.call, "image": None}, concepts=concepts)
    with pytest.raises(ValueError, match=r"reads image as a reference image, and inpaints nothing here; leave out mas"):
        pipe(**{**reading.call, "image": NAVY}, mask_image=(0, 0, 32, 32), concepts=["cat"])
    with pytest.raises(ValueError, match="reads no text without a reference image"):
        pipe.read_texts(["a cat"])
    assert type(ComposePipeline.from_pipe(QwenImageEditPlusPipeline(**pipe.components))) is type(pipe)


def flops_of(pipe: Any, **call: Any) -> int:
    """FLOPs of the passes of a call without concepts."""
    operations, model = Operations(), pipe.transformer
    hooks = [
        model.register_forward_pre_hook(lambda *_: operations.__enter__() and None),
        model.register_forward_hook(lambda *_: operations.__exit__(None, None, None)),
    ]
    try:
        latents_of(pipe, **call)
    finally:
        for hook in hooks:
            hook.remove()
    return operations.flops
