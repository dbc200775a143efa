"""A suite of public models and LoRAs: what it says before it starts, and what it downloads, on a local hub."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from commands import call, flat
from local_hub import LocalHub, Repository, connect, serving
from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.evaluation.published import fetch, read_published, wanted
from lora_compose.compose.evaluation.scoring import reference_crops
from lora_compose.compose.evaluation.shipped import published_dir
from lora_compose.compose.evaluation.summary import kind_of_scene
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.playground.assets import (
    playground_judge,
    playground_lora,
    playground_model,
    playground_references,
)
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.support.hub import HubError

MODEL, CAT, DOG = "stabilityai/stable-diffusion-xl-base-1.0", "somebody/cat-lora", "somebody/pets"
JUDGE = "openai/clip-vit-base-patch32"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The playground's model, two of its LoRAs and its judge under names of the hub."""
    cat, dog = (playground_lora(name).read_bytes() for name in ("cat", "dog"))
    found = {
        MODEL: Repository.of(playground_model()),
        CAT: Repository({"cat.safetensors": cat}),
        DOG: Repository({"cat.safetensors": cat, "dog.safetensors": dog}),
        JUDGE: Repository.of(playground_judge()),
    }
    with serving(LocalHub(found)) as hub:
        connect(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def suite(tmp_path: Path, hub: LocalHub) -> dict[str, Any]:
    concepts = [
        {"name": name, "lora": name, "trigger": word, "class_word": name, "references": f"playground:{name}"}
        for name, word in (("cat", "sks"), ("dog", "zwx"))
    ]
    dog = hashlib.sha256(hub.repositories[DOG].files["dog.safetensors"]).hexdigest()
    return {
        "downloads": {
            "sdxl": {"repository": MODEL, "licence": "openrail++"},
            "cat": {"repository": CAT, "file": "cat.safetensors", "revision": hub.repositories[CAT].commit},
            "dog": {"repository": DOG, "file": "dog.safetensors", "sha256": dog, "licence": "mit"},
        },
        "suite": {
            "name": "small", "model": "sdxl", "encoder": "playground:judge", "concepts": concepts, "seeds": [1],
            "methods": ["merge", "tara"], "steps": 1, "guidance_scale": 1.0, "threads": 1,
            "scenes": [{
                "name": "both", "prompt": "a sks cat and a zwx dog", "concepts": ["cat", "dog"],
                "regions": {"cat": [0, 0, 64, 128], "dog": [64, 0, 128, 128]},
            }],
        },
    }  # fmt: skip


def written(suite: dict[str, Any], folder: Path) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def test_a_plan_names_sizes_and_licences_and_downloads_nothing(
    hub: LocalHub, suite: dict[str, Any], tmp_path: Path
) -> None:
    told = flat(call("evaluate", "published", written(suite, tmp_path), "--plan").output)
    assert "small: 5 images" in told  # no LoRA, each alone, and the two methods
    assert f"sdxl: {MODEL}, the main branch, not pinned, " in told
    assert "licence: openrail++" in told
    assert f"cat: {CAT}, commit {hub.repositories[CAT].commit[:12]}, " in told
    assert f"licence: see {hub.endpoint}/{CAT}" in told
    assert f"dog: {DOG}, SHA-256 {suite['downloads']['dog']['sha256'][:12]}, " in told
    assert not hub.served
    one = next(one for one in wanted(read_published(tmp_path / "suite.yaml")) if one.name == "dog")
    assert one.size == one.missing == len(hub.repositories[DOG].files["dog.safetensors"])


@pytest.mark.slow
def test_a_plan_needs_no_package_of_the_evaluation(suite: dict[str, Any], tmp_path: Path) -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('scipy', 'pandas', 'matplotlib')))\n"
    code += "from lora_compose.compose.cli import main; main()"
    command = [sys.executable, "-c", code, "evaluate", "published", written(suite, tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    told = subprocess.run([*command, "--plan"], capture_output=True, text=True, env=environment)
    assert told.returncode == 0, told.stderr
    assert "small: 5 images" in told.stdout
    refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert "the evaluation needs scipy and pandas and matplotlib" in flat(refused.stderr)


@pytest.mark.slow
def test_a_smoke_test_makes_two_images_and_tells_what_the_whole_costs(
    hub: LocalHub, suite: dict[str, Any], tmp_path: Path
) -> None:
    path, out = written(suite, tmp_path), tmp_path / "out"
    told = flat(call("evaluate", "published", path, "--out", out, "--smoke").output)
    assert sorted(image.name for image in (out / "smoke").glob("*.png")) == ["merge.png", "tara.png"]
    assert "5 images, " in told
    assert " FLOPs: about " in told
    assert [one for one in out.iterdir() if one.name != "smoke"] == []
    for repository, file in ((CAT, "cat.safetensors"), (DOG, "dog.safetensors")):
        assert hub.bytes_of(f"{repository}/{file}") == len(hub.repositories[repository].files[file])
    assert hub.bytes_of(f"{DOG}/cat.safetensors") == 0
    assert {one.missing for one in wanted(read_published(path)) if one.download.file} == {0}


def test_a_scene_that_cannot_be_made_is_named_before_the_model_is_opened(
    suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ComposePipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was opened"))
    outside = deepcopy(suite["suite"]["scenes"][0])
    outside["name"], outside["regions"]["cat"][2] = "outside", 640
    suite["suite"]["scenes"].append(outside)
    command = ("evaluate", "published", written(suite, tmp_path), "--smoke", "--out", tmp_path / "out")
    told = flat(call(*command, code=2).output)
    assert "scene 'outside', merge: the region (0, 0, 640, 128) of concept 'cat' leaves the canvas" in told
    assert "scene 'both'" not in told


@pytest.mark.slow
def test_a_scene_that_only_the_model_refuses_is_named_when_its_cost_is_counted(
    suite: dict[str, Any], tmp_path: Path
) -> None:
    save_file({"unet.nothing.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "x.safetensors")
    robot = {"trigger": "qrt", "class_word": "robot", "references": "playground:robot"}
    suite["suite"]["concepts"].append({"name": "robot", "lora": "./x.safetensors", **robot})
    scene = {"name": "later", "prompt": "a qrt robot", "concepts": ["robot"], "regions": {"robot": [0, 0, 64, 128]}}
    suite["suite"]["scenes"].append(scene)
    command = ("evaluate", "published", written(suite, tmp_path), "--smoke", "--out", tmp_path / "out")
    assert "scene 'later', merge: x.safetensors matches no layer of this model" in flat(call(*command, code=2).output)


@pytest.mark.slow
def test_references_that_a_lora_makes_are_counted_first_and_made_after_the_two_images(
    hub: LocalHub, suite: dict[str, Any], tmp_path: Path
) -> None:
    suite["references"] = {"cat alone": ALONE}
    suite["suite"]["concepts"][0]["references"] = "cat alone"
    suite["suite"]["methods"] = ["merge", {"name": "ties", "method": "merge", "merge": "ties"}]
    path, out = written(suite, tmp_path), tmp_path / "out"
    told = flat(call("evaluate", "published", path, "--out", out, "--smoke").output)
    assert sorted(image.name for image in out.rglob("*.png")) == ["merge.png", "ties.png"]
    assert "5 images and 2 references, " in told
    assert "Merging LoRAs into one file is not in it." in told
    told = flat(call("evaluate", "published", path, "--out", out, "--processes", 1).output)
    assert told.index("5 images and 2 references, ") < told.index("The report: ")
    (folder,) = (out / "references").iterdir()
    assert [image.name for image in sorted(folder.iterdir())] == ["7.png", "8.png"]


@pytest.mark.slow
def test_the_whole_runs_and_resumes_without_another_download(
    hub: LocalHub, suite: dict[str, Any], tmp_path: Path
) -> None:
    path, out = written(suite, tmp_path), tmp_path / "out"
    call("evaluate", "published", path, "--out", out)
    assert (out / "report.html").exists()
    served = len(hub.served)
    call("evaluate", "published", path, "--out", out)
    weights = [one.path for one in hub.served[served:] if one.path.endswith(".safetensors")]
    assert not weights


def test_what_the_hub_has_changed_or_does_not_give_is_said_before_anything_is_downloaded(
    hub: LocalHub, suite: dict[str, Any], tmp_path: Path
) -> None:
    suite["downloads"]["dog"]["sha256"] = "0" * 64
    with pytest.raises(HubError, match=r"dog\.safetensors is another file than the suite names: its SHA-256 is"):
        list(wanted(read_published(written(suite, tmp_path))))
    suite["downloads"]["dog"] = {"repository": DOG, "file": "wolf.safetensors"}
    with pytest.raises(HubError, match=r"'somebody/pets' has no wolf.safetensors: see http"):
        list(wanted(read_published(written(suite, tmp_path))))
    suite["downloads"]["dog"] = {"repository": DOG, "file": "dog.safetensors", "revision": "v9"}
    with pytest.raises(HubError, match="has no revision 'v9'"):
        list(wanted(read_published(written(suite, tmp_path))))
    hub.repositories[CAT].gated = True
    with pytest.raises(HubError, match=r"'somebody/cat-lora' is gated: accept its conditions"):
        list(wanted(read_published(written(suite, tmp_path))))
    assert not hub.served


@pytest.mark.parametrize(
    ("download", "message"),
    [
        ({"repository": CAT, "file": "a", "files": "b"}, "give file or files, not both"),
        ({"repository": CAT, "sha256": "0" * 64}, "sha256 is of one file: give file as well"),
        ({"repository": CAT, "files": []}, "downloads.extra.files"),
        ({"repository": CAT, "file": "cat.safetensors"}, "nothing in the suite names the download 'extra'"),
        ({"repository": "cat"}, "downloads.extra.repository"),
    ],
)
def test_downloads_that_cannot_be_are_refused(
    suite: dict[str, Any], tmp_path: Path, download: dict[str, Any], message: str
) -> None:
    suite["downloads"]["extra"] = download
    with pytest.raises(FileError, match=message):
        read_published(written(suite, tmp_path))


ALONE = {"prompt": "a sks cat on grass", "seeds": [7, 8]}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cat alone", {"prompt": "a cat on grass"}, "the prompt does not have the trigger 'sks'"),
        ("cat alone", {"seeds": [1, 7]}, "the seed 1 is one of the suite's; choose others"),
        ("unused", {}, "the references 'unused' are those of 0 concepts; one has to name them"),
        ("cat", {}, "'cat' is the name of a download and of references"),
    ],
)
def test_references_that_no_lora_can_make_are_refused(
    suite: dict[str, Any], tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    suite["suite"]["concepts"][0]["references"] = name
    suite["references"] = {name: ALONE | changes}
    if name == "unused":
        suite["suite"]["concepts"][0]["references"] = "playground:cat"
    with pytest.raises(FileError, match=message):
        read_published(written(suite, tmp_path))


def with_clip(suite: dict[str, Any]) -> dict[str, Any]:
    """The suite, scored by a model of transformers from the hub."""
    clip = {"repository": JUDGE, "files": ["*.json", "model.safetensors"], "licence": "mit"}
    suite["downloads"]["clip"] = clip
    suite["suite"] |= {"encoder": "clip", "metrics": [{"name": "clip-t", "model": "clip"}]}
    return suite


def test_photographs_of_a_data_set_and_models_that_score_are_downloads_as_well(
    hub: LocalHub, suite: dict[str, Any], tmp_path: Path
) -> None:
    photographs = [path.read_bytes() for path in playground_references("cat")[:2]]
    found = {f"dataset/cat/{number}.png": data for number, data in enumerate(photographs)}
    hub.repositories["datasets/somebody/photographs"] = Repository(found | {"dataset/dog/0.png": b"not asked for"})
    suite["downloads"]["photographs"] = {
        "repository": "somebody/photographs", "dataset": True, "files": "dataset/cat/*.png", "licence": "cc-by-4.0",
    }  # fmt: skip
    suite["suite"]["concepts"][0]["references"] = "photographs"
    judge = hub.repositories[JUDGE].files | {}
    hub.repositories[JUDGE].files["pytorch_model.bin"] = b"not asked for"
    published = read_published(written(with_clip(suite), tmp_path))
    photographed, clip = (
        next(one for one in wanted(published) if one.name == name) for name in ("photographs", "clip")
    )
    assert photographed.size == photographed.missing == sum(map(len, photographs))
    assert photographed.download.page == f"{hub.endpoint}/datasets/somebody/photographs"
    assert clip.size == clip.missing == sum(map(len, judge.values()))
    ready = fetch(published).suite
    assert len(reference_crops(ready.concept("cat"))) == 2
    assert ready.encoder == ready.metrics[0].model
    assert load_encoder(ready.encoder).has_text
    assert hub.bytes_of("dog/0.png") == hub.bytes_of("pytorch_model.bin") == 0
    assert {one.missing for one in wanted(published) if one.name in ("photographs", "clip")} == {0}
    hub.repositories["datasets/somebody/photographs"].gated = True
    with pytest.raises(HubError, match=r"accept its conditions on http://.*/datasets/somebody/photographs, and log in"):
        list(wanted(published))


def test_models_that_score_are_asked_for_before_anything_is_downloaded(
    hub: LocalHub, suite: dict[str, Any], tmp_path: Path
) -> None:
    path = written(with_clip(suite), tmp_path)
    weights = hub.repositories[JUDGE].files.pop("model.safetensors")
    with pytest.raises(HubError, match=rf"'{JUDGE}' has no model.safetensors: see http"):
        list(wanted(read_published(path)))
    hub.repositories[JUDGE].files["model.safetensors"] = weights
    suite["suite"] |= {"encoder": JUDGE, "metrics": ["clip-t"]}
    del suite["downloads"]["clip"]
    told = flat(call("evaluate", "published", written(suite, tmp_path), "--plan").output)
    assert told.count(f"{JUDGE}: none of the downloads, not pinned, read when it is opened; licence: see") == 1
    hub.repositories[JUDGE].gated = True
    with pytest.raises(HubError, match=rf"'{JUDGE}' is gated: accept its conditions"):
        list(wanted(read_published(path)))
    assert not hub.served


def served(downloads: Any) -> dict[str, Repository]:
    """Small repositories with the files that are wanted, under their names."""
    found: dict[str, Repository] = {}
    for one in downloads.values():
        name = f"datasets/{one.repository}" if one.dataset else one.repository
        repository = found.setdefault(name, Repository({}, tag=one.revision))
        for pattern in (one.file,) if one.file else one.patterns or ("model_index.json",):
            repository.files[pattern.replace("*", "0")] = pattern.encode()
    return found


@pytest.mark.parametrize("path", sorted(published_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_that_come_along_name_files_of_the_hub_and_compare_what_papers_do(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = read_published(path)
    methods = {method.merge or method.method for method in published.suite.compared}
    assert {"merge", "ssr", "iteris", "freefuse", "regional", "draft"} <= methods
    assert ("lora-composer" in methods) == ("sdxl" in published.downloads)
    assert {scene.interaction for scene in published.suite.scenes} == {"apart", "touching", "entangled"}
    assert {metric.name for metric in published.suite.metrics} == {"clip-t", "clip-i", "dino", "scr"}
    assert len(published.suite.scenes) >= 10, "fewer have no verdict"
    assert not published.elsewhere
    with serving(LocalHub(served(published.downloads))) as hub:
        connect(hub, tmp_path / "cache", monkeypatch)
        if any(one.sha256 for one in published.downloads.values()):
            with pytest.raises(HubError, match=r"is another file than the suite names: its SHA-256 is .*, expected"):
                list(wanted(published))
        anything = {name: one.model_copy(update={"sha256": None}) for name, one in published.downloads.items()}
        found = list(wanted(published.model_copy(update={"downloads": anything})))
    assert [one.name for one in found] == list(published.downloads)
    assert all(one.size for one in found)
    assert not hub.served


def test_suites_that_come_along_have_two_to_five_subjects_and_pairs_of_one_class() -> None:
    suites = [read_published(path).suite for path in published_dir().glob("*.yaml")]
    kinds = {kind_of_scene(suite, scene).partition(",")[0] for suite in suites for scene in suite.scenes}
    assert {"2 subjects", "2 subjects of one class", "3 subjects", "4 subjects", "5 subjects of one class"} <= kinds


def test_the_dreambooth_suites_have_the_same_subjects_and_scenes() -> None:
    sdxl, krea2 = (read_published(published_dir() / f"dreambooth-{name}.yaml").suite for name in ("sdxl", "krea2"))
    assert krea2.scenes == sdxl.scenes
    assert [one.name for one in krea2.concepts] == [one.name for one in sdxl.concepts]
    assert krea2.metrics == sdxl.metrics
    assert {one.name for one in krea2.compared} == {one.name for one in sdxl.compared} - {"lora-composer"}


# --- trainings ---


@pytest.fixture
def with_training(hub: LocalHub, suite: dict[str, Any]) -> dict[str, Any]:
    """The suite, whose LoRA of the cat is trained on photographs of the hub."""
    photographs = {f"cat/{path.name}": path.read_bytes() for path in playground_references("cat")[:2]}
    hub.repositories["datasets/somebody/photographs"] = Repository(photographs)
    del suite["downloads"]["cat"]
    suite["downloads"]["photographs"] = {"repository": "somebody/photographs", "dataset": True, "files": "cat/*.png"}
    settings = {"resolution": 64, "rank": 2, "mixed_precision": "no"}
    suite["trainings"] = {"cat": {"images": "photographs", "steps": 4, "settings": settings}}
    return suite


def test_a_plan_names_what_is_trained(with_training: dict[str, Any], hub: LocalHub, tmp_path: Path) -> None:
    told = flat(call("evaluate", "published", written(with_training, tmp_path), "--plan").output)
    assert "cat: trained, 4 steps on sdxl, with photographs" in told
    assert "photographs: somebody/photographs, the main branch, not pinned, " in told
    assert not hub.served


@pytest.mark.slow
def test_what_is_trained_is_tried_before_the_images_and_trained_after_the_cost(
    with_training: dict[str, Any], tmp_path: Path
) -> None:
    path, out = written(with_training, tmp_path), tmp_path / "out"
    told = flat(call("evaluate", "published", path, "--out", out, "--smoke").output)
    assert "s for each of 4 steps of its training" in told
    assert told.index("Training, 4 steps in all: about ") < told.rindex("5 images, ")
    assert not (out / "loras").exists()
    told = flat(call("evaluate", "published", path, "--out", out, "--processes", 1).output)
    assert told.index("Training, 4 steps in all: about ") < told.index("The report: ")
    (lora,) = (out / "loras").glob("*.safetensors")
    assert str(lora) in (out / "suite.yaml").read_text()
    before = lora.stat().st_mtime_ns
    assert "Training" not in flat(call("evaluate", "published", path, "--out", out, "--processes", 1).output)
    assert lora.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("trainings", "message"),
    [
        ({"unused": {"images": "photographs"}}, "the training 'unused' is that of 0 concepts; one has to name it"),
        ({"dog": {"images": "photographs"}}, "'dog' is the name of a download and of a training"),
        ({"cat": {"images": "photographs", "steps": 1}}, "trainings.cat.steps"),
        ({"cat": {"images": "/elsewhere"}}, "nothing in the suite names the download 'photographs'"),
    ],
)
def test_trainings_that_cannot_be_are_refused(
    with_training: dict[str, Any], tmp_path: Path, trainings: dict[str, Any], message: str
) -> None:
    with_training["trainings"] = trainings
    with pytest.raises(FileError, match=message):
        read_published(written(with_training, tmp_path))


def test_every_subject_of_the_dreambooth_suites_is_trained_on_its_photographs() -> None:
    for path in published_dir().glob("dreambooth-*.yaml"):
        published = read_published(path)
        for concept in published.suite.concepts:
            assert published.trainings[str(concept.lora)].images == concept.references
