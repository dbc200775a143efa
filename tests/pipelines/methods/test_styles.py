"""Styles act everywhere, in every method, and own negative prompts are read where a method has a text for each."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from comparisons import assert_close, far_apart
from components import EVERYTHING, FAMILIES, random_lora, save_lora, seeded, text_loras, with_library
from lora_compose.pipelines.methods import (
    METHODS,
    Clora,
    Composite,
    Draft,
    LoraComposer,
    Merge,
    Regional,
    Switch,
    Tara,
    choose_method,
)
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.field_errors import FieldError
from pairs import slow_but

PROMPT = "a sks cat and a zwx dog on grass"
TRIGGERS = {"cat": "sks", "dog": "zwx"}
BOXES = {"cat": (0, 0, 64, 128), "dog": (64, 0, 128, 128)}
SUBJECTS = [Concept(name=name, region=box) for name, box in BOXES.items()]
INK = Concept(name="ink", role="style")
EVERY_WAY = {
    **METHODS,
    "lora-composer, attn2": lambda: LoraComposer(inject="attn2", apart=0.0),
    "lora-composer, off": lambda: LoraComposer(inject="off"),
    "clora, branches": lambda: Clora(fuse="branches", uncond="each", step_size=0.05),
}
USUAL = ("merge", "regional", "composite", "lora-composer", "clora, branches", "draft")
"""Ways that are as different as they can be."""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tiny pipeline with the subjects "cat" and "dog" and with "ink", which changes the text encoders as well."""

    @cache
    def library(family: str) -> Any:
        pipe, folder = FAMILIES[family](), tmp_path_factory.mktemp(family)
        for seed, (name, trigger) in enumerate(TRIGGERS.items()):
            path = save_lora(folder / f"{name}.safetensors", unet=random_lora(pipe.unet, seed, size=0.2))
            pipe.load_concept(path, name, trigger=trigger, class_word=name)
        parts = {"unet": random_lora(pipe.unet, 7, targets=EVERYTHING, size=0.1), **text_loras(pipe, 9, size=0.2)}
        pipe.load_concept(save_lora(folder / "ink.safetensors", **parts))
        return pipe.library

    return lambda family: with_library(FAMILIES[family](), library(family))


def latents_of(pipe: Any, method: Any, concepts: Any, prompt: Any = PROMPT, **arguments: Any) -> Tensor:
    given = {"concepts": concepts, "num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    return pipe(prompt, method=method, **given | arguments).images


def add_to_weights(pipe: Any, name: str, weight: float) -> None:
    """Adds a LoRA to the weights of UNet and text encoders for good."""
    factors = pipe.library.loaded[name].factors
    for part, lora in {"unet": factors.model, **factors.text_encoders}.items():
        for layer, found in lora.items():
            module = getattr(pipe, part).get_submodule(layer)
            module.weight.data += weight * found.delta().view_as(module.weight)


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *(pytest.param("sd", way, marks=() if way in USUAL else pytest.mark.slow) for way in EVERY_WAY),
        pytest.param("sdxl", "composite", marks=pytest.mark.slow),
    ],
)
def test_a_style_acts_as_if_it_were_a_part_of_the_model(load, family, way):
    """On all cells, tokens, texts and passes, also of losses and masks; without guidance, where methods differ."""
    pipe, method = load(family), EVERY_WAY[way]()
    style = INK.model_copy(update={"weight": 0.8})
    # In the middle, since nothing may depend on where it stands.
    found = latents_of(pipe, method, [SUBJECTS[0], style, SUBJECTS[1]], guidance_scale=1.0)
    add_to_weights(pipe, "ink", 0.8)
    assert_close(found, latents_of(pipe, method, SUBJECTS, guidance_scale=1.0), 1e-3)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(pytest.param("sd", method, marks=() if method in USUAL else pytest.mark.slow) for method in METHODS),
        ("sdxl", "clora"),
    ],
)
def test_a_style_alone_is_merged(load, family, method, caplog):
    pipe = load(family)
    style = INK.model_copy(update={"weight": (0.8, 0.3)})
    found = latents_of(pipe, method, [style])
    assert_close(found, latents_of(pipe, "merge", [Concept(name="ink", weight=[0.8, 0.3])]))
    assert "leaves out" not in caplog.text


