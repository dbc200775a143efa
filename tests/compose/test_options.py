"""Concepts as they are typed: in full, and in short."""

import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import call, flat
from lora_compose import Concept, Run, Scene
from lora_compose.compose.commands.asked import check_lookups, concepts_of, parse_box, parse_concept
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.playground.assets import playground_lora
from lora_compose.pipelines.scene.mask_images import in_pixels
from lora_compose.pipelines.scene.sources import parse_lora
from small_world import SCHEDULER, STYLE

pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat.safetensors:0.8", ("cat.safetensors", 0.8)),
        ("cat.safetensors", ("cat.safetensors", 1.0)),
        ("playground:bear", ("playground:bear", 1.0)),
        ("playground:bear:-0.5", ("playground:bear", -0.5)),
        ("user/my-cat:2", ("user/my-cat", 2.0)),
        ("C:\\loras\\cat.safetensors", ("C:\\loras\\cat.safetensors", 1.0)),
        ("12", ("12", 1.0)),
    ],
)
def test_a_lora_with_its_weight(text: str, expected: tuple[str, float]) -> None:
    assert parse_lora(text) == expected


@pytest.mark.parametrize(
    ("text", "message"), [("", "names no LoRA"), (":1", "names no LoRA"), ("a:inf", "weight is inf")]
)
def test_loras_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_lora(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,16,60,112", (0, 16, 60, 112)),
        (" (0, 16, 60, 112) ", (0, 16, 60, 112)),
        ("0,0.1,0.5,0.9", (0.0, 0.1, 0.5, 0.9)),
        ("0,0,1.0,1", (0.0, 0.0, 1.0, 1.0)),
        ("0,0,1,1", (0, 0, 1, 1)),
        (".25,0,.5,1", (0.25, 0.0, 0.5, 1.0)),
        ("none", None),
    ],
)
def test_boxes_in_pixels_and_as_parts(text: str, expected: tuple | None) -> None:
    found = parse_box(text)
    assert found == expected
    assert found is None or {type(edge) for edge in found} == {type(edge) for edge in expected or ()}


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "60,0,10,10", "0,0.5,1,0.5", "0,0.5,1,1.5", "-1,0,5,5", "nan,0,1,1"]
)
def test_boxes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"--box .*"):
        parse_box(text)


@given(st.tuples(*[st.integers(0, 4096)] * 4))
def test_what_is_written_as_pixels_is_read_as_the_same_pixels(box: tuple[int, int, int, int]) -> None:
    text = ",".join(map(str, box))
    if box[0] < box[2] and box[1] < box[3]:
        assert parse_box(text) == box
        assert parse_concept(f"path=a.safetensors,region={text}").region == box
    else:
        with pytest.raises(ValueError, match="left"):
            parse_box(text)


@given(st.tuples(*[st.floats(0, 1)] * 4), st.integers(8, 2048), st.integers(8, 2048))
def test_parts_of_an_image_are_boxes_inside_it(
    edges: tuple[float, float, float, float], width: int, height: int
) -> None:
    (left, right), (top, bottom) = sorted(edges[::2]), sorted(edges[1::2])
    box = in_pixels((left, top, right, bottom), width, height)
    assert 0 <= box[0] < box[2] <= width
    assert 0 <= box[1] < box[3] <= height
    assert in_pixels((0.0, 0, 1, 1), width, height) == (0, 0, width, height)


def test_boxes_belong_to_the_loras_in_their_order() -> None:
    found = concepts_of([], ["a.safetensors:0.5", "b.safetensors", "c.safetensors"], ["0,0,8,8", "none", "0,0,.5,1"])
    assert found == [
        Concept(name="a", lora="a.safetensors", weight=0.5, region=(0, 0, 8, 8)),
        Concept(name="b", lora="b.safetensors", weight=1.0),
        Concept(name="c", lora="c.safetensors", weight=1.0, region=(0.0, 0.0, 0.5, 1.0)),
    ]
    assert parse_concept("path=c.safetensors,region=0,0,.5,1").region == found[2].region
    with pytest.raises(ValueError, match="there are 1 --box for 2 --lora; give one for each"):
        concepts_of([], ["a.safetensors", "b.safetensors"], ["0,0,8,8"])
    with pytest.raises(ValueError, match="1 --box for 0 --lora"):
        concepts_of(["path=a.safetensors"], [], ["0,0,8,8"])


def test_a_bystander_has_no_path_and_is_called_by_its_class() -> None:
    other = parse_concept("role=bystander,class=old man,region=0,0,.5,1")
    assert other == Concept(name="other old man", role="bystander", class_word="old man", region=(0.0, 0.0, 0.5, 1.0))
    assert parse_concept("role=bystander,name=man").class_word == "man"


