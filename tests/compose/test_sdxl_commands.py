"""SDXL wherever a model is named: run, check, replay, the page's open_models."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from commands import call
from components import random_lora, seeded, text_loras, tiny_xl_pipeline
from lora_compose import Concept, Run, Scene
from lora_compose.compose.check.report import check
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.page.open_models import ModelChoice, OpenModels
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline

PROMPT = "a sks cat and a zwx dog on grass"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, "model", and the LoRAs "cat.safetensors" and "dog.safetensors"."""
    folder, pipe = tmp_path_factory.mktemp("sdxl"), tiny_xl_pipeline()
    pipe.save_pretrained(folder / "model")
    for seed, name in enumerate(("cat", "dog")):
        parts = {"unet": random_lora(pipe.unet, seed), **text_loras(pipe, 5 + seed)}
        tensors = {}
        for part, lora in parts.items():
            for layer, factors in lora.items():
                tensors[f"{part}.{layer}.lora_A.weight"] = factors.down.contiguous()
                tensors[f"{part}.{layer}.lora_B.weight"] = factors.up.contiguous()
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def run_of(folder) -> Callable[..., Run]:
    def run_of(method: str | None, **fields) -> Run:
        concepts = tuple(
            Concept(name=name, lora=str(folder / f"{name}.safetensors"), trigger=trigger, class_word=name, region=box)
            for name, trigger, box in (("cat", "sks", (0, 0, 64, 128)), ("dog", "zwx", (64, 0, 128, 128)))
        )
        scene = Scene(prompt=PROMPT, concepts=concepts)
        return Run(scene=scene, model=str(folder / "model"), method=method, steps=1, device="cpu", **fields)

    return run_of


@pytest.mark.usefixtures("costs_do_not_matter")
def test_a_run_is_checked_and_made(run_of):
    run = run_of("merge")
    pipe = open_model(run)
    assert type(pipe) is ComposeStableDiffusionXLPipeline
    report = check(run, pipe)
    assert report.problems == ()
    facts = dict(report.facts)
    assert facts["cat: words"] == "trigger 'sks' at token 2; class word 'cat' at token 3"
    assert facts["cat: layers"] == "64 unet layers, 9 text_encoder layers, 9 text_encoder_2 layers, rank 3"
    assert "rows, each a latent" in facts["cost"]
    assert make(pipe, run).image.size == (128, 128)


def test_a_scene_without_a_negative_prompt_is_what_diffusers_makes_of_no_negative_prompt(run_of):
    run = run_of(None).model_copy(update={"scene": Scene(prompt=PROMPT)})
    pipe = open_model(run)
    (expected,) = pipe(PROMPT, num_inference_steps=1, generator=seeded(0)).images
    assert make(pipe, run).image.tobytes() == expected.tobytes()


def test_commands_take_a_folder_with_sdxl(folder, tmp_path):
    words = {"cat": "sks", "dog": "zwx"}.items()
    loras = [f"path={folder}/{name}.safetensors,trigger={word},class={name}" for name, word in words]
    model, concepts = folder / "model", ["--concept", loras[0], "--concept", loras[1]]
    call("run", model, "--prompt", PROMPT, *concepts, "--method", "clora", "--steps", 1, "--maps", "--out", tmp_path)
    (image,) = [path for path in tmp_path.glob("*.png") if path.stem.isdigit()]
    assert "identical" in call("replay", image, "--out", tmp_path / "again").output


def test_the_page_opens_sdxl(folder, run_of):
    slot = OpenModels().open(ModelChoice(str(folder / "model"), device="cpu", memory=(Saver.TILING,)))
    assert slot.size == (128, 128)
    run = run_of("tara")
    with slot.turn(run.scene.concepts) as pipe:
        assert make(pipe, run).image.size == (128, 128)
