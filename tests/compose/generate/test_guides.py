"""Scenes, commands and records with control images and IP-Adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from commands import call, flat
from components import seeded
from ip_adapters import playground_guides
from lora_compose import ComposePipeline, Concept, Run, Scene
from lora_compose.compose.evaluation.suite import SuiteScene
from lora_compose.compose.files.images import read_record
from lora_compose.compose.files.scenes import read_scene, write_scene
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import playground_model

pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")
SIDE = 64
CAT: dict[str, Any] = {"name": "cat", "lora": "playground:cat", "trigger": "sks", "class_word": "cat"}
RUN: dict[str, Any] = {"model": "playground", "steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ControlNet, an IP-Adapter and images, for the playground."""
    return playground_guides(tmp_path_factory.mktemp("guides"))


def scene_of(folder: Path, **changes: Any) -> Scene:
    """A cat with a control and an IP-Adapter."""
    given: dict[str, Any] = {
        "prompt": "a sks cat", "concepts": (Concept(**CAT),), "width": SIDE, "height": SIDE,
        "controls": ({"model": str(folder / "pose"), "image": str(folder / "pose.png"), "regions": {"cat": 0.5}},),
        "ip_adapters": (
            {
                "model": str(folder / "faces"), "weight_name": "adapter.safetensors", "scale": 0.6,
                "image": str(folder / "face.png"), "region": (0, 0, SIDE // 2, SIDE),
            },
        ),
    }  # fmt: skip
    return Scene(**given | changes)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.usefixtures("small_by_default", "costs_do_not_matter")
def test_an_image_is_made_from_a_scene_file_checked_and_reproduced(guides, tmp_path):
    boxed = Concept(**CAT, region=(0, 0, SIDE // 2, SIDE))
    scene = scene_of(guides, concepts=(boxed,))
    write_scene(scene, guides / "scene.yaml", overwrite=True)
    text = (guides / "scene.yaml").read_text()
    assert "model: pose\n" in text
    assert "image: face.png" in text
    assert read_scene(guides / "scene.yaml") == scene
    checked = flat(call("check", "playground", "--scene", guides / "scene.yaml", "--steps", "2").output)
    assert "face.png, scale 0.6" in checked
    call("run", "playground", "--scene", guides / "scene.yaml", "--steps", "2", "--method", "merge", "--out", tmp_path)
    assert read_record(tmp_path / "0.png").images.keys() == {"controls.0.image", "ip_adapters.0.image"}
    assert "identical: every pixel is the same" in flat(call("replay", tmp_path / "0.png").output)
    assert "repainted cat" in flat(call("refine", tmp_path / "0.png").output)


@pytest.mark.slow
def test_each_guide_changes_the_image_and_none_stays_in_the_pipeline(guides):
    pipe = ComposePipeline.from_pretrained(playground_model())
    pipe.set_progress_bar_config(disable=True)
    scenes = [
        scene_of(guides, controls=(), ip_adapters=()),
        scene_of(guides, controls=()),
        scene_of(guides, ip_adapters=(), controls=(scene_of(guides).controls[0].model_copy(update={"regions": {}}),)),
        scene_of(guides, controls=(), ip_adapters=()),
    ]
    alone, seen, posed, again = (
        pixels(make(pipe, Run(scene=scene, method="merge", **RUN)).image) for scene in scenes
    )  # fmt: skip
    assert np.array_equal(alone, again)
    for one, other in ((alone, seen), (alone, posed), (seen, posed)):
        assert np.abs(one - other).max() > 10


def test_without_concepts_a_controlnet_does_what_it_does_in_diffusers(guides):
    control = scene_of(guides).controls[0].model_copy(update={"regions": {}, "scale": 0.7, "end": 0.6})
    scene = scene_of(guides, concepts=(), controls=(control,), ip_adapters=(), prompt="a cat")
    run = Run(scene=scene, **RUN)
    pipe = open_model(run)
    found = make(pipe, run).image
    net = ControlNetModel.from_pretrained(guides / "pose")
    plain: Any = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    (expected,) = plain(
        "a cat", image=Image.open(guides / "pose.png"), width=SIDE, height=SIDE, num_inference_steps=2,
        guidance_scale=5.0, generator=seeded(1), controlnet_conditioning_scale=0.7, control_guidance_end=0.6,
    ).images  # fmt: skip
    assert np.array_equal(pixels(found), pixels(expected))


def test_a_suite_has_them_too(guides):
    given = scene_of(guides)
    scene = SuiteScene(
        name="cat", prompt="a sks cat", concepts=("cat",), controls=given.controls, ip_adapters=given.ip_adapters
    )
    assert scene.image_files.keys() == {"controls.0.image", "ip_adapters.0.image"}
    assert scene.start == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control", "model={0}/pose,imag=x.png"], "unknown field 'imag'; fields are model, image"),
        (["--control", "model={0}/pose"], "image"),
        (["--control", "model={0}/nothing,image={0}/pose.png"], "there is no control model"),
        (["--control", "model={0}/faces/image_encoder,image={0}/pose.png"], "a control is a ControlNetModel"),
        (["--control", "model={0}/pose,image={0}/lost.png"], "there is no control image"),
        (["--control", "model={0}/pose,image={0}/pose.png,start=2"], "start"),
        (["--control", "model={0}/pose,image={0}/pose.png,regions=dog:1"], "dog"),
        (["--ip-adapter", "model={0}/faces,weight_name=a.bin,image={0}/face.png"], "weight_name"),
        (["--ip-adapter", "model={0}/faces,weight_name=a.safetensors,image={0}/face.png"], "cannot be loaded"),
        (["--ip-adapter", "model={0}/lost,weight_name=a.safetensors,image={0}/face.png"], "there is no IP-Adapter"),
    ],
)
def test_what_cannot_be_used_is_refused_with_words(guides, tmp_path, options, message):
    given = [option.format(guides) for option in options]
    found = call(
        "run", "playground", "--prompt", "a sks cat", "--lora", "playground:cat", "--steps", "1", "--method", "merge",
        "--out", tmp_path, *given, code=2,
    )  # fmt: skip
    assert message in flat(found.output)
