"""Pipelines are opened, saved, converted and built of components like any of diffusers."""

import inspect
import json
import pydoc
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from components import FAMILIES, random_lora, seeded, tiny_pipeline, tiny_xl_pipeline
from composing import (
    BOTH,
    OURS,
    PLAIN,
    PROMPT,
    QUIET,
    SD_AND_SLOWLY_XL,
    UPDATES,
    assert_close,
    composer_of,
    models_of,
    one_step,
    run,
    same_bits,
    with_concepts,
)
from lora_compose.pipelines.families import ComposePipeline
from pairs import in_pairs
from simulated_device import DEVICE, numbers, parameters_that_move


@SD_AND_SLOWLY_XL
def test_a_saved_pipeline_opens_and_composes_as_the_first_one(family: str, tmp_path: Path) -> None:
    composer = composer_of(family, whole=True)
    composer.save_pretrained(tmp_path)
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path), whole=True)
    assert torch.equal(one_step(opened).images, one_step(composer).images)


@SD_AND_SLOWLY_XL
def test_what_is_saved_opens_in_plain_diffusers_and_again_in_ours(composer, family, tmp_path):
    composer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "model_index.json").read_text())
    plain, ours = PLAIN[family], OURS[family]
    assert config["_class_name"] == plain.__name__
    expected = run(composer).images
    for opener, kind in ((plain, plain), (DiffusionPipeline, plain), (ComposePipeline, ours), (ours, ours)):
        opened = opener.from_pretrained(tmp_path, local_files_only=True)
        opened.set_progress_bar_config(disable=True)
        assert type(opened) is kind
        assert same_bits(run(opened).images, expected)


@BOTH
def test_what_is_saved_is_what_diffusers_saves(composer, plain_pipe, tmp_path):
    for tokenizer in (composer.tokenizer, plain_pipe.tokenizer):
        tokenizer("")  # tokenizers save how they padded and cut the last text
    composer.save_pretrained(tmp_path / "ours")
    plain_pipe.save_pretrained(tmp_path / "plain")
    files = {p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*") if p.is_file()}
    saved = {p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file()}
    assert saved - {Path("README.md")} == files  # it is there because the pipeline has concepts

    def read(side: str, name: Path) -> Any:
        content = (tmp_path / side / name).read_bytes()
        return json.loads(content) if name.suffix == ".json" else content

    assert [name for name in files if read("ours", name) != read("plain", name)] == []


def test_a_variant_is_saved_and_opened_under_its_name_alone(composer: Any, tmp_path: Path) -> None:
    composer.save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    weights = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert weights == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path, variant="fp16"))
    assert torch.equal(one_step(opened).images, one_step(composer).images)
    for wrong in (None, "bf16"):
        with pytest.raises((OSError, ValueError), match=r"safetensors|variant"):
            ComposePipeline.from_pretrained(tmp_path, variant=wrong)


def test_loading_options_of_diffusers_are_passed_on(composer, tmp_path):
    composer.save_pretrained(tmp_path, variant="small")
    opened = ComposePipeline.from_pretrained(
        tmp_path, variant="small", dtype=torch.bfloat16, scheduler=EulerDiscreteScheduler(steps_offset=1)
    )
    assert opened.unet.dtype == opened.vae.dtype == opened.text_encoder.dtype == torch.bfloat16
    assert type(opened.scheduler) is EulerDiscreteScheduler


def test_a_model_saved_in_half_precision_opens_so(composer: Any, tmp_path: Path) -> None:
    composer.to(torch.float16)
    expected = one_step(composer).images
    composer.save_pretrained(tmp_path)
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path, dtype=torch.float16))
    assert {model.dtype for model in models_of(opened).values()} == {torch.float16}
    assert torch.equal(one_step(opened).images, expected)


@SD_AND_SLOWLY_XL
def test_every_component_may_open_in_a_precision_of_its_own(family: str, tmp_path: Path) -> None:
    composer_of(family, whole=True).save_pretrained(tmp_path)
    given = {"vae": torch.bfloat16, "default": torch.float64}
    opened = with_concepts(ComposePipeline.from_pretrained(tmp_path, dtype=given), whole=True)
    assert {name: model.dtype for name, model in models_of(opened).items()} == {
        name: given.get(name, torch.float64) for name in models_of(opened)
    }
    start = torch.randn(1, 4, 16, 16, generator=seeded())
    latents = one_step(opened, latents=start.double()).images
    assert latents.dtype == torch.float64
    assert_close(latents.float(), one_step(composer_of(family, whole=True), latents=start).images, 1e-3)


def test_components_that_are_missing_stay_missing(composer, tmp_path):
    composer.save_pretrained(tmp_path)
    opened = ComposePipeline.from_pretrained(tmp_path)
    assert opened.safety_checker is opened.feature_extractor is opened.image_encoder is None
    assert dict(opened.config)["requires_safety_checker"] is False
    without = ComposePipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert without.text_encoder is without.tokenizer is None


