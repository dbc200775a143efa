"""The command line on the playground, with few steps."""

import inspect
import json
import os
import pickle
import re
import runpy
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from commands import call, flat
from components import tiny_pipeline
from flux import flux_pipeline
from flux3 import default_flux3
from lora_compose import Concept, Run, Scene, Tara, __version__
from lora_compose.compose.check import report
from lora_compose.compose.commands.asked import parse_concept, parse_settings
from lora_compose.compose.commands.check import check as check_command
from lora_compose.compose.commands.run import run as run_command
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.generate import demo, images
from lora_compose.compose.generate.machine import choose_device, devices
from lora_compose.compose.generate.making import make, make_batch
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.replay import difference
from lora_compose.compose.generate.schedulers import scheduler_names, scheduler_of
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines.families import ComposeFlux3DistilledPipeline
from lora_compose.pipelines.support.regular import sha256_of
from pairs import slow_but
from small_world import SCHEDULER, SIZE, STYLE, STYLE_WORDS, metadata
from transformer_families import as_file, random_lora_of_all

PROMPT = "a xlo bear and a qrt robot on grass"
BEAR = "path=playground:bear-tara,trigger=xlo,class=bear"
ROBOT = "path=playground:robot-tara,trigger=qrt,class=robot"
PAIR = ["--prompt", PROMPT, "--concept", BEAR, "--concept", ROBOT]
SCENES = Path(__file__).resolve().parents[2] / "assets/scenes"
SMALL = "--steps", "1", "--width", "64", "--height", "64"
pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")

