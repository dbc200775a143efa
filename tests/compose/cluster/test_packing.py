"""Files of one machine on another: what is sent, where it is then, and what messages call it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluations import suite
from lora_compose.compose.cluster.packing import Node, Packer, union
from lora_compose.compose.evaluation.packing import pack
from lora_compose.compose.evaluation.scoring import reference_crops
from lora_compose.compose.evaluation.suite import moved_suite
from lora_compose.compose.files.paths import moved
from lora_compose.compose.playground.assets import assets_dir
from lora_compose.pipelines.scene.scene import Concept, ControlFile, IPAdapterFile, Scene

PLAYGROUND = assets_dir() / "playground"
BEAR = {"name": "bear", "lora": "playground:bear", "trigger": "xlo", "class_word": "bear"}
SCENE = {"name": "one", "prompt": "a xlo bear", "concepts": ["bear"]}


class Store:
    """An object store that is a list."""

    def __init__(self) -> None:
        self.contents: list[np.ndarray] = []

    def put(self, path: Path) -> int:
        self.contents.append(np.fromfile(path, dtype=np.uint8))
        return len(self.contents) - 1


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def node(store: Store, tmp_path: Path) -> Node:
    return Node(tmp_path / "node", store.contents.__getitem__)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def image(path: Path, size: int = 8) -> str:
    Image.new("RGB", (size, size), (size, 0, 0)).save(path)
    return str(path)


def test_every_file_that_a_scene_names_is_on_the_node(store: Store, node: Node, here: Path, tmp_path: Path) -> None:
    write(here / "control/config.json", "{}")
    write(here / "control/unet/model.safetensors", "weights")
    write(here / "control/unet/model.bin", "the same weights")
    write(here / "control/encoder/model.bin", "these are nowhere else")
    mask = image(here / "mask.png")
    loras = [str(write(here / f"{name}.safetensors", name)) for name in ("cat", "style")]
    scene = Scene(
        prompt="a sks cat", image=image(here / "start.png"), mask_image=mask,
        concepts=(
            Concept(name="cat", lora=(loras[0], f"{loras[1]}:0.7"), region=mask),
            Concept(name="dog", lora="playground:dog"), Concept(name="fox", lora="user/fox"),
        ),
        controls=(ControlFile(model=str(here / "control"), image=image(here / "edges.png", 16)),),
        ip_adapters=(IPAdapterFile(model=str(here / "control"), weight_name="a.safetensors", image=mask),),
    )  # fmt: skip
    named, before = set[str](), {}

    def note(source: str) -> str:
        named.add(source)
        before[source] = Path(source).read_bytes() if Path(source).is_file() else b""
        return source

    moved(scene, note)
    parcel = Packer(store.put).named_by(scene)
    shutil.rmtree(here)
    move = node.unpack(parcel)
    there = {source: move(source) for source in named}
    assert {source for source in named if there[source] == source} == {"playground:dog", "user/fox"}
    for source in named - {"playground:dog", "user/fox", str(here / "control")}:
        assert Path(there[source]).read_bytes() == before[source]
        assert Path(there[source]).name == Path(source).name
    control = Path(there[str(here / "control")])
    sent = {path.relative_to(control).as_posix() for path in control.rglob("*") if path.is_file()}
    assert sent == {"config.json", "unet/model.safetensors", "encoder/model.bin"}
    assert len(store.contents) == 7, "each content once: start image and mask are alike"
    assert moved(scene, move).concepts[0].lora == (there[loras[0]], f"{there[loras[1]]}:0.7")


def test_settings_of_peft_travel_with_the_lora_that_they_are_of(store: Store, node: Node, here: Path) -> None:
    packer, there = Packer(store.put), []
    for alpha in (1, 2):
        lora = write(here / f"{alpha}/adapter_model.safetensors", "the same weights")
        write(lora.with_name("adapter_config.json"), json.dumps({"lora_alpha": alpha}))
        there.append(Path(node.unpack(packer.lora(str(lora.parent)))(str(lora.parent))))
    settings = [json.loads(path.with_name("adapter_config.json").read_text()) for path in there]
    assert settings == [{"lora_alpha": 1}, {"lora_alpha": 2}]


def test_messages_name_what_the_user_has_named(store: Store, node: Node, here: Path) -> None:
    lora, model = write(here / "cat.safetensors", "a"), write(here / "model/unet/config.json", "{}").parents[1]
    packer = Packer(store.put)
    move = node.unpack(union([packer.lora(str(lora)), packer.source(str(model))]))
    text = f"{move(str(lora))} does not fit {move(str(model))}/unet/config.json"
    assert node.as_given(text) == f"{lora} does not fit {model}/unet/config.json"


@pytest.mark.parametrize("named", [str, lambda folder: tuple(map(str, sorted(folder.glob("*.png"))))])
def test_references_are_cropped_on_a_node_as_here(
    store: Store, node: Node, here: Path, named: Callable[[Path], Any]
) -> None:
    """A file beside them says where the concept is."""
    folder = shutil.copytree(PLAYGROUND / "references/bear", here / "bear")
    given = suite(concepts=[BEAR | {"references": named(folder)}], scenes=[SCENE], methods=["merge"])
    expected = [np.asarray(one) for one in reference_crops(given.concepts[0])]
    assert len({one.shape for one in expected}) > 1, "crops of several sizes"
    parcel = pack(Packer(store.put), given)
    shutil.rmtree(folder)
    found = reference_crops(moved_suite(given, node.unpack(parcel)).concepts[0])
    assert all(np.array_equal(np.asarray(one), same) for one, same in zip(found, expected, strict=True))
