"""Commands of README and docs do what they say, on small models under the names of the large ones, on a CPU.

Pages whose commands belong together are run from the first to the last, in two steps and float32. Of all other pages
`run` is typed as `check`, which takes the same and stops before the first step, and `merge` and `inspect` as they are.
Only parsed, by `test_docs.py`, are commands that need minutes, a browser or a cluster: `demo`, `ui`, `train`,
`evaluate` and `bench`, which have tests of their own with small numbers, `--ray`, and `comfyui`.
"""

import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from commands import call, flat
from components import lora_tensors, random_lora, tiny_xl_pipeline
from lora_compose.compose.files.images import read_record
from lora_compose.compose.playground.assets import assets_dir
from small_world import SIZE
from snippets import CODE_BLOCK, PAGES, PUBLISHED, ROOT, ModelFolders, blocks, name_of, named, typed

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
COMMANDS = [line for page in PAGES for line in (*typed(page), *named(page))]
TRIED = ("run", "merge", "inspect")
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "gguf": "gguf"}
"""What is needed for fewer bits, by the name or the ending of the file."""
SCENE = "assets/scenes/bear-robot-words.yaml"


def page_of(name: str) -> Path:
    """The page of this name."""
    return next(page for page in PAGES if name_of(page) == name)


def family_of(words: list[str], otherwise: str = "sd") -> str:
    """The family of the model that a command names."""
    return next((published.family for name, published in PUBLISHED.items() if name in words), otherwise)


def without(words: list[str], *options: str) -> list[str]:
    """A command line without these options and their values."""
    return [word for i, word in enumerate(words) if word not in options and (i == 0 or words[i - 1] not in options)]


def here(words: list[str]) -> list[str]:
    """A command line without what this machine lacks: offloading to a GPU, and packages for fewer bits."""
    if "--quantize" in words:
        given = words[words.index("--quantize") + 1]
        needed = PACKAGES.get(given.rpartition(".")[2])
        if given == "nf4" or (needed is not None and importlib.util.find_spec(needed) is None):
            words = without(words, "--quantize")
    places = [i for i, word in enumerate(words) if word == "--save-memory" and words[i + 1].endswith("offload")]
    return [word for i, word in enumerate(words) if i not in places and i - 1 not in places]


def cheap(words: list[str]) -> list[str]:
    """A command line that makes images in two steps, in float32, on the CPU; others repeat what an image says."""
    if words[0] not in ("run", "check"):
        return words
    return [*here(without(words, "--dtype")), "--device", "cpu", "--steps", "2"]


def small_images(folder: Path, *further: str) -> None:
    """Makes start images of the small model's size: `start.png`, and others that a page names."""
    pixels = Image.open(folder / "start.png").resize((SIZE, SIZE))
    for name in ("start.png", *further):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels.save(folder / name)


def scenes(folder: Path) -> None:
    """The scene files of the pages, under the names that they have there."""
    for page, name in (("docs/tutorial.md", "scene.yaml"), ("docs/characters.md", "women.yaml")):
        (folder / name).write_text(blocks(page_of(page), "yaml")[0], encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if line[0] in TRIED and len(line) > 2], ids=" ".join)
