"""The Python of README and docs runs as it is shown, on small models under the names of the large ones.

Two things differ from what a reader gets: calls take two steps (those that say so below take theirs), and where no GPU
is there, "cuda" and offloading mean the simulated device. Code that downloads a model, or quantises weights without the
packages and the GPU for it, is compiled and not run.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from components import random_lora, tiny_xl_pipeline
from evaluations import known, store, suite
from lora_compose import ComposePipeline
from lora_compose.attention import Gates
from lora_compose.compose.evaluation.table import load
from lora_compose.compose.playground.assets import assets_dir
from small_world import SIZE
from snippets import CODE_BLOCK, PAGES, PUBLISHED, STEPS, ModelFolders, blocks, name_of, run_snippet

Names = dict[str, Any]

START = """
import torch
from PIL import Image
from lora_compose import *

prompt = "a sks cat and a zwx dog on grass"
"""
"""What pages take for granted: README's imports and its prompt."""


def composing(names: Names) -> None:
    """A pipeline with concepts, and a box for each of two, as README makes them."""
    pipe: Any = ComposePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe.add_concepts("loras")
    boxes = {"cat": (20, 60, 240, 480), "dog": (270, 60, 500, 480)}
    names |= {"pipe": pipe} | {name: names["Concept"](name=name, region=box) for name, box in boxes.items()}


def playground(names: Names) -> None:
    names["pipe"] = ComposePipeline.from_pretrained(assets_dir() / "playground" / "model")
    names["pipe"].add_concepts(assets_dir() / "playground" / "loras")
    Path("start").mkdir(exist_ok=True)
    names["Image"].open("start.png").resize((SIZE, SIZE)).save("start/0.png")
    names["prompt"] = "a sks cat and a zwx dog and a ohwx rabbit on grass"


def an_own_model(names: Names) -> None:
    """A module and LoRAs, as in another program."""
    from lora_compose.attention import Site, installed_layers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"to_k": nn.Linear(8, 6), "to_out": nn.Linear(6, 6)})])

        def forward(self, _: Any) -> Any:
            block: Any = self.blocks[0]
            return block["to_k"](torch.ones(2, 77, 8)), block["to_out"](torch.ones(2, 16, 6))

    model = Model()
    gates = Gates(torch.ones(2, 77, 2), {1: torch.ones(2, 16, 2)}, torch.ones(2, 2), (8, 8))
    loras = [random_lora(model, seed, targets=("to_k", "to_out")) for seed in (0, 1)]
    names |= {
        "Site": Site, "installed_layers": installed_layers, "model": model, "loras": loras, "gates": gates,
        "device": torch.device("cpu"), "dtype": torch.float32,
    }  # fmt: skip


def evaluated(names: Names) -> None:
    """The tables of a small evaluation, under the names of those of the docs."""
    import pandas

    names |= {"pandas": pandas, "pd": pandas}
    for name in ("playground-boxes", "playground-quick"):
        folder = Path("outputs/evaluation") / name
        if not folder.exists():
            load(store(folder, suite(), known)).images.to_csv(folder / "images.csv", index=False)


def tables(names: Names) -> None:
    """The files of the page that the code reads."""
    page = next(page for page in PAGES if name_of(page) == "docs/batch.md")
    Path("animal.yaml").write_text(blocks(page, "yaml")[0])
    Path("animals.csv").write_text(blocks(page, "csv")[0])


def pictures(names: Names) -> None:
    """Images to train with, in a folder without LoRAs."""
    Path("training").mkdir()
    os.chdir("training")  # the test goes back
    shutil.copytree(assets_dir() / "playground/references/cat", "references/cat")
    shutil.copytree(assets_dir() / "playground/references/dog", "animals")


def other_models(names: Names) -> None:
    """A pipeline of diffusers."""
    names["another_pipeline"] = tiny_xl_pipeline(StableDiffusionXLPipeline)


def sdxl(names: Names) -> None:
    """SDXL, by name and with concepts."""
    names["model"] = "stabilityai/stable-diffusion-xl-base-1.0"
    names["pipe"] = ComposePipeline.from_pretrained(names["model"])
    names["pipe"].add_concepts("loras")


def one_layer(names: Names) -> None:
    """What a layer has at hand."""
    names |= {
        "F": nn.functional, "x": torch.randn(5, 8), "A": torch.randn(4, 8), "B": torch.randn(6, 4),
        "gate": torch.ones(5, 1), "k": 2,
    }  # fmt: skip


