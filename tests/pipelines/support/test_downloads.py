"""What is downloaded from a model hub: once, whole, and with advice where it cannot be."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import save_file

from commands import call, flat
from components import lora_tensors, random_lora, tiny_pipeline
from local_hub import TOKEN, LocalHub, Repository, connect, serving
from lora_compose import ComposePipeline, LoraError
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.support.hub import HubError

MODEL, LORA = "runwayml/stable-diffusion-v1-5", "somebody/cat-lora"
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # diffusers gives it
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and a LoRA for it."""
    folder = tmp_path_factory.mktemp("hub")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "model")
    (folder / "lora").mkdir()
    tensors = dict(lora_tensors(unet=random_lora(pipe.unet, 1)))
    save_file(tensors, folder / "lora" / "cat.safetensors", {"trigger": "sks", "class_word": "cat"})
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with the two under real names, and an empty cache."""
    found = {MODEL: Repository.of(folder / "model"), LORA: Repository.of(folder / "lora")}
    with serving(LocalHub(found)) as hub:
        connect(hub, tmp_path / "cache", monkeypatch)
        yield hub


def lora_of(hub: LocalHub) -> bytes:
    return hub.repositories[LORA].files["cat.safetensors"]


def test_a_lora_and_a_model_of_the_hub_compose_and_are_downloaded_once(hub: LocalHub, folder: Path) -> None:
    pipe: Any = ComposePipeline.from_pretrained(MODEL)
    pipe.add_concepts([{"name": "cat", "lora": LORA}])
    assert (pipe.concepts["cat"].trigger, pipe.concepts["cat"].class_word) == ("sks", "cat")
    call_ = {"num_inference_steps": 1, "width": 64, "height": 64, "output_type": "latent"}
    found = pipe("a sks cat", concepts=["cat"], generator=torch.Generator().manual_seed(0), **call_).images
    local: Any = ComposePipeline.from_pretrained(folder / "model")
    local.load_concept(folder / "lora" / "cat.safetensors")
    expected = local("a sks cat", concepts=["cat"], generator=torch.Generator().manual_seed(0), **call_).images
    assert torch.equal(found, expected)
    ComposePipeline.from_pretrained(MODEL)
    find_file(LORA)
    weights = [UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    for name in weights:
        assert hub.bytes_of(f"{MODEL}/{name}") == len(hub.repositories[MODEL].files[name])
    assert hub.bytes_of("cat.safetensors") == len(lora_of(hub))


def test_facts_of_a_model_need_its_configurations_alone(hub: LocalHub) -> None:
    assert facts_of(MODEL).family.family == ComposePipeline.from_pretrained(MODEL).family
    assert facts_of(MODEL).own_size == ComposePipeline.from_pretrained(MODEL).own_size
    first_weights = next(i for i, one in enumerate(hub.served) if one.path.endswith(".safetensors"))
    assert first_weights > 3


def test_downloads_show_how_far_they_are(hub: LocalHub, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the client's switch for bars where there is no terminal
    enable_progress_bars()
    try:
        find_file(LORA)
    finally:
        disable_progress_bars()
    assert "cat.safetensors: 100%" in capfd.readouterr().err


def test_a_download_goes_on_where_its_connection_broke(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    size = len(lora_of(hub))
    hub.breaks["cat.safetensors"] = [8192, 4096]
    assert find_file(LORA).read_bytes() == lora_of(hub)
    assert [(one.status, one.bytes) for one in hub.served] == [(200, 8192), (206, 4096), (206, size - 8192 - 4096)]


def test_after_a_broken_download_complete_files_are_not_downloaded_again(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.breaks[UNET] = [0] * 6
    advice = (
        r"connection to the model hub broke while 'runwayml/.*' was downloaded .*try again; files that are complete"
    )
    with pytest.raises(HubError, match=advice):
        ComposePipeline.from_pretrained(MODEL)
    assert hub.bytes_of(UNET) == 0
    hub.breaks.clear()
    ComposePipeline.from_pretrained(MODEL)
    for name, data in hub.repositories[MODEL].files.items():
        assert hub.bytes_of(f"{MODEL}/{name}") == len(data), name


@pytest.mark.parametrize("kind", ["a concept", "a model"])
def test_other_bytes_than_the_hubs_are_refused_and_removed(hub: LocalHub, kind: str) -> None:
    open_it: Any = find_file if kind == "a concept" else ComposePipeline.from_pretrained
    repository, file = (LORA, "cat.safetensors") if kind == "a concept" else (MODEL, UNET)
    hub.changed.add(file)
    with pytest.raises(
        OSError if kind == "a model" else LoraError, match=r"other bytes than the model hub .*try again"
    ):
        open_it(repository)
    hub.changed.clear()
    open_it(repository)
    size = len(hub.repositories[repository].files[file])
    assert hub.bytes_of(file) == 2 * size
    open_it(repository)
    assert hub.bytes_of(file) == 2 * size


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({}, r"{name}' is gated: accept its conditions on http://.*/{name}, and log in with `hf auth login`"),
    "missing": ({}, r"has no repository '{name}', or it is private: check the name, or log in"),
    "revision": ({"revision": "v9"}, r"'{name}' has no revision 'v9': see its branches and tags on http://.*/{name}"),
    "file": ({}, r"'{name}' lacks a file .*: see its files on http://.*/{name}"),
}


@pytest.mark.parametrize(("name", "case"), [(LORA, "gated"), *((MODEL, case) for case in REFUSED)])
def test_what_the_hub_does_not_give_is_an_error_that_says_what_to_do(hub: LocalHub, name: str, case: str) -> None:
    """What else it says of a LoRA is in `test_download_messages.py`."""
    options, message = REFUSED[case]
    if case == "gated":
        hub.repositories[name].gated = True
    elif case == "missing":
        del hub.repositories[name]
    elif case == "file":
        del hub.repositories[name].files[UNET]
    open_it: Any = find_file if name == LORA else ComposePipeline.from_pretrained
    with pytest.raises(LoraError if name == LORA else HubError, match=message.format(name=name)):
        open_it(name, **options)
    if case == "gated":
        open_it(name, token=TOKEN)
        assert not any(token for _, path, token in hub.requests if path.startswith("storage/")), "another host got it"


def test_the_command_says_it_as_well(hub: LocalHub) -> None:
    hub.repositories[MODEL].gated = True
    told = flat(call("run", MODEL, "--prompt", "a cat", "--steps", 1, code=2).output)
    assert f"the repository '{MODEL}' is gated: accept its conditions on" in told


def test_offline_the_cache_is_read_and_what_it_lacks_is_named(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_file(LORA)
    ComposePipeline.from_pretrained(MODEL)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_file(LORA, "cat.safetensors") == path
    assert find_file(LORA) == path
    ComposePipeline.from_pretrained(MODEL)
    for open_it in (find_file, ComposePipeline.from_pretrained):
        with pytest.raises(
            HubError if open_it is not find_file else LoraError,
            match=r"cache has not all files of 'who/x'.*without HF_HUB_OFFLINE",
        ):
            open_it("who/x")
    assert len(hub.requests) == asked


def test_a_repository_of_several_files_needs_a_name(hub: LocalHub) -> None:
    files = hub.repositories[LORA].files
    files |= {"dog.safetensors": lora_of(hub), "README.md": b"two of them", "old.bin": b"none"}
    with pytest.raises(
        LoraError, match=r"has 2 safetensors files; name one of them, .* or by weight_name: cat\S+, dog"
    ):
        find_file(LORA)
    assert find_file(LORA, "dog.safetensors", revision=hub.repositories[LORA].commit).name == "dog.safetensors"


def test_the_configuration_of_a_peft_file_comes_with_it(hub: LocalHub) -> None:
    files = {"unet/adapter_model.safetensors": lora_of(hub), "unet/adapter_config.json": b"{}"}
    hub.repositories["somebody/peft"] = Repository(files)
    assert find_file("somebody/peft").with_name("adapter_config.json").read_bytes() == b"{}"


@pytest.mark.slow
def test_the_program_uses_the_hub_that_hf_endpoint_names_and_shows_its_downloads(hub: LocalHub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment["TQDM_POSITION"] = "-1"  # bars also where there is no terminal
    typed = [
        "run",
        MODEL,
        "--prompt",
        "a sks cat",
        "--concept",
        f"path={LORA}",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    told = subprocess.run(
        [sys.executable, "-m", "lora_compose", *typed], env=environment, capture_output=True, text=True, check=True
    )
    assert "cat.safetensors: 100%" in told.stderr
    assert "files: 100%" in told.stderr.partition(f"opening {MODEL}")[2]  # the model's own
    assert list((tmp_path / "out").glob("*.png"))
