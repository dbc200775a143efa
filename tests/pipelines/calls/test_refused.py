"""Invalid input is refused with advice, and nothing is changed."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image

from components import FAMILIES, State, seeded
from composing import BOTH, BOXED, POSITIONS, PROMPT, UPDATES, compose, composer_of, encoded, one_step
from lora_compose.pipelines.calls import resolved_call
from lora_compose.pipelines.methods import Tara
from lora_compose.pipelines.scene.scene import Concept
from pairs import in_pairs

# Embeddings of a prompt, for both families.
EMBEDS = {"prompt_embeds": torch.zeros(1, 32, 24)}

REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "trigger not in the prompt": (
        {"prompt": "a cat and a zwx dog"},
        r"the trigger 'sks' of concept 'cat' is not in the prompt 'a cat and a zwx dog'; write 'sks cat'",
    ),
    "trigger missing from the second prompt": ({"prompt": [PROMPT, "a sks cat"]}, "the trigger 'zwx' of concept 'dog'"),
    "a word that is too long": ({"prompt": f"a sks cat and zwx dog {'0' * 99}"}, "has more tokens than"),
    "triggers that overlap": (
        {"concepts": ["cat", Concept(name="dog", trigger="sks")]}, "triggers of concepts 'cat'.*'dog'.*share words",
    ),
    "unknown concept": ({"concepts": ["cat", "fox"]}, "unknown concept 'fox'; loaded are cat, dog"),
    "concept twice": ({"concepts": ["cat", "cat"]}, "'cat' stands twice"),
    "a string as concepts": ({"concepts": "cat"}, "concepts must be a list of names, .*such as .*, not 'cat'"),
    "fields instead of a list": ({"concepts": {"name": "cat"}}, r"must be a list of names, .*such as .*, not \{'name'"),
    "fields without a name": ({"concepts": [{"lora": "cat.safetensors"}]}, "a concept's fields need its name"),
    "fields with another name": ({"concepts": {"cat": {"name": "dog"}}}, "another name among its fields"),
    "an unknown field": ({"concepts": [{"name": "cat", "wieght": 1}]}, "unknown field; fields are .*mean 'weight'"),
    "unknown method": ({"method": "blend"}, "unknown method 'blend'; there are .*merge.*tara"),
    "a class as method": ({"method": Tara}, "method must be one of .*merge.* or a settings object"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, not 0"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, not 0"),
    "no number of steps": (
        {"num_inference_steps": None},
        "num_inference_steps may be None only with timesteps or sigmas",
    ),
    "no timesteps": ({"timesteps": []}, "timesteps is empty; give one for each step"),
    "no noise levels": ({"sigmas": []}, "sigmas is empty; give one for each step"),
    "a size that is no multiple of 8": ({"width": 60}, "divisible by 8 but are 128 and 60"),
    "negative size": ({"height": -64}, "width and height must be positive, not 128 x -64"),
    "region outside the canvas": (
        {"concepts": [Concept(name="cat", region=(64, 0, 136, 64)), "dog"]},
        r"the region \(64, 0, 136, 64\) of concept 'cat' leaves the canvas of 128 x 128",
    ),
    "positions with a prompt": ({"token_positions": POSITIONS}, "token_positions go with prompt_embeds"),
    "attention of steps that there are not": (
        {"record_attention": [0, 2]}, r"record_attention names steps \[2\], but there are 2",
    ),
    "attention of steps before the first": (
        {"record_attention": [-3]}, r"record_attention names steps \[-3\], but there are 2",
    ),
    "method without concepts": ({"concepts": None}, "method, token_positions and record_attention need concepts"),
    "attention without concepts": (
        {"concepts": [], "method": None, "record_attention": True}, "record_attention need concepts",
    ),
    "no prompt": ({"prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
    "no trigger for tara": (
        {"concepts": [Concept(name="cat", trigger=""), "dog"]}, "tara needs to know the words of concept 'cat'",
    ),
    "fewer generators than images": (
        {"generator": [seeded()], "num_images_per_prompt": 2}, "there are 1 generators for 2 images",
    ),
    "latents of another size": (
        {"latents": torch.zeros(1, 4, 8, 8)}, r"latents have the shape \[1, 4, 8, 8\]; expected \[1, 4, 16, 16\]",
    ),
    "fewer negative prompts": ({"prompt": [PROMPT] * 2, "negative_prompt": ["dark"]}, "has batch size 1, but `prompt`"),
    "more negative prompts": (
        {"negative_prompt": ["dark", "blurry"]}, "are 2 negative prompts and 1 prompts; give one, or one for each",
    ),
    "timesteps for a scheduler that takes none": ({"timesteps": [900, 1]}, "does not support custom timestep"),
    "IP-Adapter images without an adapter": (
        {"ip_adapter_image": Image.new("RGB", (8, 8))}, "ip_adapter_image needs an IP-Adapter in the model",
    ),
    "arguments of attention": (
        {"cross_attention_kwargs": {"gligen": {}, "scale": 1.0}},
        r"cross_attention_kwargs \['gligen'\] cannot be combined.*only 'scale' and 'ip_adapter_masks' can",
    ),
    "the old callback": (
        {"callback": print, "callback_steps": 1}, "unknown argument 'callback.*did you mean 'callback_on_step_end",
    ),
    "unknown arguments": ({"stenght": 0.5}, "unknown argument 'stenght'"),
    "a mistyped method": ({"method": None, "methd": "clora"}, r"^unknown argument 'methd'; did you mean 'method'\?$"),
    "mistyped concepts": (
        {"concepts": None, "method": None, "concept": ["cat"]},
        r"^unknown argument 'concept'; did you mean 'concepts'",
    ),
    "a mistyped name of a method": ({"method": "CLoRa"}, r"unknown method 'CLoRa'.*did you mean 'clora"),
    "a mistyped name": ({"concepts": ["cta"]}, r"unknown concept 'cta'.*did you mean 'cat'\?"),
    "a number as a concept": ({"concepts": ["cat", 3]}, "must be a list of names, .*fields, and one is 3"),
    "a weight that is none": ({"concepts": {"cat": "much"}}, "^Concept: weight: "),
    "prompt and embeddings": (EMBEDS, "Cannot forward both `prompt`"),
    "timesteps and sigmas": ({"timesteps": [9], "sigmas": [1.0]}, "Only one of `timesteps` or `sigmas`"),
    "embeddings for a method that writes texts": (
        {"method": UPDATES, "concepts": BOXED, "prompt": None, **EMBEDS, "guidance_scale": 1.0},
        "needs prompts, not prompt_embeds",
    ),
}  # fmt: skip
TYPE_ERRORS = ("the old callback", "unknown arguments", "a mistyped method", "mistyped concepts")


@pytest.mark.parametrize(("case", "family"), in_pairs(REFUSED, FAMILIES))
def test_what_cannot_be_is_refused_with_a_clear_message_and_changes_nothing(family: str, case: str) -> None:
    composer, (arguments, message) = composer_of(family), REFUSED[case]
    if family == "sdxl" and "prompt_embeds" in arguments:
        arguments = {**arguments, "pooled_prompt_embeds": torch.zeros(1, 12)}
    before, generator = State(composer), seeded()
    drawn = generator.get_state()
    with pytest.raises(TypeError if case in TYPE_ERRORS else ValueError, match=re.compile(message, re.DOTALL)):
        compose(composer, **{"generator": generator, **arguments})
    before.assert_unchanged()
    assert torch.equal(generator.get_state(), drawn)


BEFORE_INSTALLATION = (
    "attention of steps that there are not", "fewer generators than images", "latents of another size",
    "timesteps for a scheduler that takes none", "timesteps and sigmas", "no denoising before the end",
)  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_INSTALLATION)
def test_steps_and_latents_are_checked_before_the_model_and_the_scheduler_are_touched(case, monkeypatch):
    """Installation is where a call begins to change the model."""
    family = "sdxl" if case == "no denoising before the end" else "sd"
    composer = composer_of(family)
    arguments, message = REFUSED.get(case, ({"denoising_end": 0.001}, "denoising_end=0.001 leaves none of the 2 steps"))
    entered, scheduler = [], dict(vars(composer.scheduler))
    monkeypatch.setattr(resolved_call, "install", lambda *args, **kwargs: entered.append(args))
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        compose(composer, **arguments)
    assert not entered
    assert all(vars(composer.scheduler)[name] is value for name, value in scheduler.items())


@BOTH
def test_updates_are_refused_in_inference_mode_before_anything_is_installed(family: str, monkeypatch) -> None:
    composer, entered = composer_of(family), []
    monkeypatch.setattr(resolved_call, "install", lambda *args, **kwargs: entered.append(args))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"lora-composer takes gradients.*use draft, regional"):
        one_step(composer, method=UPDATES)
    assert not entered


BAD_POSITIONS = {
    "unknown concept": ({"cat": [2], "fox": [6]}, r"token_positions names \['fox'\]"),
    "outside the embeddings": ({"cat": [2], "dog": [32]}, "between 0 and 31"),
    "negative": ({"cat": [-1], "dog": [6]}, "between 0 and 31"),
    "shared": ({"cat": [2, 6], "dog": [6]}, "two concepts share a token"),
    "other number of prompts": ({"cat": [[2], [2]], "dog": [6]}, "'cat' are for 2 prompts, there are 1"),
    "missing": ({"cat": [2]}, "tara needs to know the words of concept 'dog'.*token_positions"),
    "none": (None, "tara needs to know the words of concept 'cat'"),
}


def test_bad_positions_are_refused() -> None:
    composer = composer_of("sd")
    before, embeds = State(composer), encoded(composer)
    for positions, message in BAD_POSITIONS.values():
        with pytest.raises(ValueError, match=message):
            compose(composer, token_positions=positions, **embeds)
    before.assert_unchanged()