@pytest.mark.parametrize(
    "method",
    [Tara(), Regional(rows="all"), Switch(), Composite(), LoraComposer(rows="all", step_size=0, background="scene")],
    ids=lambda method: type(method).__name__,
)
def test_subjects_of_weight_0_leave_a_style_as_it_is_merged_alone(load, method):
    """On the negative prompt's rows as well, in methods that let LoRAs act there."""
    pipe = load("sd")
    silent = [subject.model_copy(update={"weight": 0.0, "prompt": PROMPT}) for subject in SUBJECTS]
    if isinstance(method, LoraComposer):  # which reads another text behind the regions
        silent[0] = silent[0].model_copy(update={"region": (0, 0, 128, 128)})
        silent, method = silent[:1], replace(method, apart=0.0)
    assert_close(latents_of(pipe, method, [*silent, INK]), latents_of(pipe, "merge", [INK]), 1e-3)


def test_a_style_trained_with_tara_keeps_its_own_words(load, write_lora):
    pipe = load("sd")
    unet = random_lora(pipe.unet, 7, targets=EVERYTHING, size=0.1)
    pipe.load_concept(write_lora("trained", unet=unet, metadata={"method": "tara"}), trigger="xlo", class_word="bear")
    prompt = f"{PROMPT}, xlo bear"
    style, other = Concept(name="trained", role="style"), Concept(name="trained")
    found = latents_of(pipe, "tara", ["cat", "dog", style], prompt)
    assert torch.equal(found, latents_of(pipe, "tara", ["cat", "dog", other], prompt))
    pipe.load_concept(write_lora("ordinary", unet=unet), trigger="xlo", class_word="bear")
    everywhere = latents_of(pipe, "tara", ["cat", "dog", Concept(name="ordinary", role="style")], prompt)
    assert far_apart(everywhere, found)


def test_a_style_alone_is_composed_as_it_was_trained(load, write_lora):
    """One that was trained with TARA by `tara`, with its mask; any other, or both together, by `merge`."""
    pipe = load("sd")
    unet = random_lora(pipe.unet, 7, targets=EVERYTHING, size=0.1)
    pipe.load_concept(write_lora("trained", unet=unet, metadata={"method": "tara"}), trigger="xlo", class_word="style")
    style, prompt = Concept(name="trained", role="style"), "a cat in xlo style"
    found = latents_of(pipe, None, [style], prompt)
    assert torch.equal(found, latents_of(pipe, "tara", [style], prompt))
    assert far_apart(found, latents_of(pipe, "merge", [style], prompt))
    for concepts, prompts in (([style], None), ([style, INK], [prompt]), ([INK], [prompt])):  # None: of embeddings
        assert isinstance(choose_method(pipe.resolve_concepts(concepts), prompts).method, Merge)


def test_in_regional_a_style_acts_on_all_words_and_one_of_tara_without_a_region_on_its_own(load, write_lora):
    pipe = load("sd")
    unet = random_lora(pipe.unet, 7, targets=("attn2.to_k", "attn2.to_v"), size=0.3)
    path = write_lora("words", unet=unet, metadata={"method": "tara"})
    pipe.load_concept(path, "named", trigger="xlo")
    prompt = f"{PROMPT}, xlo"
    silent = [subject.model_copy(update={"weight": 0.0}) for subject in SUBJECTS]
    named = latents_of(pipe, Regional(rows="all"), [*silent, "named"], prompt)
    style = latents_of(
        pipe, Regional(rows="all", token_mask="all"), [*silent, Concept(name="named", role="style")], prompt
    )
    assert_close(style, latents_of(pipe, "merge", ["named"], prompt))
    assert far_apart(style, named)