@pytest.mark.parametrize("family", ["sdxl"])
def test_optional_components_may_be_missing(composer: Any, family: str, tmp_path: Path) -> None:
    optional = [name for name in composer._optional_components if name not in ("text_encoder", "tokenizer")]
    kept = {name: part for name, part in composer.components.items() if name not in optional}
    # SDXL's second text encoder makes the pooled text.
    kept |= {name: composer.components[name] for name in ("text_encoder_2", "tokenizer_2")}
    without = with_concepts(type(composer)(**dict.fromkeys(composer.components) | kept | QUIET[family]))
    expected = one_step(without).images
    without.save_pretrained(tmp_path)
    assert torch.equal(one_step(with_concepts(ComposePipeline.from_pretrained(tmp_path))).images, expected)


@SD_AND_SLOWLY_XL
def test_components_build_the_pipeline_again(plain_pipe: Any, family: str) -> None:
    composer = composer_of(family, whole=True)
    again = with_concepts(type(composer)(**composer.components, **QUIET[family]), whole=True)
    assert again.components.keys() == composer.components.keys() == plain_pipe.components.keys()
    assert all(again.components[name] is part for name, part in composer.components.items())
    assert torch.equal(one_step(again).images, one_step(composer).images)


@pytest.mark.parametrize(("family", "method"), [("sd", UPDATES), pytest.param("sdxl", "tara", marks=pytest.mark.slow)])
@pytest.mark.parametrize("offloaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pipelines_made_of_each_other_share_models_and_settings(
    composer: Any, family: str, method: Any, offloaded: bool
) -> None:
    """From plain to ours, to plain, to ours again, also if models are brought to the device only when needed."""
    composed = numbers(one_step(composer, method=method).images)
    plain = PLAIN[family].from_pipe(composer)
    assert type(plain) is PLAIN[family]
    plain.set_progress_bar_config(disable=True)
    again = with_concepts(ComposePipeline.from_pipe(plain))
    for made_of in (plain, again):
        assert {name: value for name, value in made_of.config.items() if not name.startswith("_")} == {
            name: value for name, value in composer.config.items() if not name.startswith("_")
        }
        assert all(made_of.components[name] is part for name, part in composer.components.items())
    uncomposed = {"concepts": None, "method": None}
    expected = one_step(composer, **uncomposed).images
    arguments = {"num_inference_steps": 1, "guidance_scale": 4.0, "output_type": "latent"}
    with parameters_that_move():
        if offloaded:
            plain.enable_model_cpu_offload(device=DEVICE)
            assert_close(numbers(plain(PROMPT, generator=seeded(), **arguments).images), expected)
            plain.remove_all_hooks()
            again.enable_model_cpu_offload(device=DEVICE)
        for _ in range(2):
            assert_close(numbers(one_step(again, method=method).images), composed)
            assert_close(numbers(one_step(again, **uncomposed).images), expected)
        if not offloaded:
            assert torch.equal(plain(PROMPT, generator=seeded(), **arguments).images, expected)


@pytest.mark.parametrize(
    ("family", "opener", "dtype"), [("sd", ComposePipeline, torch.bfloat16), ("sdxl", None, torch.float32)]
)
def test_a_pipeline_made_from_another_shares_its_modules_and_keeps_their_precision(plain_pipe, family, opener, dtype):
    plain_pipe.to(dtype=dtype)
    expected = run(plain_pipe).images
    made = (opener or OURS[family]).from_pipe(plain_pipe)
    assert type(made) is OURS[family]
    assert all(made.components[name] is part for name, part in plain_pipe.components.items())
    assert made.dtype == plain_pipe.dtype == dtype
    assert same_bits(run(made).images, expected)
    assert same_bits(run(plain_pipe).images, expected)


AUTO = {
    AutoPipelineForText2Image: {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline},
    AutoPipelineForImage2Image: {"sd": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline},
    AutoPipelineForInpainting: {"sd": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline},
}


@pytest.mark.parametrize(("task", "family"), in_pairs(AUTO, FAMILIES))
def test_diffusers_finds_the_pipelines_for_other_tasks_from_ours_and_the_way_back(composer, plain_pipe, family, task):
    made = task.from_pipe(composer)
    assert type(made) is AUTO[task][family]
    assert made.unet is composer.unet
    again = ComposePipeline.from_pipe(made)
    again.set_progress_bar_config(disable=True)
    assert type(again) is OURS[family]
    assert again.unet is composer.unet
    assert same_bits(run(again).images, run(plain_pipe).images)


def test_an_extended_class_has_the_name_of_the_pipeline_of_diffusers(family):
    class Mixed:
        pass

    class Extended(Mixed, OURS[family]):
        pass

    assert Extended.__name__ == PLAIN[family].__name__
    assert Extended.__qualname__.endswith("Extended")


def test_from_pipe_takes_other_components_and_precisions(plain_pipe):
    scheduler = EulerDiscreteScheduler(steps_offset=1)
    made = ComposePipeline.from_pipe(plain_pipe, scheduler=scheduler, dtype=torch.bfloat16)
    assert made.scheduler is scheduler
    assert made.dtype == torch.bfloat16


