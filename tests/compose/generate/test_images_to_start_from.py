"""Scenes, commands and records with an image to start from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from anima import anima_pipeline, cosmos_transformer
from commands import call, flat
from flux import flux_pipeline, flux_transformer
from lora_compose import Concept, Run, Scene
from lora_compose.compose.evaluation.suite import SuiteScene
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.files.scenes import read_scene, write_scene
from lora_compose.pipelines.families import ComposeFluxKontextPipeline
from transformer_families import as_file, random_lora_of_all

pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")
SIDE, HALF = 64, 32
CAT: dict[str, Any] = {"name": "cat", "lora": "playground:cat", "trigger": "sks", "class_word": "cat"}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """An image of noise."""
    path = tmp_path / "start.png"
    Image.fromarray((np.random.default_rng(0).random((SIDE, SIDE, 3)) * 255).astype("u1")).save(path)
    return path


@pytest.mark.usefixtures("small_by_default", "costs_do_not_matter")
def test_an_image_is_painted_from_a_scene_file_reproduced_and_refined(tmp_path, start):
    scene = Scene(
        prompt="a sks cat", image=str(start), mask_image=(0.0, 0.0, 0.5, 1.0), strength=0.6, paste_original=True,
        concepts=(Concept(**CAT, region=(0.0, 0.0, 0.5, 1.0)),),
    )  # fmt: skip
    write_scene(scene, tmp_path / "scene.yaml")
    assert "image: start.png" in (tmp_path / "scene.yaml").read_text()
    assert read_scene(tmp_path / "scene.yaml") == scene
    checked = call("check", "playground", "--scene", tmp_path / "scene.yaml", "--steps", "3")
    assert "(1 steps with guidance)" in flat(checked.output)
    call(
        "run", "playground", "--scene", tmp_path / "scene.yaml", "--steps", "3", "--method", "merge", "--out", tmp_path
    )
    image, before = (np.asarray(read_pixels(path)) for path in (tmp_path / "0.png", start))
    assert np.array_equal(image[:, HALF:], before[:, HALF:])
    assert not np.array_equal(image[:, :HALF], before[:, :HALF])
    assert read_record(tmp_path / "0.png").images.keys() == {"image"}
    again = call("replay", tmp_path / "0.png")
    assert "identical: every pixel is the same" in flat(again.output)
    refined = call("refine", tmp_path / "0.png", "--strength", "0.5")
    assert "repainted cat" in flat(refined.output)
    assert np.array_equal(np.asarray(read_pixels(tmp_path / "0-refined.png"))[:, HALF:], before[:, HALF:])


@pytest.mark.usefixtures("small_by_default")
def test_an_image_with_a_bystander_is_refined_where_the_subject_is(tmp_path):
    bystander = Concept(name="fox", role="bystander", class_word="fox", region=(0.5, 0.0, 1.0, 1.0))
    concepts = (Concept(**CAT, region=(0.0, 0.0, 0.5, 1.0)), bystander)
    scene = Scene(prompt="a sks cat and a fox", concepts=concepts, width=SIDE, height=SIDE)
    write_scene(scene, tmp_path / "scene.yaml")
    options = ("--method", "regional", "--steps", "2", "--out", tmp_path)
    call("run", "playground", "--scene", tmp_path / "scene.yaml", *options)
    assert "repainted cat:" in flat(call("refine", tmp_path / "0.png").output)
    refused = call("refine", tmp_path / "0.png", "--subject", "fox", code=2)
    assert "--subject fox: the subjects of this image are cat" in flat(refused.output)


def test_anima_starts_from_an_image(tmp_path, start):
    anima_pipeline().save_pretrained(tmp_path / "anima")
    save_file(dict(as_file(random_lora_of_all(cosmos_transformer(), 0))), tmp_path / "cat.safetensors")
    Image.new("RGB", (144, 130), "red").save(start)
    given = [
        tmp_path / "anima", "--prompt", "a sks cat", "--concept", f"path={tmp_path / 'cat.safetensors'},trigger=sks",
        "--image", start, "--strength", "0.5", "--steps", "2", "--device", "cpu",
    ]  # fmt: skip
    assert "size 144 x 128 pixels" in flat(call("check", *given).output)
    call("run", *given, "--out", tmp_path)
    assert read_pixels(tmp_path / "0.png").size == (144, 128)
    assert "identical: every pixel is the same" in flat(call("replay", tmp_path / "0.png").output)
    refused = call("check", *given, "--mask-image", "0,0,64,64", code=2)
    assert "diffusers has no inpainting for Anima; it has image-to-image" in flat(refused.output)


def test_kontext_inpaints_at_a_size_that_it_knows(tmp_path, start):
    flux_pipeline(ComposeFluxKontextPipeline).save_pretrained(tmp_path / "kontext")
    save_file(dict(as_file(random_lora_of_all(flux_transformer(), 0))), tmp_path / "cat.safetensors")
    Image.new("RGB", (160, 112)).save(start)
    given = [
        tmp_path / "kontext", "--prompt", "a sks cat", "--concept", f"path={tmp_path / 'cat.safetensors'},trigger=sks",
        "--steps", "2", "--device", "cpu", "--image", start,
    ]  # fmt: skip
    checked = flat(call("check", *given, "--mask-image", "0,0,80,112").output)
    assert "size 1248 x 832 pixels" in checked
    assert "times one without reference images" in checked
    refused = call("check", *given, "--mask-image", "0,0,80,112", "--width", "160", code=2)
    assert "width and height are those of the image, 1248 x 832 as this model reads it" in flat(refused.output)
    whole = flat(call("check", *given, "--strength", "0.5", code=2).output)
    assert "starts from an image only with a mask: give one (mask_image, --mask-image)" in whole


def test_a_changed_image_is_reported_by_replay(tmp_path, start):
    call(
        "run", "playground", "--prompt", "a cat", "--image", start, "--strength", "0.5", "--steps", "2",
        "--out", tmp_path,
    )  # fmt: skip
    Image.new("RGB", (SIDE, SIDE), "red").save(start)
    again = call("replay", tmp_path / "0.png", code=1)
    assert "changed: image: was" in flat(again.output)
    start.unlink()
    assert "there is no image" in flat(call("replay", tmp_path / "0.png", code=2).output)


@pytest.mark.parametrize(("fields", "message"), [
    ({"strength": 0.5}, "strength needs an image"),
    ({"image": "a.png", "paste_original": True}, "need a mask"),
    ({"image": "a.txt"}, "image: expected text that should match"),
    ({"image": "a.png", "strength": 0}, "strength: expected greater than 0"),
    ({"image": "a.png", "mask_image": (0, 0, 0, 4)}, "mask_image: a region is"),
])  # fmt: skip
def test_scenes_refuse_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Scene(prompt="a cat", **fields)


def test_a_box_of_fractions_is_one_of_floats_up_to_1():
    assert Concept(name="cat", region=(0, 0, 0.5, 1)).region == (0.0, 0.0, 0.5, 1.0)
    assert Concept(name="cat", region=(0, 0, 1, 1)).region == (0, 0, 1, 1)
    with pytest.raises(ValueError, match="region"):
        Concept(name="cat", region=(0, 0, 0.5, 64))


def test_a_mask_that_is_an_image_is_kept_as_text_and_read_again():
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 8, 12))
    concept = Concept(name="cat", region=mask)  # type: ignore[arg-type]
    assert concept == Concept(name="cat", region=np.asarray(mask))  # type: ignore[arg-type]
    run = Run(scene=Scene(prompt="a cat", concepts=(concept,)), model="playground")
    assert Run.model_validate_json(run.model_dump_json()) == run


def test_scenes_of_a_suite_name_images():
    scene = SuiteScene(name="add", prompt="a sks cat", concepts=("cat",), image="a.png", strength=0.5)
    assert scene.start == {"image": "a.png", "strength": 0.5}