def test_several_paths_are_a_concept_whose_files_are_merged() -> None:
    found = parse_concept(f"path=loras/a.safetensors,path=playground:{STYLE}:0.7,merge=np,trigger=sks")
    files = ("loras/a.safetensors", f"playground:{STYLE}:0.7")
    assert found == Concept(name=f"a+{STYLE}", lora=files, merge="np", trigger="sks")
    for text, message in {
        "path=a.safetensors,path=": "path is missing",
        "path=a.safetensors,path=b.safetensors:inf": "the weight is inf; expected a number",
        "path=a.safetensors,merge=np": "merges one file; give lora a list of several",
        "path=a.safetensors,weight=30": "the weight reaches 30; .* any_weight=True",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_concept(text)
    assert parse_concept("path=a.safetensors,weight=30,any_weight=true").weight == 30
    assert parse_concept("path=a.safetensors,references=no").references is False
    with pytest.raises(ValueError, match=r"unknown method of merging 'tvs'.* did you mean 'tsv'"):
        check_lookups(
            Run(scene=Scene(prompt="-", concepts=(found.model_copy(update={"merge": "tvs"}),)), model="playground")
        )


def test_short_forms_make_the_image_of_the_long_ones(tmp_path: Path) -> None:
    prompt = ["--prompt", "a xlo bear and a qrt robot on grass", "--steps", 1, "--method", "regional"]
    prompt += ["--width", 64, "--height", 64]
    short = [
        "--lora",
        "playground:bear:0.8",
        "--box",
        "0,0.125,0.5,0.875",
        "--lora",
        "playground:robot",
        "--box",
        "32,0,64,64",
    ]
    full = "path=playground:{},trigger={},class={},weight={},region={}".format
    long = [
        "--concept",
        full("bear", "xlo", "bear", 0.8, "0:8:32:56"),
        "--concept",
        full("robot", "qrt", "robot", 1, "32,0,64,64"),
    ]
    for name, concepts in (("short", short), ("long", long)):
        result = call("run", "playground", *prompt, *concepts, "--out", tmp_path / name)
        assert (
            f"made by regional, 1 steps, {SCHEDULER}; to reproduce it: lora-compose replay {tmp_path / name}"
            in result.stderr
        )
    one, other = ((tmp_path / name / "0.png") for name in ("short", "long"))
    assert [c.region for c in read_record(one).run.scene.concepts] == [(0, 0.125, 0.5, 0.875), (32, 0, 64, 64)]
    assert read_pixels(one).tobytes() == read_pixels(other).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LoRAs of the playground, two of which are for cats."""
    (tmp_path / "loras").mkdir()
    for name in ("bear", "robot", "cat", "kitten"):
        shutil.copy(playground_lora(name), tmp_path / "loras")
    return tmp_path / "loras"


def test_the_prompt_chooses_among_the_loras_of_a_folder(folder: Path, tmp_path: Path) -> None:
    prompt = "a xlo bear and a robot and a cat on grass"
    asked = ["--prompt", prompt, "--loras", folder, "--method", "merge", "--steps", 1, "--width", 64, "--height", 64]
    said = flat(call("run", "playground", *asked, "--out", tmp_path / "out").stderr)
    assert "bear: by its trigger 'xlo'" in said
    assert "robot: by its class word 'robot', before which its trigger 'qrt' is written" in said
    assert "note: 'cat' may be cat ('sks cat'), kitten (" in said
    scene = read_record(tmp_path / "out/0.png").run.scene
    assert [concept.name for concept in scene.concepts] == ["bear", "robot"]
    assert scene.prompt == "a xlo bear and a qrt robot and a cat on grass"
    assert "identical" in call("replay", tmp_path / "out/0.png").output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "a house"], "the prompt names no concept; there are bear ('xlo bear'), cat ('sks cat')"),
        (["--prompt", "a xlo bear", "--lora", "playground:bear"], "with --loras the prompt chooses the concepts"),
        (["--loras", "none", "--prompt", "a xlo bear"], "there is no folder 'none'"),
    ],
)
def test_what_cannot_be_chosen_is_reported(folder: Path, tmp_path: Path, more: list[str], message: str) -> None:
    result = call("run", "playground", "--loras", folder, *more, "--steps", 1, "--out", tmp_path / "out", code=2)
    assert message in flat(result.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["batch assets/scenes/cat-dog.yaml --model playground", "evaluate playground-quick"]
)
@pytest.mark.parametrize(("address", "package"), [("local", "ray"), ("ray://10.0.0.1:10001", "grpc")])
def test_a_cluster_without_ray(
    command: str, address: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)  # any module that is there
    monkeypatch.setitem(sys.modules, package, None)
    told = flat(call(*command.split(), "--ray", address, "--out", tmp_path / "out", code=2).output)
    assert f"--ray {address} needs the package {package}: pip install 'lora-compose[ray]'" in told
    assert "pip install 'lora-compose[ray]'" in told
    assert not (tmp_path / "out").exists()