BEFORE: dict[tuple[str, int], Callable[[Names], None]] = {
    ("ARCHITECTURE.md", 0): an_own_model,
    ("docs/batch.md", 0): tables,
    ("docs/evaluation.md", 0): evaluated,
    ("docs/image-to-image.md", 0): playground,
    ("docs/image-to-image.md", 2): playground,
    ("docs/merge.md", 0): one_layer,
    ("docs/methods/lora-composer.md", 1): evaluated,
    ("docs/methods/tara.md", 1): evaluated,
    ("docs/models.md", 0): other_models,
    ("docs/models.md", 11): sdxl,
    ("docs/models.md", 12): sdxl,
    ("docs/training.md", 0): pictures,
}
"""What the text before a snippet says is there."""

FAMILY = {("docs/models.md", number): "sdxl" for number in (11, 12)}  # of the LoRAs beside code that names no model
ALL_STEPS = {
    ("docs/image-to-image.md", 2),  # it reads the maps of the thirteenth
    ("docs/models.md", 6), ("docs/models.md", 7),  # Ideogram's scales of guidance are those of 48 steps
}  # fmt: skip
USUAL = {
    "README.md", "ARCHITECTURE.md", "docs/concepts.md", "docs/evaluation.md", "docs/methods/README.md",
    "docs/training.md",
}  # fmt: skip
"""Pages that each do something of their own in few calls; all others run with `make snippets`."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    return ModelFolders(tmp_path_factory.mktemp("folders"))


def marked(page: Path) -> Any:
    """A page as a parameter."""
    name = name_of(page)
    return pytest.param(page, id=name, marks=[] if name in USUAL else [pytest.mark.slow])


def cannot_run(code: str) -> bool:
    """Whether a snippet needs what is not here: a GPU, a library, a newer PyTorch, the hub."""
    return (
        ('quantize="nf4"' in code and not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes")))
        or (".gguf" in code and not importlib.util.find_spec("gguf"))
        or ("Training.preset(" in code and not hasattr(torch.optim, "Muon"))  # the playground's preset has Muon
        or "snapshot_download" in code
    )


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page, "python")])
def test_python_of_a_page_runs(page: Path, folders: ModelFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    names: Names = {}
    family, name = "sd", name_of(page)
    exec(START, names)
    monkeypatch.chdir(folders.folder(family))
    for number, code in enumerate(blocks(page, "python")):
        if cannot_run(code):
            compile(code, name, "exec")
            continue
        before = BEFORE.get((name, number))
        family = next((published.family for model, published in PUBLISHED.items() if f'"{model}"' in code), family)
        family = FAMILY.get((name, number), family)
        monkeypatch.chdir(folders.folder(family))
        if before:
            before(names)
        elif number == 0 and "from_pretrained" not in code:
            composing(names)
        run_snippet(code, names, f"{name}, snippet {number + 1}", steps=None if (name, number) in ALL_STEPS else STEPS)


STARTS = (
    "pipe(",
    "pipe.load_concept(",
    "pipe.add_concepts(",
    "concepts=",
    "Concept(",
    "Clora(",
    "LoraComposer(",
    "Regional(",
)
"""How Python begins that stands in a sentence or a table, and is whole."""
FORM = re.compile(r"\.\.\.|Concept\((?!name=)")
"""What a form has: something left out, or a concept without a name."""


def whole_calls(page: Path) -> list[str]:
    """Calls in the text and the tables of a page, but for forms."""
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8")).replace("\n", " ")
    found = [code for code in re.findall(r"`([^`]+)`", text) if code.startswith(STARTS) and not FORM.search(code)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if "docs" in page.parts and whole_calls(page)])
def test_calls_in_sentences_and_tables_run(page: Path, folders: ModelFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    names: Names = {}
    exec(START, names)
    monkeypatch.chdir(folders.folder("sd"))
    composing(names)
    names["pipe"].load_concept("alice.safetensors", trigger="alc", class_word="woman")
    names["pipe"].load_concept("berta.safetensors", trigger="brt", class_word="woman")
    for code in whole_calls(page):
        if code.startswith("pipe.load_concept("):
            composing(names)
            names["pipe"].unload_concept("cat")
        if code.startswith("concepts="):
            text = "an alc woman and a brt woman" if "alice" in code else names["prompt"]
            code = f"pipe({text!r}, {code})"
        run_snippet(code, names, f"{name_of(page)}: {code}")
