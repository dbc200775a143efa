"""What transformers cannot use is refused with the expected value named: files, prompts, models."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from components import seeded
from flux import flux_pipeline
from flux2 import FLUX2
from krea2 import KREA2
from lora_compose import ComposePipeline
from lora_compose.compose.playground.assets import playground_lora
from lora_compose.pipelines.formats.files import LoraError
from qwen_image import QWEN_IMAGE
from transformer_families import TOKENS, as_file, random_lora_of_all
from z_image import Z_IMAGE

FAMILIES = {"FLUX.2": FLUX2, "Krea 2": KREA2, "Qwen-Image": QWEN_IMAGE, "Z-Image": Z_IMAGE}
LONG = "a photo of a dog on grass and " * 10 + "a sks cat"
CALL: dict[str, Any] = {
    "concepts": ["cat"], "method": "tara", "num_inference_steps": 1, "width": 128, "height": 128,
    "max_sequence_length": TOKENS,
}  # fmt: skip


@pytest.fixture(params=list(FAMILIES))
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A family with a chat template, and a LoRA of its own."""
    family = FAMILIES[request.param]
    pipe = family.pipeline()
    save_file(dict(as_file(random_lora_of_all(pipe.transformer, 1))), tmp_path / "cat.safetensors")
    pipe.load_concept(tmp_path / "cat.safetensors", trigger="sks", class_word="cat")
    pipe.arguments = {**CALL, **family.unguided}
    return pipe


def test_a_lora_of_another_family_is_refused_with_its_name(pipe: Any, tmp_path: Path) -> None:
    save_file(dict(as_file(random_lora_of_all(flux_pipeline().transformer, 1))), tmp_path / "flux.safetensors")
    with pytest.raises(LoraError, match=r"looks like a file for FLUX\.1|does not fit this model"):
        pipe.load_concept(tmp_path / "flux.safetensors", trigger="zwx", class_word="dog")
    with pytest.raises(LoraError, match=r"matches no layer of this model.* looks like a file for SD 1\.x"):
        pipe.load_concept(playground_lora("dog"))
    assert list(pipe.concepts) == ["cat"]


def test_words_past_the_end_of_a_text_and_missing_ones_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"'sks' stands at tokens .* move it forward.* or raise max_sequence_length"):
        pipe(prompt=LONG, **pipe.arguments)
    with pytest.raises(ValueError, match="the trigger 'sks' of concept 'cat' is not in the prompt 'a cat'"):
        pipe(prompt="a cat", **pipe.arguments)


@pytest.mark.parametrize("pipe", ["FLUX.2", "Z-Image"], indirect=True)  # others write the template themselves
def test_words_that_a_template_loses_are_refused(pipe: Any) -> None:
    pipe.tokenizer.chat_template = pipe.tokenizer.chat_template.replace("message.content", "message.content | upper")
    with pytest.raises(ValueError, match="'sks' is lost in this model's chat template"):
        pipe(prompt="a sks cat", **pipe.arguments)


OTHERS = {
    "StableDiffusion3": "StableDiffusion3", "QwenImageEdit": "QwenImage",
    "QwenImageEditInpaint": "QwenImage", "FluxFill": "Flux", "Flux2KleinKV": "Flux2",
    "QwenImage21": "QwenImage21",
}  # fmt: skip
"""Families that are not supported, and how the class of their transformer begins."""


@pytest.mark.parametrize("family", OTHERS)
def test_models_of_other_families_are_refused_with_those_that_are_supported(tmp_path: Path, family: str) -> None:
    config = {
        "_class_name": f"{family}Pipeline", "transformer": ["diffusers", f"{OTHERS[family]}Transformer2DModel"]
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    why = ", which keeps keys and values from pass to pass.*" if family in ("Flux2KleinKV", "QwenImage21") else ""
    with pytest.raises(
        ValueError, match=rf"a model for {family}Pipeline{why}; supported are Anima, Chroma, FLUX\.1, .*Z-Image"
    ):
        ComposePipeline.from_pretrained(tmp_path)


def test_texts_are_not_padded_past_what_the_t5_was_made_for() -> None:
    pipe = flux_pipeline()
    pipe.tokenizer_2.model_max_length = 24
    images = [pipe("a cat", num_inference_steps=1, height=64, width=64, generator=seeded(0), max_sequence_length=length,
        output_type="np").images for length in (24, 512)]  # fmt: skip
    assert (images[0] == images[1]).all()
    text, added = pipe.read_texts(["a cat"])
    assert text.shape[1] == 24
    embeds = {"prompt_embeds": text, "pooled_prompt_embeds": added["pooled_projections"]}
    pipe.tokenizer_2 = None
    alone = pipe(num_inference_steps=1, height=64, width=64, generator=seeded(0), output_type="np", **embeds).images
    assert abs(alone - images[0]).max() < 1e-4