@pytest.mark.parametrize("method", ["switch", "composite"])
def test_a_style_has_no_turn_and_no_pass(load, method):
    pipe = load("sd")
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    cost = pipe(PROMPT, concepts=[*SUBJECTS, INK], method=method, **given).cost
    assert cost.rows_forward == {"switch": 4, "composite": 8}[method]
    with pytest.raises(
        ValueError, match="composite has 3 shares, but there are 2 passes: styles have none of their own"
    ):
        latents_of(pipe, Composite(shares=[1, 1, 1]), [*SUBJECTS, INK])


def test_a_style_has_no_region():
    with pytest.raises(FieldError, match="'ink' is a style, which acts everywhere: leave out its region or its role"):
        Concept(name="ink", role="style", region=(0, 0, 8, 8))


def test_the_choice_of_a_method_looks_at_the_subjects(load, write_lora, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    pipe = load("sd")
    chosen = lambda *concepts: choose_method(pipe.resolve_concepts(concepts), [PROMPT]).method  # noqa: E731
    assert isinstance(chosen(*SUBJECTS, INK), Draft)
    assert "draft, because every subject has a region" in caplog.text
    assert isinstance(chosen("cat", "dog", INK), Draft)
    pipe.load_concept(write_lora("tara", unet=random_lora(pipe.unet, 1), metadata={"method": "tara"}), trigger="sks")
    assert isinstance(chosen("tara", INK), Tara)
    chosen(INK)
    assert "method: merge, because styles act everywhere" in caplog.text


# Own negative prompts


@pytest.mark.parametrize("family", slow_but(["sd"], FAMILIES))
@pytest.mark.parametrize("method", ["switch", "composite"])
def test_passes_of_one_subject_read_its_own_negative_prompt(load, family, method, caplog):
    pipe = load(family)
    own = [Concept(name="cat", negative_prompt="blurry"), INK]
    found = latents_of(pipe, method, own)
    assert torch.equal(found, latents_of(pipe, method, ["cat", INK], negative_prompt="blurry"))
    assert far_apart(found, latents_of(pipe, method, ["cat", INK]))
    both = latents_of(pipe, Switch(interval=1), [own[0], "dog"], negative_prompt="dark")
    assert far_apart(both, latents_of(pipe, Switch(interval=1), ["cat", "dog"], negative_prompt="dark"))
    batch = latents_of(pipe, method, own, [PROMPT, "a sks cat in snow"], generator=[seeded(), seeded(1)])
    assert_close(batch[:1], found)
    assert "are not read" not in caplog.text


def test_composite_averages_the_negative_prompts_of_its_passes(load):
    """What is predicted without the prompt is linear in the passes."""
    pipe = load("sd")
    first, second = (Concept(name=name, negative_prompt=text) for name, text in (("cat", "blurry"), ("dog", "dark")))
    step: dict[str, Any] = {"num_inference_steps": 1}
    together = latents_of(pipe, "composite", [first, second], **step)
    alone = [latents_of(pipe, "composite", [one], **step) for one in (first, second)]
    assert_close(together, torch.stack(alone).mean(dim=0))


@pytest.mark.parametrize("method", slow_but((*USUAL, "clora"), METHODS))
def test_own_prompts_of_a_style_are_mentioned(load, method, caplog):
    pipe = load("sd")
    style = INK.model_copy(update={"negative_prompt": "dark"})
    latents_of(pipe, method, [*SUBJECTS, style], num_inference_steps=1)
    said = [record.getMessage() for record in caplog.records if "are not read" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the own prompts of ink are not read: ")


@pytest.mark.parametrize("method", ["switch", "composite"])
def test_own_prompts_are_mentioned_where_only_negative_ones_are_read(load, method, caplog):
    latents_of(load("sd"), method, [Concept(name="cat", prompt="a sks cat asleep"), "dog"], num_inference_steps=1)
    assert "the own prompts of cat are not read: each pass has the scene's prompt" in caplog.text
