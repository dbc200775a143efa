"""A suite of public models and LoRAs: what it says before it starts, and what it downloads, on a local hub."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import call, flat
from local_hub import LocalHub, Repository, connect, serving
from lora_compose.compose.evaluation.published import read_published, wanted
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines.support.hub import HubError

MODEL, CAT, DOG = "stabilityai/stable-diffusion-xl-base-1.0", "somebody/cat-lora", "somebody/pets"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The playground's model and two of its LoRAs under names of the hub."""
    cat, dog = (playground_lora(name).read_bytes() for name in ("cat", "dog"))
    found = {
        MODEL: Repository.of(playground_model()),
        CAT: Repository({"cat.safetensors": cat}),
        DOG: Repository({"cat.safetensors": cat, "dog.safetensors": dog}),
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
    assert f"sdxl: {MODEL}, " in told
    assert "licence: openrail++" in told
    assert f"licence: see {hub.endpoint}/{CAT}" in told
    assert not hub.served
    one = next(one for one in wanted(read_published(tmp_path / "suite.yaml")) if one.name == "dog")
    assert one.size == one.missing == len(hub.repositories[DOG].files["dog.safetensors"])


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
