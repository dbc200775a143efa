"""What can be judged without a model is judged before it is opened."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from all_transformers import EVERY
from commands import call, flat
from local_hub import LocalHub, Repository, connect, serving
from lora_compose.attention import backbone_of
from lora_compose.compose.files.images import Machine, Record, save_image
from lora_compose.compose.generate.early import check_early
from lora_compose.compose.generate.model_facts import ModelFacts
from lora_compose.compose.playground.assets import playground_lora
from lora_compose.pipelines.calls.memory import least_bytes
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.families.anima import ComposeAnimaPipeline
from lora_compose.pipelines.families.unets import UNetPipeline
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from pairs import slow_but
from small_world import SIZE

CAT = ("--lora", "playground:cat")
SILENT = ("--lora", "mute.safetensors")  # whose header names no words
BOTH = (*CAT, *SILENT, "--prompt", "a sks cat and a dog")
PLAYGROUND_LORAS = str(playground_lora("cat").parent)


@pytest.fixture(autouse=True)
def _opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComposePipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was opened"))


def in_both(*typed: Any) -> None:
    """Types a command as `run` and as `check`; both have to say the last argument."""
    *options, message = typed
    for command in ("run", "check"):
        assert message in flat(call(command, *options, code=2).output)


def recorded(path: Path, model: str = "playground", **fields: Any) -> Path:
    """An image that was made by such a run, as far as its record says."""
    scene = Scene(**{"prompt": "a sks cat", "concepts": [Concept(name="cat", lora="playground:cat")], **fields})
    run = Run(scene=scene, model=model, method="merge" if scene.concepts else None)
    machine = Machine(device="cpu", name="A fast one", threads=1)
    record = Record(run=run, versions={}, sha256={}, machine=machine)
    return save_image(Image.new("RGB", (SIZE, SIZE)), path, record)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*CAT, "--prompt", "a cat"), "the trigger 'sks' of concept 'cat' is not in the prompt 'a cat'"),
        ((*CAT, "--prompt", "a sks cat", "--box", "0,0,64,1280"), f"leaves the canvas of {SIZE} x {SIZE} pixels"),
        ((*CAT, "--prompt", "a sks cat", "--set", "length=1"), "--set length: "),
        ((*CAT, "--prompt", "a sks cat", "--method", "draft", "--set", "lenght=1"), "did you mean 'length'?"),
        (("--lora", "cut.safetensors", "--prompt", "a"), "cut.safetensors is not a readable safetensors file"),
        (("--lora", "it.gguf", "--prompt", "a"), "it.gguf is GGUF, the format of quantised models"),
        (("--lora", "it.pt", "--prompt", "a"), "it.pt is a pickle"),
        (("--loras", "empty", "--prompt", "a"), "'empty' has no safetensors files"),
        (("--loras", PLAYGROUND_LORAS, "--prompt", "a pink sky"), "the prompt names no concept; there are bear"),
        ((*SILENT, "--prompt", "a mute dog", "--method", "tara"), "tara needs to know the words of concept 'mute'"),
        ((*BOTH, "--method", "draft"), "draft looks for class words: mute"),
        ((*BOTH, "--method", "freefuse"), "has none of mute: mute has no trigger"),
        ((*BOTH, "--method", "clora"), "'mute' has to be named in the branches"),
        ((*CAT, "--prompt", "a sks cat", "--method", "regional"), "regional needs to know where the concepts are"),
        ((*SILENT, "--prompt", "a", "--method", "lora-composer"), "lora-composer needs to know where"),
        (
            (*SILENT, "--box", "0,0,64,64", "--prompt", "a", "--method", "lora-composer"),
            "does not name the concept 'mute'",
        ),
        (("--prompt", "a cat", "--method", "tara"), "the method tara needs concepts, and the scene has none"),
        ((*CAT, "--prompt", "a sks cat", "--reference", "me.png"), "reference images are read by"),
        ((*CAT, "--prompt", "a sks cat", "--image", "gone.png"), "there is no image 'gone.png'"),
        ((*CAT, "--prompt", "a sks cat", "--image", "grey.png", "--mask-image", "no.png"), "there is no mask 'no.png'"),
        (("--concept", "path=playground:cat,region=no.png", "--prompt", "a sks cat"), "there is no mask 'no.png'"),
        (("--prompt", "a cat", "--control", "model=gone,image=grey.png"), "there is no control model 'gone'"),
        (("--prompt", "a cat", "--width", "1000000", "--height", "1000000"), "1000000 pixels cannot be made: one pass"),
        (("--prompt", "a cat", "--width", "130"), "must be multiples of 8 with Stable Diffusion 1.x and 2.x, not 130"),
    ],
)
def test_a_run_that_cannot_be_made_is_refused_before_its_model_is_opened(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.safetensors").write_bytes(playground_lora("cat").read_bytes()[:500])
    for name in ("it.gguf", "it.pt"):
        Path(name).write_bytes(b"GGUF")
    Path("empty").mkdir()
    Image.new("RGB", (64, 64)).save("grey.png")
    save_file(load_file(playground_lora("dog")), "mute.safetensors")
    in_both("playground", *options, "--out", "out", message.removeprefix("--set length: "))


@pytest.mark.parametrize("method", ["clora", "lora-composer"])
def test_a_method_that_the_model_cannot_run_is_refused_before_it_is_opened(method: str, tmp_path: Path) -> None:
    box = ("--box", "0,0,0.5,1.0") if method == "lora-composer" else ()
    options = ("--prompt", "a sks cat", "--lora", "playground-flux:cat", *box, "--method", method, "--out", tmp_path)
    in_both("playground-flux", *options, f"{method} needs cross-attention")


@pytest.mark.parametrize("family", slow_but(("anima", "flux", "flux2", "flux3", "z-image", "qwen-image-edit"), EVERY))
def test_what_a_size_needs_is_known_without_the_model(family: str) -> None:
    pipe = EVERY[family].pipeline()
    configs = {"vae": dict(pipe.vae.config), "transformer": {"_class_name": "-", **pipe.transformer.config}}
    known = ModelFacts(type(pipe), parts=configs)
    assert (known.latent_cell, known.own_size) == (pipe.vae_scale_factor, pipe.own_size)
    whole: Any = known.denoiser("float32")
    half: Any = known.denoiser("bfloat16")
    needed = [least_bytes(backbone_of(model), (64, 32)) for model in (pipe.transformer, whole, half)]
    assert needed[0] == needed[1] == 2 * needed[2]


def test_an_output_folder_that_is_a_file_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    image = recorded(tmp_path / "0.png")
    for command in (
        ["run", "playground", "--prompt", "a cat", "--out", tmp_path / "taken/out"],
        ["replay", image, "--out", tmp_path / "taken/1.png"],
        ["refine", image, "--out", tmp_path / "taken/1.png"],
    ):
        assert f"Not a directory: '{tmp_path / 'taken'}'" in flat(call(*command, code=1).output)
    checked = call("check", "playground", "--prompt", "a cat", "--out", tmp_path / "taken", code=2).output
    assert f"problem: [Errno 20] Not a directory: '{tmp_path / 'taken'}'" in flat(checked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "taken"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a cat"}, "the trigger 'sks' of concept 'cat' is not in the prompt 'a cat'"),
        ({"image": "gone.png"}, "gone.png'; expected a PNG"),
        ({"concepts": [Concept(name="cat", lora="cut.safetensors")]}, "cut.safetensors is not a readable safetensors"),
        ({"width": 10**6, "height": 10**6}, "1000000 x 1000000 pixels cannot be made"),
    ],
)
def test_a_record_that_cannot_be_run_is_refused_before_its_model_is_opened(
    fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.safetensors").write_bytes(playground_lora("cat").read_bytes()[:500])
    image = recorded(tmp_path / "0.png", **fields)
    for command in ("replay", "refine"):
        assert message in flat(call(command, image, code=2).output)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, ("--method", "tarra"), "unknown method 'tarra'"),
        ({}, ("--method", "lora-composer"), "lora-composer needs to know where the concepts are"),
        ({"model": "playground-flux"}, ("--method", "clora"), "clora needs cross-attention"),
        ({"prompt": "a cat", "concepts": []}, (), "this image has no subjects with a LoRA"),
        ({"concepts": [Concept(name="cat", lora="playground:cat", region="gone.png")]}, (), "there is no mask"),
    ],
)
def test_what_cannot_be_repainted_is_refused_before_the_model_is_opened(
    fields: dict[str, Any], options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert message in flat(call("refine", recorded(tmp_path / "0.png", **fields), *options, code=2).output)


def test_a_check_without_the_model_says_all_that_it_knows(tmp_path: Path) -> None:
    options = ("--prompt", "a cat", *CAT, "--lora", "playground:dog", "--method", "blend", "--out", tmp_path)
    checked = flat(call("check", "playground", *options, code=2).output)
    for text in (
        "note: the model was not opened", "cat: file playground:cat, SHA-256", "unknown method 'blend'",
        "'sks' of concept 'cat'", "'zwx' of concept 'dog'",
    ):  # fmt: skip
        assert text in checked


@pytest.mark.parametrize("family", ComposePipeline.families)
def test_what_a_family_reads_by_region_is_known_without_its_model(family: Any) -> None:
    known = ModelFacts(family).reads_regions
    assert known == issubclass(family, UNetPipeline | ComposeAnimaPipeline)


def test_words_of_a_lora_on_the_hub_are_read_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository({"dog.safetensors": playground_lora("dog").read_bytes()})
    with serving(LocalHub({"user/dog": repository})) as hub:
        connect(hub, tmp_path / "cache", monkeypatch)
        options = ("--prompt", "a dog", "--out", tmp_path / "out")
        refused = call("run", "playground", "--lora", "user/dog", *options, code=2).output
        assert "the trigger 'zwx' of concept 'dog' is not in the prompt 'a dog'" in refused
        gone = call("run", "playground", "--lora", "user/cat", *options, code=2).output
        assert "the model hub has no repository 'user/cat'" in gone


def test_scenes_of_a_batch_that_cannot_be_made_are_told_before_the_model_is_opened(tmp_path: Path) -> None:
    for name, prompt in (("one", "a cat"), ("two", "a sks cat")):
        scene = {"prompt": prompt, "concepts": [{"name": "cat", "lora": "playground:cat"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(scene))
    options = ("--model", "playground", "--device", "cpu", "--method", "regional", "--out", tmp_path / "out")
    told = call("batch", tmp_path / "one.json", tmp_path / "two.json", *options, code=1).output
    assert "the trigger 'sks' of concept 'cat' is not in the prompt 'a cat'" in told
    assert "regional needs to know where the concepts are" in told
    listed = [json.loads(line) for line in (tmp_path / "out/images.jsonl").read_text().splitlines()]
    assert [(line["name"], line["seed"], line["image"]) for line in listed] == [("one", 0, None), ("two", 0, None)]


def test_a_run_that_can_be_made_passes() -> None:
    concepts = (
        Concept(name="cat", lora="playground:cat", region=(0, 0, 64, 128)),
        Concept(name="ink", lora="playground:ink", role="style"),
        Concept(name="dog", lora="playground:dog", prompt="a zwx dog", region=(0.5, 0.0, 1.0, 1.0)),
    )
    check_early(Run(scene=Scene(prompt="a (sks:1.2) cat, wfy style", concepts=concepts), model="playground"))


def test_commands_that_read_evaluations_name_the_packages_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sys.modules["lora_compose.compose.support.packages"].importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "scipy" else found(name, *rest))
    for command in (
        ["blind", "from", tmp_path, "--method", "merge"],
        ["evaluate", "failures", tmp_path, "--method", "a"],
    ):
        told = call(*command, code=2).output
        assert re.search(r"needs scipy: pip install 'lora-compose\[evaluation\]'", told)
