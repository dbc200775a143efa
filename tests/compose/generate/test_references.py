"""Commands, scenes and records with images that the model reads beside the prompt."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from commands import call, flat
from flux2 import flux2_transformer, saved_klein
from lora_compose import Scene
from lora_compose.compose.batch.entries import read_entries
from lora_compose.compose.cluster.packing import Packer
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.files.scenes import read_scene, write_scene
from lora_compose.compose.generate.facts import run_facts
from lora_compose.compose.generate.replay import runnable
from lora_compose.pipelines.scene.scene import Run
from transformer_families import as_file, random_lora_of_all

STEPS = ("--steps", "1", "--guidance", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FLUX.2-klein, the LoRA of a cat, and two images of different sizes."""
    folder = tmp_path_factory.mktemp("klein")
    saved_klein(folder / "model")
    save_file(dict(as_file(random_lora_of_all(flux2_transformer(), 0))), folder / "cat.safetensors")
    for seed, (name, size) in enumerate((("room.png", (64, 96)), ("chair.png", (80, 64)))):
        noise = np.random.default_rng(seed).random((*reversed(size), 3))
        Image.fromarray((noise * 255).astype("u1")).save(folder / name)
    return folder


@pytest.fixture
def asked(folder: Path) -> Any:
    """Calls a command for a cat of that model; `concept` are further fields of the cat."""
    cat = f"path={folder / 'cat.safetensors'},trigger=sks,class=cat"
    return lambda command, *more, concept="", **options: call(
        command, folder / "model", "--prompt", "a sks cat", "--concept", cat + concept, "--method", "merge", *STEPS,
        *more, **options,
    )  # fmt: skip


def test_an_image_with_references_is_made_and_reproduced(folder, asked, tmp_path):
    both = ["--reference", folder / "room.png", "--reference", folder / "chair.png"]
    asked("run", *both, "--out", tmp_path)
    record = read_record(tmp_path / "0.png")
    assert record.images.keys() == {"references.0", "references.1"}
    assert read_pixels(tmp_path / "0.png").size == (64, 96), "the size of the first reference"
    assert "identical: every pixel is the same" in flat(call("replay", tmp_path / "0.png").output)


def test_a_concept_that_is_told_to_acts_on_references_too(folder, asked, tmp_path):
    fields = {"name": "cat", "lora": str(folder / "cat.safetensors"), "trigger": "sks", "references": True}
    room = str(folder / "room.png")
    scene = {"prompt": "a sks cat", "references": room, "concepts": [fields]}
    (tmp_path / "cats.yaml").write_text(json.dumps({"scenes": [{"name": "cat", **scene}]}))
    (entry,) = read_entries([tmp_path / "cats.yaml"]).entries
    assert entry.scene.concepts[0].references
    asked("run", "--reference", room, "--out", tmp_path / "1", concept=",references=true")
    asked("run", "--reference", room, "--out", tmp_path / "2")
    told, without = (read_pixels(tmp_path / name / "0.png").tobytes() for name in "12")
    assert told != without
    assert read_record(tmp_path / "1" / "0.png").run.scene.concepts[0].references
    found = flat(asked("check", "--reference", room, concept=",references=true").output)
    assert "cat: references acts on reference images, too" in found


def test_replay_refuses_references_that_are_gone_or_others(folder, asked, tmp_path):
    path = tmp_path / "given.png"
    (tmp_path / "given.png").write_bytes((folder / "room.png").read_bytes())
    asked("run", "--reference", path, "--out", tmp_path)
    Image.new("RGB", (64, 96), "red").save(path)
    assert f"{path}: another image, SHA-256" in flat(call("replay", tmp_path / "0.png", code=2).output)
    path.unlink()
    assert f"{path}: there is no such file, SHA-256" in flat(call("replay", tmp_path / "0.png", code=2).output)
    runnable(read_record(tmp_path / "0.png"))  # its LoRA is still there


def test_check_tells_what_references_cost(folder, asked):
    found = flat(asked("check", "--reference", folder / "room.png").output)
    assert f"reference {folder / 'room.png'}" in found
    assert "size 64 x 96 pixels" in found
    assert "2 rows, each a latent through the model once (1 steps with guidance), each 1." in found
    assert "times one without reference images" in found
    assert "without reference images" not in flat(asked("check").output)


@pytest.mark.parametrize(("more", "message"), [
    (("--reference", "gone.png"), "there is no reference image 'gone.png'"),
    (
        ("--image", "room.png"),
        "starts from an image only with a mask: give one (mask_image, --mask-image); if it is to be read as",
    ),
    (("--image", "room.png", "--reference", "room.png"), "an image to start from and reference images cannot be comb"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(folder, asked, more, message, monkeypatch):
    monkeypatch.chdir(folder)
    assert message in flat(asked("run", *more, code=2).output)


def test_models_that_read_none_say_which_do(folder):
    found = call(
        "run", "playground", "--prompt", "a cat", "--reference", folder / "room.png", *STEPS, code=2
    )  # fmt: skip
    assert "reference images are read by FLUX.2-klein, " in flat(found.output)
    assert ", not by Stable Diffusion 1.x and 2.x; leave them out" in flat(found.output)


def test_scene_files_batches_and_parcels_carry_references(tmp_path, folder):
    scene = Scene(prompt="a cat", references=(str(tmp_path / "a.png"), str(tmp_path / "b.png")))
    write_scene(scene, tmp_path / "scene.yaml")
    assert "- a.png\n- b.png" in (tmp_path / "scene.yaml").read_text().replace("  - ", "- ")
    assert read_scene(tmp_path / "scene.yaml") == scene
    assert Scene(prompt="a cat", references="a.png").references == ("a.png",)  # pyright: ignore[reportArgumentType]
    (tmp_path / "rows.csv").write_text(f"prompt,references\na cat,{folder / 'room.png'}\na dog,\n")
    cat, dog = read_entries([tmp_path / "rows.csv"]).entries
    assert (cat.scene.references, dog.scene.references) == ((str(folder / "room.png"),), ())
    assert Packer(Path.read_bytes).named_by(cat.scene).moves.keys() == {str(folder / "room.png")}


def test_what_an_image_depends_on_has_the_content_of_its_references(folder, tmp_path):
    facts = partial(run_facts, seeds=[0], threads=None, savers=())
    run = Run(scene=Scene(prompt="a cat", references=(str(folder / "room.png"),)), model="playground")
    (tmp_path / "moved.png").write_bytes((folder / "room.png").read_bytes())
    moved = run.model_copy(update={"scene": Scene(prompt="a cat", references=(str(tmp_path / "moved.png"),))})
    assert facts(run) == facts(moved)
    (tmp_path / "moved.png").write_bytes((folder / "chair.png").read_bytes())
    assert facts(run) != facts(moved), "a file that has changed is read again"
    other = run.model_copy(update={"scene": Scene(prompt="a cat", references=(str(folder / "chair.png"),))})
    assert facts(moved) == facts(other)
    assert "references" not in facts(Run(scene=Scene(prompt="a cat"), model="playground"))[0]["scene"]
