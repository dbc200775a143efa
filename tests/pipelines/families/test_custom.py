"""`from_pretrained(MODEL, custom_pipeline=FOLDER)` of diffusers gives the composing pipeline of the model's family."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from safetensors.torch import save_file

from all_transformers import EVERY, MODULAR, OF_THE_SAME_MODEL, TRANSFORMERS
from components import lora_tensors, random_lora, seeded, tiny_pipeline, tiny_xl_pipeline
from lora_compose.compose.playground.assets import assets_dir
from lora_compose.pipelines.families.base import ComposePipeline
from pairs import slow_but
from transformer_families import as_file, random_lora_of_all

FOLDER = assets_dir() / "custom_pipeline"
OF_TRANSFORMERS = {name: family.pipeline for name, family in TRANSFORMERS.items() if name not in MODULAR}
MAKERS = {"sd": tiny_pipeline, "sdxl": tiny_xl_pipeline, **OF_TRANSFORMERS}
OPTIONS = {name: family.unguided for name, family in TRANSFORMERS.items()}
PROMPT = "a sks cat on grass"


pytestmark = pytest.mark.usefixtures("own_modules")


def saved(family: str, folder: Path) -> Any:
    pipe = MAKERS[family]()
    pipe.save_pretrained(folder)
    return pipe


def latents(pipe: Any, family: str, path: Path) -> torch.Tensor:
    """One step with a concept from a file."""
    transformer = getattr(pipe, "transformer", None)
    tensors = (
        lora_tensors(unet=random_lora(pipe.unet, 1))
        if transformer is None
        else as_file(random_lora_of_all(transformer, 1))
    )
    save_file(dict(tensors), path)
    pipe.load_concept(path, "cat", trigger="sks")
    call = {"width": 128, "height": 128, "num_inference_steps": 1, "generator": seeded(), "output_type": "latent"}
    return pipe(prompt=PROMPT, concepts=["cat"], method="merge", **call, **OPTIONS.get(family, {})).images


@pytest.mark.parametrize("family", slow_but(["flux"], MAKERS))
def test_a_model_of_each_family_opens_through_the_folder_and_composes_the_same(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "model")
    ours = ComposePipeline.from_pretrained(tmp_path / "model")
    opened: Any = DiffusionPipeline.from_pretrained(
        str(tmp_path / "model"), custom_pipeline=str(FOLDER), trust_remote_code=True
    )
    assert isinstance(opened, ComposePipeline)
    assert type(opened) is type(ours)
    assert dict(opened.config) == dict(ours.config)
    file = tmp_path / "cat.safetensors"
    assert torch.equal(latents(opened, family, file), latents(ours, family, file))


def test_a_model_with_the_file_in_its_own_repository_opens_without_naming_it(tmp_path: Path) -> None:
    saved("sdxl", tmp_path)
    shutil.copy(FOLDER / "pipeline.py", tmp_path)
    index = tmp_path / "model_index.json"
    config = json.loads(index.read_text())
    index.write_text(json.dumps({**config, "_class_name": ["pipeline", "CustomComposePipeline"]}))
    opened = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert isinstance(opened, type(tiny_xl_pipeline()))


def opened_by_its_file(family: str, folder: Path, **index: Any) -> Any:
    """A model in whose folder lies the file, and whose index names it."""
    EVERY[family].pipeline().save_pretrained(folder)
    shutil.copy(FOLDER / "pipeline.py", folder)
    config = json.loads((folder / "model_index.json").read_text())
    named = {"_class_name": ["pipeline", "CustomComposePipeline"], **index}
    (folder / "model_index.json").write_text(json.dumps({**config, **named}))
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("family", [name for name in OF_THE_SAME_MODEL if name not in MODULAR])
def test_a_model_whose_components_another_family_has_too_opens_as_its_own(family: str, tmp_path: Path) -> None:
    pipe = EVERY[family].pipeline()
    pipe.save_pretrained(tmp_path)
    opened = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(FOLDER), trust_remote_code=True)
    assert type(opened) is type(pipe)


@pytest.mark.parametrize(
    ("family", "other"),
    [("kontext", "FLUX.1 or FLUX.1 Kontext"), pytest.param("flux2-dev", "FLUX.2-dev", marks=pytest.mark.slow)],
)
def test_where_nothing_says_which_family_it_is_a_warning_says_how_to(
    family: str, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened_by_its_file(family, tmp_path)
    expected = type(EVERY[family].pipeline())
    (warning,) = [text for text in caplog.messages if text.startswith("nothing in this model says whether it is")]
    assert f"{other}; it opens as" in warning
    assert f'write "model_class": "{expected.__name__}" into its model_index.json' in warning
    caplog.clear()
    assert type(opened_by_its_file(family, tmp_path, model_class=expected.__name__)) is expected
    assert "nothing in this model" not in caplog.text


def test_an_edit_model_of_qwen_image_is_known_by_its_processor(tmp_path: Path) -> None:
    opened = opened_by_its_file("qwen-image-edit", tmp_path)
    assert type(opened) is type(EVERY["qwen-image-edit"].pipeline())


def test_a_model_of_another_pipeline_is_refused_as_elsewhere(tmp_path: Path) -> None:
    MAKERS["flux"]().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxControlPipeline"}))
    with pytest.raises(ValueError, match="this is a model for FluxControlPipeline; supported are"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(FOLDER), trust_remote_code=True)


def test_options_and_components_that_are_given_are_used(tmp_path: Path) -> None:
    saved("sd", tmp_path)
    scheduler = EulerDiscreteScheduler(steps_offset=1)
    opened: Any = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(FOLDER), trust_remote_code=True, dtype=torch.bfloat16, scheduler=scheduler
    )
    assert opened.scheduler is scheduler
    assert opened.unet.dtype == torch.bfloat16


def test_a_model_without_a_component_is_refused_with_its_name(tmp_path: Path) -> None:
    saved("sd", tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({name: part for name, part in json.loads(index.read_text()).items() if name != "vae"}))
    with pytest.raises(ValueError, match="the model has no vae, which Stable Diffusion"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(FOLDER), trust_remote_code=True)
