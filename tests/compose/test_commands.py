"""Help, the version and mistakes in names come at once: without torch, diffusers and transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_compose.compose.benchmark.architectures import TRIGGERS
from lora_compose.compose.commands import bench, inspect
from lora_compose.compose.support import names
from lora_compose.compose.support.names import did_you_mean, file_near
from lora_compose.compose.training.settings import PRESETS as TRAINING_PRESETS
from lora_compose.compose.training.settings import SCOPES as TRAINING_SCOPES
from lora_compose.pipelines.formats.change import MAX_RANK
from lora_compose.pipelines.merging import MERGERS
from lora_compose.pipelines.methods import METHODS, PRESETS

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torch", "diffusers", "transformers", "numpy", "pandas")
COMMANDS = (
    "run", "batch", "demo", "ui", "serve", "check", "methods", "replay", "refine", "inspect", "merge", "train", "bench",
    "evaluate", "evaluate run", "evaluate published", "evaluate report", "evaluate compare", "blind", "blind make",
    "blind score", "blind judge", "blind follow", "comfyui", "comfyui install", "comfyui uninstall",
)  # fmt: skip
CONCEPT = "path=playground:bear,trigger=xlo,class=bear"
MISTAKES = {
    "rnu playground": "Did you mean 'run'?",
    "ui playgruond": "there is no model 'playgruond'; did you mean 'playground'",
    "run playground --prmpt a": "--prompt",
    "run playground --size 256": "(Possible options: --height, --width)",
    "check playground --num-inference-steps 4": "--steps",
    "run plyground --prompt a": "there is no model 'plyground'; did you mean 'playground' or 'playground-flux'?",
    "run playground --prompt a --method CLORRA": "unknown method 'CLORRA'; there are merge, tara",
    f"run playground --prompt a --method clra --concept {CONCEPT}": "did you mean 'clora'?",
    "run playground --prompt a --lora playground:baer": "did you mean 'bear'",
    f"run playground --prompt a --concept {CONCEPT},wieght=2": "did you mean 'weight' or 'any_weight'?",
    f"run playground --prompt a --concept {CONCEPT},weight=much": "weight: expected a valid number",
    "run playground --scene assets/scenes/cat-dg.yaml": "in assets/scenes, did you mean 'cat-dog.yaml'",
    "run playground --prompt a --lora READMEE.md": "there is no file 'READMEE.md'; did you mean 'README.md'?",
    "run playground --prompt a --width 0": "width: expected greater than 0",
    "batch assets/scenes/cat-dg.yaml --model playground": "in assets/scenes, did you mean 'cat-dog.yaml'",
    "batch assets/scenes --model plyground": "did you mean 'playground' or 'playground-flux'?",
    "batch assets/scenes --model playground --method regoinal": "did you mean 'regional'?",
    "serve playground --loras assets/playground/lora": "did you mean 'loras'?",
    "check playground --scene assets/scenes/cat-dg.yaml": "did you mean 'cat-dog.yaml'",
    "methods clra": "did you mean 'clora'?",
    "run playground --prompt a --set length=2": "--set length: a setting needs --method; there are merge, tara",
    "run playground --prompt a --seed 3-1": "the seeds 3-1 run backwards",
    "run model.gguf --prompt a": "is one quantised denoiser, not a whole model",
    "run playground --prompt a --quantize nf5": "did you mean 'nf4'?",
    "serve playground --loras assets/playground/loras --quantize q4.gguf": "there is no file 'q4.gguf'",
    "batch assets/scenes --model playground --quantize int4": "did you mean 'int8'?",
    "replay assets/scenes/cat-dog.pgn": "there is no file 'assets/scenes/cat-dog.pgn'",
    "inspect playground:kittn": "did you mean 'kitten'",
    "merge playground:cat playground:dgo --out a.safetensors": "did you mean 'dog'",
    "merge playground:cat playground:dog --method tiess --out a.safetensors": "did you mean 'ties'?",
    "batch assets/scenes --model playground --ray 10.0.0.1": "--ray 10.0.0.1: expected local, auto",
    "batch assets/scenes --model playground --ray ray://10.0.0.1": "HOST:PORT, e.g. 10.0.0.1:6379, or ray://HOST:PORT",
    "evaluate published assets/suites/templat.yaml": "did you mean 'template.yaml'?",
    "evaluate playground-quik": "did you mean 'playground-quick'",
    "comfyui install assets": "assets is not a ComfyUI that can run these nodes",
    "bench --method clora:oficial": "did you mean 'clora:official'",
    "train assets --out a.safetensors --trigger a --class b --model playground --preset sdlx": "did you mean 'sdxl'",
}
LISTS = {"methods": "tara: Every LoRA acts on its own words", "methods tara:official": "--set cfg_mask=broadcast"}
SCRIPT = """
import json, sys, time
from lora_compose.compose.cli import app
from typer.testing import CliRunner