# Every way of making an image that the command line has: what differs from a run that is `SMALL`.
WAYS = {
    "chosen": [*PAIR],
    "tara": [*PAIR, "--method", "tara", "--set", "cfg_mask=broadcast", "--seed", "7"],
    "authors": [*PAIR, "--method", "clora:official", "--set", "refinements=1"],
    "regional": [
        "--prompt", PROMPT, "--concept", f"{BEAR},region=0:0:32:64", "--concept",
        f"{ROBOT},region=32:0:64:64,weight=0.7", "--method", "regional", "--set", "token_mask=none",
    ],
    "beside an ordinary robot": [
        "--prompt", "a xlo bear and a robot on grass", "--concept", BEAR, "--concept", "role=bystander,class=robot",
    ],
    "plain": ["--prompt", "a red cat on grass"],
    "ancestral": [
        *PAIR, "--method", "merge", "--scheduler", "EulerAncestralDiscreteScheduler", "--steps", "2", "--seed",
        str(2**63 - 1), "--negative-prompt", "a tree", "--dtype", "bfloat16",
    ],
}  # fmt: skip


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Saved(dict[str, Path]):
    """By way, the image that was made so, once somebody asks for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        call("run", "playground", *SMALL, "--out", self.folder / name, *WAYS[name])
        (self[name],) = (self.folder / name).glob("*.png")
        return self[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Saved(tmp_path_factory.mktemp("images"))


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """An image whose LoRA is a file in `tmp_path/loras`."""
    (tmp_path / "loras").mkdir()
    lora = shutil.copy(playground_lora("bear"), tmp_path / "loras/my,bear.safetensors")
    arguments = ["--prompt", "a xlo bear", "--concept", f"path={lora},trigger=xlo,class=bear", *SMALL]
    call("run", "playground", *arguments, "--out", tmp_path)
    return tmp_path / "0.png"


def edited(path: Path, to: Path, change: Callable[[dict], None]) -> Path:
    """The same image with another record."""
    with Image.open(path) as image:
        data = json.loads(image.info["lora-compose"])
        change(data)
        info = PngInfo()
        info.add_text("lora-compose", json.dumps(data))
        image.save(to, pnginfo=info)
    return to


# --- run ---


def test_a_run_says_where_the_images_are_and_why_the_method(tmp_path: Path) -> None:
    asked = [*PAIR, *SMALL, "--seed", 3, "--seed", 4, "--seed", 3]
    result = call("run", "playground", *asked, "--out", tmp_path)
    assert result.stdout.split("\n") == [str(tmp_path / name) for name in ("3.png", "4.png", "sheet.png")] + [""]
    assert "method: draft, because" in result.stderr
    assert listed(tmp_path) == ["3.png", "4.png", "sheet.png"]
    reasons = {read_record(tmp_path / name).method_reason for name in ("3.png", "4.png")}
    assert reasons == {"the prompt names every concept by trigger and class word"}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 256


def test_images_of_earlier_runs_stay(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"precious")
    call("run", "playground", "--steps", 1, "--width", 64, "--prompt", "a cat", "--out", tmp_path)
    assert listed(tmp_path) == ["0-2.png", "0.png"]
    assert (tmp_path / "0.png").read_bytes() == b"precious"
    assert read_pixels(tmp_path / "0-2.png").size == (64, SIZE), "one side of the size can be given alone"


def test_the_record_says_what_was_used(saved: dict[str, Path]) -> None:
    record = read_record(saved["regional"])
    assert (record.run.method, record.run.settings) == ("regional", {"token_mask": "none"})
    assert (record.run.scheduler, record.run.device, record.run.steps) == (SCHEDULER, devices()[0], 1)
    assert record.run.scene.concepts[1].region == (32, 0, 64, 64)
    assert record.run.scene.concepts[1].weight == 0.7
    assert record.run.scene.concepts[1].lora == "playground:robot-tara"
    assert record.versions.keys() == {"lora-compose", "python", "torch", "diffusers", "transformers"}
    assert record.versions["torch"] == version("torch")
    assert all(re.fullmatch("[0-9a-f]{64}", str(sha)) for sha in record.sha256.values())
    assert record.sha256.keys() == {"bear-tara", "robot-tara"}
    assert record.machine.threads == torch.get_num_threads()
    assert read_record(saved["chosen"]).run.method == "draft"
    authors = read_record(saved["authors"]).run
    assert authors.method == "clora"
    assert (authors.settings["fuse"], authors.settings["refinements"]) == ("branches", 1)
    assert read_record(saved["plain"]).run.method is None
    assert read_pixels(saved["ancestral"]).size == (64, 64)


def test_options_win_over_the_scene_file(tmp_path: Path) -> None:
    asked = ["--prompt", "a zwx dog and a sks cat in snow", "--method", "merge", "--out", tmp_path]
    call("run", "playground", "--scene", SCENES / "cat-dog.yaml", *SMALL, *asked)
    scene = read_record(tmp_path / "0.png").run.scene
    assert scene.prompt == "a zwx dog and a sks cat in snow"
    assert [concept.name for concept in scene.concepts] == ["cat", "dog"]


def test_a_seed_gives_what_the_pipeline_gives(playground: Any, saved: dict[str, Path]) -> None:
    playground.load_concept(playground_lora("bear-tara"), name="bear-tara")
    playground.load_concept(playground_lora("robot-tara"), name="robot-tara")
    image = playground(
        PROMPT, concepts=["bear-tara", "robot-tara"], method=Tara(cfg_mask="broadcast"), num_inference_steps=1,
        guidance_scale=5.0, width=64, height=64, generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert difference(image, read_pixels(saved["tara"])) is None


def test_text_is_shown_and_kept_as_it_is(tmp_path: Path) -> None:
    prompt = "a xlo bear [red]:smile:[/] [/nope] \x1b[31m"
    concept = f"{BEAR},name=[bold]b\x1b[2J"
    call("run", "playground", *SMALL, "--prompt", prompt, "--concept", concept, "--out", tmp_path / "[a] :cat:")
    record = read_record(tmp_path / "[a] :cat:" / "0.png")
    assert record.run.scene.prompt == prompt
    assert record.run.scene.concepts[0].name == "[bold]b\x1b[2J"
    result = call("replay", tmp_path / "[a] :cat:" / "0.png")
    assert "a xlo bear [red]:smile:[/] [/nope] \\x1b[31m" in result.output
    assert "\x1b[31m" not in result.output


def test_names_lead_to_no_files(tmp_path: Path) -> None:
    concepts = ["--concept", f"{BEAR},name=../../evil", "--concept", f"{ROBOT},name=/evil", "--method", "merge"]
    call("run", "playground", *SMALL, "--prompt", PROMPT, *concepts, "--out", tmp_path / "o/p")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["o", "o/p", "o/p/0.png"]


MISTAKES = {
    "no prompt": (["playground"], "give --prompt TEXT or --scene FILE"),
    "no model": (
        ["nowhere", "--prompt", "a"],
        "there is no model 'nowhere'; expected playground, playground-flux, a folder",
    ),
    "no hub": (["someone/nothing-here", "--prompt", "a"], "the model 'someone/nothing-here' cannot be opened"),
    "unknown method": (["playground", *PAIR, "--method", "blend"], "unknown method 'blend'; there are merge, tara"),
    "unknown setting": (
        ["playground", *PAIR, "--method", "tara", "--set", "cfg=1"],
        "tara has no settings ['cfg']; it has cfg_mask",
    ),
    "settings alone": (
        ["playground", *PAIR, "--set", "cfg_mask=broadcast"],
        "--set cfg_mask: a setting needs --method",
    ),
    "no equals": (
        ["playground", *PAIR, "--method", "tara", "--set", "cfg_mask"],
        "--set cfg_mask: expected NAME=VALUE",
    ),
    "method alone": (["playground", "--prompt", "a", "--method", "tara"], "the method tara needs concepts"),
    "scheduler": (
        ["playground", "--prompt", "a", "--scheduler", "EulerScheduler"],
        "unknown scheduler 'EulerScheduler'; did you mean one of",
    ),
    "scheduler in short": (["playground", "--prompt", "a", "--scheduler", "Euler"], "EulerDiscreteScheduler"),
    "a LoRA as the model": ([str(playground_lora("cat")), "--prompt", "a"], "it is a LoRA; name the model that it was"),
    "dtype": (["playground", "--prompt", "a", "--dtype", "fp16"], "dtype: expected text that should match pattern"),
    "device": (["playground", "--prompt", "a", "--device", "toaster"], "unknown device 'toaster'; expected cpu, cuda"),
    "no device": (
        ["playground", "--prompt", "a", "--device", "cuda:77"],
        "this machine has no device 'cuda:77'; it has",
    ),
    "no size": (["playground", "--prompt", "a", "--width", "0"], "width: expected greater than 0"),
    "no lora": (
        ["playground", "--prompt", "a", "--concept", "path=[b]x.safetensors"],
        "there is no file '[b]x.safetensors'",
    ),
    "no playground lora": (
        ["playground", "--prompt", "a", "--concept", "path=playground:../cat"],
        "has no LoRA '../cat'; it has: bear",
    ),
    "both": (
        ["playground", "--scene", SCENES / "cat-dog.yaml", "--concept", BEAR],
        "in the scene file or with --lora and --concept, not both",
    ),
    "no scene": (["playground", "--scene", "none.yaml"], "there is no file 'none.yaml'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(tmp_path: Path, name: str) -> None:
    arguments, message = MISTAKES[name]
    result = call("run", *arguments, "--steps", 1, "--out", tmp_path / "out", code=2)
    assert message in flat(result.stderr)
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "fields are path, name, trigger, class, weight, region"),
        ("cat.safetensors", "unknown field 'cat.safetensors'"),
        ("path=a.safetensors,wieght=2", "unknown field 'wieght'"),
        ("trigger=sks", "path is missing"),
        ("path=", "path is missing"),
        ("role=bystander", "class is missing"),
        ("role=bystander,path=a.safetensors,name=a", "is a bystander, which has no LoRA"),
        ("path=a.safetensors,weight=1,weight=2", "weight is given twice"),
        ("path=a.safetensors,weight=much", "weight: expected a valid number"),
        ("path=a.safetensors,weight=inf", "weight: expected a finite number"),
        (
            "path=a.safetensors,region=1:2:3",
            "region 1:2:3: expected left,top,right,bottom in pixels (0,16,60,112), as fractions",
        ),
        ("path=a.safetensors,region=9:0:3:4", "left has to be less than right"),
        ("path=a.safetensors,region=0,0,0.5,64", "with a point, a box is in fractions of the image"),
    ],
)
def test_concepts_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--concept") as caught:
        parse_concept(text)
    assert message in str(caught.value)


def test_concepts_as_they_are_written() -> None:
    concept = parse_concept("path=loras/a,b.safetensors, trigger=<s1> <s2>,class=big cat,weight=-0.5,region=0:8:64:128")
    assert concept == Concept(
        name="a,b", lora="loras/a,b.safetensors", trigger="<s1> <s2>", class_word="big cat", weight=-0.5,
        region=(0, 8, 64, 128),
    )  # fmt: skip
    assert parse_concept("path=playground:cat-tara").name == "cat-tara"
    assert parse_concept("path=user/my-cat,name=cat") == Concept(name="cat", lora="user/my-cat")


def test_settings_as_they_are_written() -> None:
    assert parse_settings(["a=1", "b = two", "c=x=y", "d=false"]) == {"a": 1, "b": "two", "c": "x=y", "d": False}
    with pytest.raises(ValueError, match="a is given twice"):
        parse_settings(["a=1", "a=2"])


def test_failures_that_are_nobodys_mistake_end_with_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("run", "playground", "--steps", 1, "--prompt", "a", "--out", tmp_path / "file", code=1)
    assert "failed: " in result.stderr


def test_a_full_memory_is_answered_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        error = torch.OutOfMemoryError("tried to allocate 40 GiB\nmore")
        error.add_note("some advice")
        raise error

    monkeypatch.setattr(images, "make_batch", full)
    result = call("run", "playground", "--prompt", "a", "--out", tmp_path, code=1)
    assert "out of memory: tried to allocate 40 GiB\nsome advice\nuse a smaller --width" in result.stderr


def test_what_was_made_before_an_interrupt_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(pipe: Any, run: Run, *rest: Any, **options: Any) -> Any:
        if run.seed == 2:
            raise KeyboardInterrupt
        return make_batch(pipe, run, *rest, **options)

    monkeypatch.setattr(images, "make_batch", once)
    seeds = ["--seed", "1", "--seed", "2"]
    call("run", "playground", *SMALL, "--prompt", "a", *seeds, "--out", tmp_path, code=130)
    assert listed(tmp_path) == ["1.png"]
    assert read_record(tmp_path / "1.png").run.seed == 1


# --- replay ---


@pytest.mark.parametrize("name", slow_but(WAYS.keys() - {"chosen", "tara"}, WAYS))
def test_replay_is_identical_and_writes_nothing(
    saved: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = saved[name]
    monkeypatch.chdir(tmp_path)
    result = call("replay", image)
    assert result.stdout.splitlines()[-1] == "identical: every pixel is the same"
    assert "changed" not in result.output
    assert listed(tmp_path) == []


def test_replay_can_write_the_new_image_beside_one_that_is_there(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "again.png").write_bytes(b"precious")
    call("replay", saved["plain"], "--out", tmp_path / "again.png")
    assert read_record(tmp_path / "again-2.png") == read_record(saved["plain"])
    assert (tmp_path / "again.png").read_bytes() == b"precious"


def test_replay_says_how_different_an_edited_image_is(saved: dict[str, Path], tmp_path: Path) -> None:
    with Image.open(saved["plain"]) as image:
        info = PngInfo()
        info.add_text("lora-compose", image.info["lora-compose"])
        image.paste("red", (0, 0, 2, 3))
        image.save(tmp_path / "edited.png", pnginfo=info)
        image.resize((32, 32)).save(tmp_path / "small.png", pnginfo=info)
    assert (
        f"different: 6 pixels differ ({600 / (64 * 64):.3g} %), by at most"
        in call("replay", tmp_path / "edited.png", code=1).output
    )
    assert "the sizes differ: 32 x 32 and 64 x 64" in call("replay", tmp_path / "small.png", code=1).output


def test_loras_that_have_moved_are_found_by_content_and_preferred_to_others_in_their_place(
    moved: Path, tmp_path: Path
) -> None:
    sha = read_record(moved).sha256["my,bear"]
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "loras/my,bear.safetensors").rename(tmp_path / "elsewhere/deep/other name.safetensors")
    result = call("replay", moved, code=2)
    assert f"loras/my,bear.safetensors, SHA-256 {sha}" in result.stderr
    assert "--loras FOLDER" in result.stderr
    assert "identical" in call("replay", moved, "--loras", tmp_path / "elsewhere").output
    (tmp_path / "empty").mkdir()
    assert f"nor below {tmp_path / 'empty'}" in call("replay", moved, "--loras", tmp_path / "empty", code=2).stderr
    for command in ("replay", "refine"):
        assert "there is no folder" in call(command, moved, "--loras", tmp_path / "none", code=2).stderr
    shutil.copy(playground_lora("robot"), tmp_path / "loras/my,bear.safetensors")
    result = call("replay", moved, code=1)
    assert "changed: LoRA of my,bear: was " in result.output
    assert "different: " in result.output
    assert "identical" in call("replay", moved, "--loras", tmp_path / "elsewhere").output


def test_a_concept_of_several_files_is_recorded_and_made_again_from_them(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    for name in ("bear", STYLE):
        shutil.copy(playground_lora(name), tmp_path / "loras")
    concept = f"path={tmp_path}/loras/bear.safetensors,path={tmp_path}/loras/{STYLE}.safetensors:0.7,merge=np"
    prompt = f"a xlo bear in {STYLE_WORDS}"
    call("run", "playground", *SMALL, "--prompt", prompt, "--concept", concept, "--out", tmp_path)
    record = read_record(tmp_path / "0.png")
    (found,) = record.run.scene.concepts
    assert (found.name, found.merge) == (f"bear+{STYLE}", "np")
    hashes = tuple(sha256_of(playground_lora(name)) for name in ("bear", STYLE))
    assert record.sha256 == {f"bear+{STYLE}": hashes}
    (tmp_path / "loras").rename(tmp_path / "moved")
    (tmp_path / "moved/bear.safetensors").rename(tmp_path / "moved/other.safetensors")
    missing = call("replay", tmp_path / "0.png", code=2).stderr
    assert f"loras/bear.safetensors, SHA-256 {hashes[0]}" in missing
    assert f"loras/{STYLE}.safetensors, SHA-256 {hashes[1]}" in missing
    assert "identical" in call("replay", tmp_path / "0.png", "--loras", tmp_path / "moved").output


def test_all_missing_loras_are_listed(saved: dict[str, Path], tmp_path: Path) -> None:
    def move(data: dict) -> None:
        for concept in data["run"]["scene"]["concepts"]:
            concept["lora"] = f"gone/{concept['name']}.safetensors"

    result = call("replay", edited(saved["tara"], tmp_path / "1.png", move), code=2)
    assert "bear-tara.safetensors" in result.stderr
    assert "robot-tara.safetensors" in result.stderr


def test_other_versions_and_machines_are_told(saved: dict[str, Path], tmp_path: Path) -> None:
    def age(data: dict) -> None:
        data["versions"]["torch"] = "1.0"
        data["machine"] = {"device": "cuda:6", "name": "A fast one", "threads": 4096}
        data["run"]["device"] = "cuda:6"

    result = call("replay", edited(saved["plain"], tmp_path / "1.png", age))
    assert f"changed: torch: was 1.0, is {torch.__version__}" in result.output
    assert f"changed: device: was cuda:6, is {devices()[0]}" in result.output
    assert "changed: processor: was A fast one, is " in result.output
    assert "changed: threads: was 4096, is " in result.output
    assert "identical" in result.output


def test_a_model_that_has_moved_can_be_named(saved: dict[str, Path], tmp_path: Path) -> None:
    def move(data: dict) -> None:
        data["run"]["model"] = "/gone/model"

    image = edited(saved["plain"], tmp_path / "1.png", move)
    assert "there is no model '/gone/model'" in call("replay", image, code=2).stderr
    assert "identical" in call("replay", image, "--model", playground_model()).output


class _Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_strangers_image_runs_no_code(saved: dict[str, Path], tmp_path: Path) -> None:
    trap, folder = tmp_path / "trapped", tmp_path / "model"
    for name in ("lora.pt", "lora.safetensors", "model.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(_Payload(trap)))
    shutil.copytree(playground_model(), folder)
    next((folder / "unet").glob("*.safetensors")).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(_Payload(trap)))

    def lora(name: str) -> Callable[[dict], None]:
        return lambda data: data["run"]["scene"]["concepts"][0].update(lora=str(tmp_path / name))

    def model(name: str) -> Callable[[dict], None]:
        return lambda data: data["run"].update(model=str(tmp_path / name))

    for i, change in enumerate([lora("lora.pt"), lora("lora.safetensors"), model("model.ckpt"), model("model")]):
        call("replay", edited(saved["tara"], tmp_path / f"{i}.png", change), code=2)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(method="__import__"), "unknown method '__import__'"),
        (lambda run: run.update(method="tara", settings={"self": 1}), "tara has no settings ['self']"),
        (lambda run: run.update(scheduler="SchedulerMixin"), "unknown scheduler 'SchedulerMixin'"),
        (lambda run: run.update(scheduler="logging"), "unknown scheduler 'logging'"),
        (lambda run: run.update(device="meta"), None),
        (lambda run: run.update(model="playground/../../secret"), "there is no model"),
        (lambda run: run["scene"]["concepts"][0].update(lora="playground:../../x"), "have moved"),
        (lambda run: run["scene"]["concepts"][0].update(lora=None), "no file named"),
    ],
)
def test_records_of_strangers_reach_only_what_is_meant(
    saved: dict[str, Path], tmp_path: Path, change: Callable[[dict], None], message: str | None
) -> None:
    def with_other_content(data: dict) -> None:
        change(data["run"])
        data["sha256"] = dict.fromkeys(data["sha256"], "0" * 64) if message and "file" in message else data["sha256"]

    image = edited(saved["tara"], tmp_path / "1.png", with_other_content)
    result = call("replay", image, code=2 if message else 0)
    assert (message or "identical") in flat(result.output)


def test_images_without_a_record_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert "has no record" in call("replay", tmp_path / "1.png", code=2).stderr
    assert "there is no file" in call("replay", tmp_path / "2.png", code=2).stderr


@pytest.mark.parametrize(
    ("model", "cell", "family"), [("playground", 8, "Stable Diffusion 1.x and 2.x"), ("playground-flux", 16, "FLUX.1")]
)
def test_sizes_that_are_no_multiples_are_refused_before_loras_are_read(
    model: str, cell: int, family: str, tmp_path: Path
) -> None:
    other = "playground" if model == "playground-flux" else "playground-flux"  # which does not fit, if it is read
    what = ["--prompt", "a xlo bear", "--concept", f"path={other}:bear,trigger=xlo,class=bear", "--width", "130"]
    what += ["--height", "128"]
    words = f"must be multiples of {cell} with {family}, not 130 x 128; the nearest are"
    assert f"{words} 128 x 128 and {128 + cell} x 128" in flat(call("run", model, *what, code=2).output)
    assert words in flat(call("check", model, *what, code=2).output)
    (tmp_path / "batch.yaml").write_text(
        f"model: {model}\nsteps: 1\nscenes:\n  - {{name: a, prompt: a bear, width: 130, height: 128}}\n"
    )
    assert words in flat(call("batch", tmp_path / "batch.yaml", "--out", tmp_path, code=1).output)


def test_a_run_that_is_refused_for_a_missing_trigger_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    concepts = tuple(Concept(name=name, lora=f"playground:{name}", weight=4.0) for name in ("cat", "dog"))
    scene = Scene(prompt="a zwx dog and a cat", concepts=concepts, width=64, height=64)
    run = Run(scene=scene, model="playground", steps=1, device="cpu")
    pipe = open_model(run)
    for method in (None, "merge"):
        with pytest.raises(ValueError, match="the trigger 'sks' of concept 'cat' is not in the prompt"):
            make(pipe, run.model_copy(update={"method": method}))
    assert caplog.messages == []
    with caplog.at_level("WARNING"):
        make(pipe, run.model_copy(update={"scene": run.scene.model_copy(update={"prompt": "a zwx and a sks cat"})}))
    assert len(caplog.messages) == 2  # merge was chosen, and the weights are large


# --- check ---


def times(rows: str, text: str) -> float:
    """FLOPs relative to a plain image, as they are told before the rows."""
    found = re.search(rf"([\d.]+) times the FLOPs of a plain image; {re.escape(rows)}", text)
    assert found, text
    return float(found[1])


def test_check_says_what_matches_without_making_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = UNet2DConditionModel.forward

    def without_numbers(unet: UNet2DConditionModel, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert sample.is_meta, "check must not denoise"
        return forward(unet, sample, *args, **kwargs)

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", without_numbers)
    text = flat(call("check", "playground", "--scene", SCENES / "bear-robot.yaml", "--steps", 20).stdout)
    assert "2:xlo 3:bear 4:and 5:a 6:qrt 7:robot" in text
    assert "trigger 'xlo' at token 2; class word 'bear' at token 3" in text
    assert "trigger 'qrt' at token 6; class word 'robot' at token 7" in text
    assert f"unet layers, rank {metadata('bear-tara')['rank']}" in text
    assert len(re.findall("SHA-256 [0-9a-f]{64}, trained with tara", text)) == 2
    assert "method draft, because the prompt names every concept by trigger and class word size" in text
    rows = "44 + 1 stopped rows, each a latent through the model once (20 steps"
    assert 1 < times(rows, text) < 1.5, "a draft of four rows, and the LoRAs"
    assert text.endswith("no problems")
    monkeypatch.setattr(report, "_cost", lambda *args: report.RunCost("25", 1, 1))  # the rows are those of the plan
    text = flat(
        call("check", "playground", "--scene", SCENES / "bear-robot.yaml", "--guidance", 1, "--method", "merge").stdout
    )
    assert "25 rows, each a latent through the model once (25 steps, no rows for guidance)" in text
    assert "method merge" in text


def test_check_takes_every_option_of_run() -> None:
    of_run, of_check = (inspect.signature(command).parameters for command in (run_command, check_command))
    assert list(of_run) == list(of_check)
    assert all(of_run[name] == it for name, it in of_check.items())


@pytest.mark.usefixtures("costs_do_not_matter")
def test_check_says_which_seeds_and_files_a_run_would_make(tmp_path: Path) -> None:
    what = ["check", "playground", "--prompt", "a xlo bear", "--lora", "playground:bear", "--out", tmp_path / "made"]
    text = flat(call(*what, "--seed", "0-2", "--seed", 7, "--maps", "--save-memory", "tiling").stdout)
    assert f"saved memory tiling seeds 0, 1, 2, 7 images 4 and a contact sheet in {tmp_path / 'made'}, and" in text
    assert text.endswith("and for each a sheet of maps no problems")
    assert not (tmp_path / "made").exists()
    assert f"seeds 0 images 1 in {tmp_path / 'made'} no problems" in flat(call(*what).stdout)
    refused = flat(call(*what, "--device", "cpu", "--save-memory", "model-offload", code=2).output)
    assert "problem: model-offload keeps on the CPU what an accelerator does not need yet" in refused


@pytest.mark.parametrize(
    "pipeline",
    [
        flux_pipeline,
        pytest.param(partial(default_flux3, ComposeFlux3DistilledPipeline, flow_map=True), marks=pytest.mark.slow),
    ],
    ids=["guidance is an input", "guidance is distilled"],
)
def test_check_counts_no_rows_for_guidance_where_the_model_runs_none(
    pipeline: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = pipeline()
    pipe.save_pretrained("model")
    save_file(dict(as_file(random_lora_of_all(pipe.transformer, 0))), "cat.safetensors")
    what = ("--prompt", "a sks cat", "--concept", "path=cat.safetensors,trigger=sks,class=cat", "--device", "cpu")
    text = flat(call("check", "model", *what, "--steps", 5, "--method", "merge", "--guidance", 5).stdout)
    assert "5 rows, each a latent through the model once (5 steps, no rows for guidance)" in text
    assert text.endswith("no problems")


def test_an_image_without_concepts_is_made_by_a_modular_pipeline(tmp_path: Path) -> None:
    default_flux3().save_pretrained(tmp_path / "model")
    sides = ("--width", 64, "--height", 64)
    call("run", tmp_path / "model", "--prompt", "a cat", *sides, "--steps", 1, "--device", "cpu", "--out", tmp_path)
    assert read_pixels(tmp_path / "0.png").size == (64, 64)


def test_check_lists_every_problem(tmp_path: Path) -> None:
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04")
    (tmp_path / "cut.safetensors").write_bytes(playground_lora("cat").read_bytes()[:5000])
    (tmp_path / "scene.yaml").write_text(
        "prompt: a xlo bear and a robot\nconcepts:\n"
        "  - {name: one, lora: gone.safetensors, trigger: sks}\n"
        "  - {name: two, lora: pickle.pt, trigger: xlo}\n"
        "  - {name: three, lora: cut.safetensors}\n"
        "  - {name: four, lora: 'playground:bear', trigger: xlo}\n"
        "  - {name: five, lora: 'playground:robot', region: [0, 0, 512, 64]}\n"
        "  - {name: six}\n"
    )
    result = call("check", "playground", "--scene", tmp_path / "scene.yaml", "--method", "blend", code=2)
    problems = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    expected = [
        "gone.safetensors", "'sks' of concept 'one' is not in the prompt", "pickle.pt is a pickle",
        "cut.safetensors is no", "the trigger 'qrt' of concept 'five'",
        f"leaves the canvas of {SIZE} x {SIZE}", "'six'", "unknown method 'blend'",
    ]  # fmt: skip
    for text in expected:
        assert [problem for problem in problems if text in problem], (text, problems)
    assert "no problems" not in result.stdout


def test_check_finds_what_the_model_knows_once_the_rest_is_mended(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"unet.nothing.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    (tmp_path / "scene.yaml").write_text(
        "prompt: a xlo bear\nconcepts:\n  - {name: one, lora: 'playground:bear'}\n"
        "  - {name: two, lora: 'playground:bear', trigger: xlo}\n  - {name: three, lora: other.safetensors}\n"
    )
    result = call("check", "playground", "--scene", tmp_path / "scene.yaml", "--method", "merge", code=2)
    problems = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    for text in ("share words", "other.safetensors"):
        assert [problem for problem in problems if text in problem], (text, problems)


def test_check_finds_what_only_the_method_knows(tmp_path: Path) -> None:
    (tmp_path / "scene.yaml").write_text("prompt: a xlo bear\nconcepts: [{name: bear, lora: 'playground:bear'}]\n")
    result = call("check", "playground", "--scene", tmp_path / "scene.yaml", "--method", "regional", code=2)
    assert "problem: regional needs to know where the concepts are" in result.stdout


def test_check_looks_at_the_loras_even_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "scene.yaml").write_text(
        "prompt: a\nconcepts: [{name: a, lora: gone.safetensors}, {name: b, lora: 'playground:cat'}]\n"
    )
    result = call("check", "nowhere", "--scene", tmp_path / "scene.yaml", code=2)
    assert "problem: there is no model 'nowhere'" in result.stdout
    assert "gone.safetensors" in result.stdout
    assert "b: file playground:cat, SHA-256" in flat(result.stdout)


@pytest.mark.usefixtures("costs_do_not_matter")
def test_check_names_keys_that_fit_no_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(playground_lora("bear"))
    down, up = (f"unet.down_blocks.0.attentions.0.proj_in.lora_{side}.weight" for side in "AB")
    tensors |= {key.replace("attentions.0", "attentions.9"): tensors[key].clone() for key in (down, up)}
    save_file(tensors, tmp_path / "bear.safetensors")
    (tmp_path / "scene.yaml").write_text(
        "prompt: a xlo bear\nconcepts: [{name: bear, lora: bear.safetensors, trigger: xlo}]\n"
    )
    result = call("check", "playground", "--scene", tmp_path / "scene.yaml", "--method", "merge")
    assert re.search(r"bear: left out +2 keys: .*attentions\.9", result.stdout)


@pytest.mark.usefixtures("costs_do_not_matter")
def test_check_tells_of_words_past_the_models_limit(tmp_path: Path) -> None:
    (tmp_path / "scene.yaml").write_text(f"prompt: {'a cat and ' * 12}\n")
    assert (
        "(the model reads 30 tokens; 6 more are cut off)"
        in call("check", "playground", "--scene", tmp_path / "scene.yaml").stdout
    )


@pytest.mark.usefixtures("costs_do_not_matter")
def test_check_reads_long_prompts_and_weights(tmp_path: Path) -> None:
    prompt = f"a (xlo bear:1.2), {'a cat and ' * 9}a qrt robot"
    (tmp_path / "scene.yaml").write_text(
        f"prompt: '{prompt}'\nconcepts:\n- {{name: bear, lora: 'playground:bear'}}\n"
        "- {name: robot, lora: 'playground:robot'}\n"
    )
    found = call("check", "playground", "--scene", tmp_path / "scene.yaml", "--method", "merge").stdout
    assert "1:a 2:xlo 3:bear" in found
    assert "(in 2 chunks)" in found


def test_check_reports_a_broken_scene_file(tmp_path: Path) -> None:
    (tmp_path / "scene.yaml").write_text("prompt: a\nconcept: []\n")
    assert "concept: unknown field" in call("check", "playground", "--scene", tmp_path / "scene.yaml", code=2).stderr


# --- demo and the rest ---


def test_the_demo_writes_a_sheet_and_images_that_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PAIRS", demo.PAIRS[:1])
    monkeypatch.setattr(demo, "COMPOSED", ("merge", "regional"))

    def small(path: Path) -> Scene:
        """64 x 64 pixels, and a third of a size that a scene has, with its boxes."""
        scene = read_scene(path)
        concepts = [
            concept.model_copy(update={"region": tuple(edge // 3 for edge in concept.region)})
            if isinstance(concept.region, tuple) else concept for concept in scene.concepts
        ]  # fmt: skip
        size = {"width": (scene.width or SIZE) // 3, "height": (scene.height or SIZE) // 3}
        return scene.model_copy(update={**size, "concepts": tuple(concepts)})

    monkeypatch.setattr(demo, "read_scene", small)
    (tmp_path / "demo").mkdir()
    result = call("demo", "--steps", 1, "--seed", 4, "--out", tmp_path / "demo")
    folder = tmp_path / "demo-2"
    assert listed(tmp_path / "demo") == []
    said = flat(result.stdout)
    assert said.index(f"The first pair, and the others follow: {folder / 'first.png'} What to look at") > 0
    assert said.index(f"All pairs: {folder / 'sheet.png'}") < said.index(
        f"Three concepts in boxes: {folder / 'three.png'}"
    )
    assert len(listed(folder)) == len(demo.COLUMNS) + len(demo.COMPOSED) + 3
    made = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in made[:8]] == [*(job.file_name for job in demo.jobs((4,), 1)[:7]), "first.png"]
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 7 * 256
        assert sheet.height > 256
    three = read_record(folder / "three-regional-4.png").run.scene
    assert three == small(SCENES / "three.yaml")
    assert all(concept.region for concept in three.concepts)
    merged, drafted, boxed = (read_record(folder / f"cat-dog-{p}-4.png").run for p in ("merge", "draft", "regional"))
    assert [concept.lora for concept in merged.scene.concepts] == ["playground:cat", "playground:dog"]
    assert (drafted.method, drafted.scene) == ("draft", merged.scene)
    assert [concept.region for concept in boxed.scene.concepts] == list(demo.BOXES)
    pair, alone = merged.scene.prompt, read_record(folder / "cat-dog-second-4.png").run.scene.prompt
    assert alone == pair.replace("a sks cat and ", "") != pair
    assert "identical" in call("replay", folder / "cat-dog-draft-4.png").output


def test_the_first_sheet_of_the_demo_needs_a_tenth_of_its_images() -> None:
    todo = demo.jobs(steps=1)
    assert len(todo) == len(demo.SEEDS) * (len(demo.PAIRS) * len(demo.COLUMNS) + len(demo.COMPOSED))
    assert {(job.scene, job.run.seed) for job in todo[:7]} == {("cat-dog", 0)}
    assert {(job.scene, job.run.seed) for job in todo[7:]}.isdisjoint({("cat-dog", 0)})


def test_unknown_commands_and_options_end_with_2() -> None:
    call("dance", code=2)
    call("run", "playground", "--prompt", "a", "--sedd", "1", code=2)
    call("run", "playground", "--prompt", "a", "--seed", "-1", code=2)
    call("run", "playground", "--prompt", "a", "--seed", 2**63, code=2)


def test_version() -> None:
    assert call("--version").stdout.strip() == f"lora-compose {__version__}"


def test_it_is_a_module_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["compose", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lora_compose", run_name="__main__")  # as `python -m lora_compose`
    assert not ended.value.code
    assert capsys.readouterr().out.strip() == f"lora-compose {__version__}"


def test_nothing_is_left_on_the_logs(tmp_path: Path) -> None:
    import logging

    logger = logging.getLogger("lora_compose")
    before = list(logger.handlers), logger.level
    call("run", "nowhere", "--prompt", "a", code=2)
    assert (list(logger.handlers), logger.level) == before


# --- making an image from Python ---


def test_make_leaves_the_pipeline_and_the_random_state_as_they_were() -> None:
    run = Run(scene=Scene(prompt="a cat"), model="playground", steps=1, scheduler="EulerDiscreteScheduler")
    pipe, state, shares = open_model(run), torch.get_rng_state(), []
    scheduler = pipe.scheduler
    first = make(pipe, run.model_copy(update={"steps": 2}), shares.append)
    assert shares == [0.5, 1.0]
    assert pipe.scheduler is scheduler
    assert torch.equal(torch.get_rng_state(), state)
    assert first.record.run.scheduler == "EulerDiscreteScheduler"
    assert (first.image.size, first.image.mode) == ((SIZE, SIZE), "RGB")
    with pytest.raises(ValueError, match=r"opened in torch\.float32; open it again"):
        make(pipe, run.model_copy(update={"dtype": "float16"}))


def test_a_concept_of_the_same_name_with_another_lora_is_loaded_anew() -> None:
    def run(lora: str) -> Run:
        concept = Concept(name="it", lora=f"playground:{lora}", trigger="xlo", class_word="bear")
        scene = Scene(prompt="a xlo bear", concepts=(concept,), width=64, height=64)
        return Run(scene=scene, model="playground", method="merge", steps=1)

    pipe = open_model(run("bear"))
    first, other, again = (make(pipe, run(name)) for name in ("bear", "bear-tara", "bear"))
    assert difference(first.image, other.image) is not None
    assert difference(first.image, again.image) is None
    assert first.record == again.record
    assert first.record.sha256 != other.record.sha256


def test_schedulers_are_those_of_diffusers_that_fit() -> None:
    names = scheduler_names()
    assert {"DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "UniPCMultistepScheduler"} <= set(names)
    assert "FlowMatchEulerDiscreteScheduler" in names
    assert not {"SchedulerMixin", "KarrasVeScheduler", "RePaintScheduler", "FlowMatchHeunDiscreteScheduler"} & set(
        names
    )


def test_a_scheduler_for_other_models_is_refused_with_those_that_fit() -> None:
    of = Run(scene=Scene(prompt="a bear"), model="any", steps=1)
    unet, transformer = (of.model_copy(update={"scheduler": f"{name}Scheduler"}) for name in ("DDIM", "FlowMatchLCM"))
    assert scheduler_of(tiny_pipeline(), unet).order == scheduler_of(flux_pipeline(), transformer).order == 1
    with pytest.raises(ValueError, match=r"FlowMatchLCMScheduler does not fit Stable Diffusion 1.*DDIMScheduler"):
        scheduler_of(tiny_pipeline(), transformer)
    with pytest.raises(
        ValueError, match=r"DDIMScheduler does not fit FLUX.1; expected one of FlowMatchEuler\w+, FlowM\w+$"
    ):
        scheduler_of(flux_pipeline(), unet)


def test_devices_are_named_or_chosen() -> None:
    assert devices()[-1] == "cpu"
    assert choose_device(None) == devices()[0]
    assert choose_device("cpu") == "cpu"