@BOTH
def test_from_pipe_refuses_to_change_one_of_several_precisions_unasked(plain_pipe):
    plain_pipe.vae.to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"differ in precision.*\*\*pipe.components"):
        ComposePipeline.from_pipe(plain_pipe)
    assert plain_pipe.vae.dtype == torch.bfloat16
    assert plain_pipe.unet.dtype == torch.float32


def test_models_of_other_families_are_refused_by_name(tmp_path):
    config = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"PixArtAlphaPipeline; supported are .*Stable Diffusion 1\.x and 2\.x, Stable Diffusion XL"
    ):
        ComposePipeline.from_pretrained(tmp_path)


def test_the_refiner_is_refused_by_name(tmp_path):
    base = tiny_xl_pipeline()
    parts = {**base.components, "text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    refiner.save_pretrained(tmp_path / "refiner")
    for opening in (
        lambda: ComposePipeline.from_pretrained(tmp_path / "refiner"),
        lambda: ComposePipeline.from_pipe(refiner),
    ):
        with pytest.raises(ValueError, match=r"this is SDXL's refiner.*open the base model"):
            opening()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        ComposePipeline.from_pretrained(tmp_path)


def test_an_editor_completes_a_call_and_its_help_names_what_is_ours():
    given = inspect.signature(ComposePipeline.__call__).parameters
    assert {"prompt", "concepts", "method", "control", "record_attention"} <= given.keys()
    text = pydoc.render_doc(ComposePipeline.__call__)
    assert all(f"{name}:" in text for name in ("concepts", "method", "control"))
    with pytest.raises(TypeError, match="open a model first"):
        ComposePipeline.__call__(ComposePipeline.__new__(ComposePipeline))


@pytest.mark.parametrize("family", ComposePipeline.families, ids=lambda family: family.__qualname__)
def test_help_of_an_opened_pipeline_names_methods_and_boxes(family: type[ComposePipeline]) -> None:
    text = pydoc.plain(pydoc.render_doc(vars(family)["__call__"]))
    given = inspect.signature(family.__call__).parameters
    described = text.partition("Args:\n")[2].partition("\n    \n")[0]
    found = re.findall(r"^        (\w+): ", described, re.MULTILINE)
    assert {"concepts", "method", "control", "record_attention"} <= set(found) <= given.keys()
    assert len(found) == len(set(found))
    assert "draft, lora-composer, regional" in described
    assert '{"cat": (0, 0, 64, 128)}' in described
    takes_masks = getattr(family, "inpainting", None) is not None
    assert not takes_masks or {"image", "strength", "mask_image", "paste_original"} <= set(found)
    assert takes_masks == ("White where the image is painted" in described)


FIELDS: dict[str, tuple[Mapping[str, Any], Sequence[str]]] = {
    "words": ({"trigger": "sks", "class_word": "cat"}, ("name", "trigger", "class_word")),
    "a subject": (
        {
            "trigger": "sks", "class_word": "cat", "weight": (11.0, 0.5), "any_weight": True, "alpha": 2.0,
            "blocks": {"down": 0.5}, "region": (0, 0, 64, 128), "prompt": "a sks cat", "negative_prompt": "blurry",
            "references": True,
        },
        (
            "name", "trigger", "class_word", "weight", "blocks", "any_weight", "region", "prompt", "negative_prompt",
            "references", "alpha",
        ),
    ),
    "a style": ({"role": "style", "weight": "0:1..0.5:0.2"}, ("name", "weight", "role")),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_the_folder_of_a_saved_model_says_how_to_load_its_concepts(case: str, write_lora: Any, tmp_path: Path) -> None:
    composer, (fields, named) = tiny_pipeline(), FIELDS[case]
    cat = write_lora("cat", unet=random_lora(composer.unet, 1))
    composer.load_concept(cat, "tom", **fields)
    composer.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    (load,) = re.findall(r"^pipe\.load_concept\(.*\)$", text, re.MULTILINE)
    assert tuple(re.findall(r", (\w+)=", load)) == named, "and no defaults"
    opened = ComposePipeline.from_pretrained(tmp_path / "model")
    eval(load.replace("'cat.safetensors'", repr(str(cat))), {"pipe": opened})
    assert dict(opened.concepts) == dict(composer.concepts)


def test_a_mask_image_is_named_in_the_folder_without_its_own_folders(write_lora: Any, tmp_path: Path) -> None:
    composer = tiny_pipeline()
    cat, mask = write_lora("cat", unet=random_lora(composer.unet, 1)), tmp_path / "mask.png"
    Image.new("L", (8, 8), 255).save(mask)
    composer.load_concept(cat, trigger="sks", class_word="cat", region=mask)
    composer.save_pretrained(tmp_path / "model")
    assert "region='mask.png')" in (tmp_path / "model/README.md").read_text(encoding="utf-8")


def test_a_model_without_concepts_and_a_readme_that_is_there_are_left_alone(write_lora: Any, tmp_path: Path) -> None:
    composer = tiny_pipeline()
    composer.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain/README.md").exists()
    (tmp_path / "plain/README.md").write_text("mine")
    composer.load_concept(write_lora("cat", unet=random_lora(composer.unet, 1)), trigger="sks")
    composer.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain/README.md").read_text() == "mine"