def test_a_command_of_the_docs_does_what_it_says(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [word for word in line if word != "..."]
    if {"SCENE", "MODEL", "FOLDER", "FILE"} & set(line) and line[0] != "run":
        pytest.skip("a form, not a command")
    folder = ModelFolders(tmp_path).folder(family_of(line))
    monkeypatch.chdir(folder)
    known = {"MODEL": SD, "FOLDER": "loras", "SCENE": SCENE}
    words = [known.get(word, word) for word in line]
    if words[0] == "run":
        words = ["check", *here(words[1:]), "--device", "cpu"]
        small_images(folder, "start/0.png", "start/3.png")
        scenes(folder)
    if "style.safetensors:0.7" in words:
        shutil.copy("ink.safetensors", "style.safetensors")
    call(*words)


def run_page(page: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Runs the commands of a page that make, check and repeat images; returns what each kind printed, in order."""
    printed: dict[str, list[str]] = {}
    family = "sd"
    for line in typed(page_of(page)):
        if line[0] in ("run", "check", "replay", "refine", "inspect"):
            family = family_of(line, family)  # commands on an image name no model
            monkeypatch.chdir(folder_of(family))
            known = {"MODEL": SD, "FOLDER": "loras"}
            words = [known.get(word, word) for word in line]
            printed.setdefault(line[0], []).append(flat(call(*cheap(words)).output))
    return printed


@pytest.mark.usefixtures("playgrounds_opened_once")
@pytest.mark.parametrize(
    ("page", "images"),
    [
        ("README.md", {"outputs/run/1.png", "outputs/run/2.png", "outputs/run/0.png"}),
        pytest.param(
            "docs/usage.md",
            {"outputs/run/1.png", "outputs/run/2.png", "outputs/run/0.png", "outputs/run/0-maps.png"},
            marks=pytest.mark.slow,
        ),
        pytest.param("docs/faq.md", {"outputs/run/0.png", "outputs/run/0-2.png"}, marks=pytest.mark.slow),
        pytest.param(
            "docs/image-to-image.md",
            {"start/3.png", "replaced/1.png", "outputs/run/0-refined.png"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_commands_of_a_page_make_the_images_that_it_names(
    page: str, images: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page == "README.md":  # which names the playground alone, and no pixels
        request.getfixturevalue("small_by_default")
        folder = tmp_path
        (folder / "assets").symlink_to(ROOT / "assets")
    else:
        folder = ModelFolders(tmp_path).folder("sd")
        small_images(folder)
    printed = run_page(page, lambda _: folder, monkeypatch)
    assert images <= {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert all("identical: every pixel is the same" in text for text in printed.get("replay", []))


@pytest.mark.slow
def test_the_page_about_characters_runs_from_the_first_to_the_last_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ModelFolders(tmp_path)
    for family in ("sdxl", "flux"):
        scenes(folders.folder(family))
    printed = run_page("docs/characters.md", folders.folder, monkeypatch)
    about, (plain, *others) = printed["inspect"][0], printed["check"]
    assert "word hatsune miku: in 40 captions" in about
    assert "word 1girl: in 38 captions" in about
    assert "method merge, because miku has no class word: give it one, class=1girl in --concept" in plain
    assert len(others) == 3
    assert all("method draft, because the prompt names every concept" in text for text in others)
    sdxl, flux = (folders.folder(family) / "outputs" for family in ("sdxl", "flux"))
    for folder in (sdxl / "girls", sdxl / "women", flux / "flux"):
        assert {path.name for path in folder.iterdir()} == {"0.png", "1.png", "2.png", "3.png", "sheet.png"}
        assert read_record(folder / "3.png").run.method == "draft"


@pytest.mark.slow
def test_the_tutorial_runs_from_the_first_to_the_last_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model of SDXL's structure: boxes and canvas are an eighth, two steps, on the CPU."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_xl_pipeline()
    pipe.save_pretrained("model")
    for seed, name in enumerate(("cat", "dog")):
        save_file(lora_tensors(unet=random_lora(pipe.unet, seed, size=0.05)), f"{name}.safetensors")
    tutorial = ROOT / "docs/tutorial.md"
    (scene,) = (code for kind, code in CODE_BLOCK.findall(tutorial.read_text(encoding="utf-8")) if kind == "yaml")
    Path("scene.yaml").write_text(re.sub(r"\b\d{2,4}\b", lambda found: str(int(found[0]) // 8), scene))
    commands = [line for line in typed(tutorial) if line[0] != "replay" or len(line) == 2]
    assert {command for command, *_ in commands} == {"inspect", "run", "check", "replay"}
    for command, *rest in commands:
        line = " ".join(map(shlex.quote, rest)).replace(SDXL, "model").replace("float16", "float32")
        line = line.replace("--save-memory model-offload", "--steps 2 --device cpu")  # a CPU has nowhere to offload to
        call(command, *shlex.split(line))
    assert Path("outputs/composer/3.png").is_file()
    assert Path("outputs/composer-stronger/3.png").is_file()
    shutil.rmtree("outputs")


@pytest.mark.slow
def test_commands_of_many_scenes_make_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step; a folder of one scene, a table of one prompt, and the files that the page shows."""
    folder, page = ModelFolders(tmp_path).folder("sd"), page_of("docs/batch.md")
    monkeypatch.chdir(folder)
    Path("scenes").mkdir()
    shutil.copy(assets_dir() / "scenes/cat-dog.yaml", "scenes")
    Path("prompts.csv").write_text("name,prompt\none,a sks cat on grass\n")
    Path("animal.yaml").write_text(blocks(page, "yaml")[0])
    Path("animals.csv").write_text(blocks(page, "csv")[0])
    Path("everything.yaml").write_text(blocks(page, "yaml")[1])
    lines = [line for line in typed(page) if "--ray" not in line]
    assert len(lines) == 4
    for number, line in enumerate(lines):
        model = SD if "prompts.csv" in line else "playground"
        words = [model if word == "MODEL" else word for word in line]
        call(*words, "--steps", 1, "--device", "cpu", "--out", f"made/{number}")
    made = [sorted(path.stem for path in Path(f"made/{number}").glob("*.png")) for number in range(4)]
    assert made[0] == [f"cat-dog-{seed}" for seed in range(4)]
    assert made[1] == ["one-0"]
    assert made[2] == [*(f"bear-grass-{seed}" for seed in range(4)), "robot-sand-7"]
    assert made[3] == ["bear-1", "bear-2"]