started, told = time.process_time(), []
for arguments in json.load(sys.stdin):
    result = CliRunner().invoke(app, arguments)
    told.append([result.exit_code, result.output])
slow = [name for name in %r if name in sys.modules]
print(json.dumps({"told": told, "slow": slow, "started": started, "ended": time.process_time()}))
"""


@pytest.fixture(scope="module")
def answers() -> dict:
    """What one process without anything slow answers to everything."""
    asked = [["--version"], ["--help"], *([*name.split(), "--help"] for name in COMMANDS)]
    asked += [text.split() for text in (*MISTAKES, *LISTS)]
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT % (SLOW,)], input=json.dumps(asked), cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = json.loads(told.stdout)
    return {**found, "told": dict(zip([" ".join(one) for one in asked], found["told"], strict=True))}


def test_help_and_mistakes_need_nothing_slow(answers: dict) -> None:
    assert answers["slow"] == []


def test_they_take_little_time(answers: dict) -> None:
    """CPU seconds, with room for slow machines; imports of torch and diffusers alone take 5."""
    assert answers["started"] < 1.5
    assert (answers["ended"] - answers["started"]) / len(answers["told"]) < 0.3


@pytest.mark.parametrize("command", ["--version", "--help", *(f"{name} --help" for name in COMMANDS)])
def test_every_command_explains_itself(answers: dict, command: str) -> None:
    code, text = answers["told"][command]
    assert code == 0, text
    assert ("lora-compose 0" if command == "--version" else "Usage:") in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert not [line for line in text.splitlines() if line.endswith("...") and "Usage:" not in line]


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_with_what_may_have_been_meant(answers: dict, typed: str) -> None:
    code, text = answers["told"][typed]
    assert code == 2
    assert " ".join(MISTAKES[typed].split()) in " ".join(text.split())


@pytest.mark.parametrize("typed", LISTS)
def test_methods_are_listed_with_their_settings(answers: dict, typed: str) -> None:
    code, text = answers["told"][typed]
    assert code == 0
    assert LISTS[typed] in text


def test_names_are_those_of_the_registries() -> None:
    assert tuple(METHODS) == names.METHODS
    assert tuple(PRESETS) == names.PRESETS
    assert tuple(MERGERS) == names.MERGERS
    assert tuple(TRAINING_PRESETS) == names.TRAINING_PRESETS
    assert tuple(TRAINING_SCOPES) == names.TRAINING_SCOPES
    assert len(TRIGGERS) == bench.MOST_CONCEPTS
    assert inspect.MAX_RANK == MAX_RANK


def test_names_that_are_spelled_alike() -> None:
    assert did_you_mean("CLoRA", ("clora", "tara")) == "; did you mean 'clora'?"
    assert did_you_mean("Cat", ["CAT"]) == "; did you mean 'CAT'?"
    assert did_you_mean("callback", ("callback_on_step_end",)) == "; did you mean 'callback_on_step_end'?"
    assert did_you_mean("zebra", ("clora", "tara")) == ""
    assert did_you_mean("", ("clora",)) == ""


def test_files_that_are_spelled_alike(tmp_path: Path) -> None:
    (tmp_path / "cat.safetensors").touch()
    assert file_near(tmp_path / "cta.safetensors") == f"; in {tmp_path}, did you mean 'cat.safetensors'?"
    assert file_near(tmp_path / "zzzzzz") == ""
    assert file_near(tmp_path / "none/cat.safetensors") == ""
