"""Scene files, run files, and images that carry their record."""

import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_compose import Concept, Run, Scene
from lora_compose.compose.figures.sheets import Row, seeds_sheet, sheet
from lora_compose.compose.files.images import Machine, Record, read_pixels, read_record, save_image
from lora_compose.compose.files.paths import free_path
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.scenes import read_scene, write_scene
from lora_compose.compose.files.text import parse_value
from lora_compose.compose.generate.demo import PAIRS, THREE
from lora_compose.compose.page.form import EXAMPLE
from lora_compose.compose.support.terminal import plain
from lora_compose.pipelines.scene.sources import files_of, with_files

SHA = "0123456789abcdef" * 4
SCENE = "prompt: a sks cat\nconcepts:\n  - name: cat\n    lora: cat.safetensors\n    trigger: sks\n"


def record(run: Run, **changes: Any) -> Record:
    machine = Machine(device="cpu", name="x86_64", threads=1)
    return Record(run=run, versions={"torch": "2"}, sha256={"cat": SHA}, machine=machine).model_copy(update=changes)


def run_with(lora: str, **fields: Any) -> Run:
    scene = Scene(prompt="a sks cat", concepts=(Concept(name="cat", lora=lora, trigger="sks"),))
    return Run(scene=scene, model=fields.pop("model", "playground"), **fields)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def png(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key.replace("_", "-"), text)
    Image.new("RGB", (8, 8), "red").save(path, "PNG", pnginfo=info)
    return path


# --- what is written is read again ---

names = st.text(min_size=1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
loras = st.none() | st.sampled_from(
    ["playground:cat", "user/my-cat", "/loras/a b/cat.safetensors", "/loras/\u00fc.safetensors"]
)
concepts = st.builds(
    Concept, name=names, lora=loras, trigger=st.none() | st.text(), class_word=st.none() | st.text(),
    weight=st.none() | numbers | st.lists(numbers, min_size=1, max_size=4) | st.sampled_from(["1..0.4", "0:1,0.5:0"]),
    region=st.none() | st.just((0, 8, 64, 128)),
    blocks=st.none() | st.dictionaries(st.sampled_from(["down", "up.1", "mid_block", "text"]), numbers),
    any_weight=st.just(True),
)  # fmt: skip
scenes = st.builds(
    Scene, prompt=names, negative_prompt=st.text(),
    concepts=st.lists(concepts, max_size=3, unique_by=lambda concept: concept.name).map(tuple),
    width=st.none() | st.integers(64, 4096), height=st.none() | st.integers(128, 4096),
)  # fmt: skip
values = st.none() | st.booleans() | st.integers() | numbers | st.text()
runs = st.builds(
    Run, scene=scenes, model=st.sampled_from(["playground", "user/model", "/models/one"]), method=st.none() | names,
    settings=st.dictionaries(st.text(), values | st.lists(values, max_size=3), max_size=3), scheduler=st.none() | names,
    steps=st.integers(1, 1000), guidance_scale=numbers, seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]), device=st.none() | st.text(),
)  # fmt: skip


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@given(scene=scenes)
@example(scene=Scene(prompt="a\x85b", negative_prompt="\u2028 \ufeff\r\n\t \x00 \U0001f408 'no' \"yes\" # : -"))
def test_scenes_survive_a_file(tmp_path_factory: pytest.TempPathFactory, suffix: str, scene: Scene) -> None:
    path = tmp_path_factory.getbasetemp() / f"scene.{suffix}"
    write_scene(scene, path, overwrite=True)
    assert read_scene(path) == scene


@given(run=runs)
def test_records_survive_an_image(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    written = record(run, sha256={concept.name: SHA for concept in run.scene.concepts})
    path = save_image(Image.new("RGB", (8, 8)), tmp_path_factory.mktemp("image") / "1.png", written)
    assert read_record(path) == written


def test_the_shipped_scenes_can_be_read() -> None:
    folder = Path(__file__).resolve().parents[3] / "assets/scenes"
    scenes = {path.stem: read_scene(path) for path in folder.glob("*.yaml")}
    assert scenes.keys() >= {*PAIRS, THREE, EXAMPLE[0]}
    assert all(concept.phrase in scene.prompt for scene in scenes.values() for concept in scene.concepts)


# --- paths ---


def test_relative_loras_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/one.yaml").write_text(SCENE)
    monkeypatch.chdir(tmp_path)
    for path in (Path("scenes/one.yaml"), tmp_path / "scenes/one.yaml"):
        assert read_scene(path).concepts[0].lora == str(tmp_path / "scenes/cat.safetensors")


def test_written_scenes_can_be_moved_with_their_loras(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write_scene(run_with(str(here / "loras/cat.safetensors")).scene, here / "one.yaml")
    assert "lora: loras/cat.safetensors" in (here / "one.yaml").read_text()
    here.rename(there)
    assert read_scene(there / "one.yaml").concepts[0].lora == str(there / "loras/cat.safetensors")


def test_paths_of_several_files_move_with_their_weights(tmp_path: Path) -> None:
    several = "[cat.safetensors, ./style.safetensors:0.7, 'playground:bear:-1']\n    merge: np"
    (tmp_path / "one.yaml").write_text(SCENE.replace("cat.safetensors", several))
    (found,) = read_scene(tmp_path / "one.yaml").concepts
    assert found.lora == (f"{tmp_path}/cat.safetensors", f"{tmp_path}/style.safetensors:0.7", "playground:bear:-1.0")
    write_scene(Scene(prompt="a sks cat", concepts=(found,)), tmp_path / "two.yaml")
    assert read_scene(tmp_path / "two.yaml").concepts == (found,)
    assert str(tmp_path) not in (tmp_path / "two.yaml").read_text()


def test_a_name_that_ends_in_a_number_keeps_it() -> None:
    assert with_files(("a:0.5", "b"), ["c", "d:2"]) == ("c:0.5", "d:2:1.0")
    assert files_of("only.safetensors:0.5") == ("only.safetensors:0.5",)


@pytest.mark.parametrize("source", ["playground:cat-tara", "user/my-cat-lora"])
def test_names_are_not_taken_for_paths(tmp_path: Path, source: str) -> None:
    (tmp_path / "one.yaml").write_text(SCENE.replace("cat.safetensors", source))
    assert read_scene(tmp_path / "one.yaml").concepts[0].lora == source


def test_a_folder_that_reads_like_a_repository_is_a_folder_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "loras/cat").mkdir(parents=True)
    (tmp_path / "one.yaml").write_text(SCENE.replace("cat.safetensors", "loras/cat"))
    scene = read_scene(tmp_path / "one.yaml")
    assert scene.concepts[0].lora == str(tmp_path / "loras/cat")
    write_scene(scene, tmp_path / "two.yaml")
    assert read_scene(tmp_path / "two.yaml") == scene


def test_records_hold_absolute_paths_without_the_users_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a-person"))
    (tmp_path / "a-person/loras").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a-person/loras")
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "out/1.png", record(run_with("cat.safetensors")))
    assert b"~/loras/cat.safetensors" in path.read_bytes()
    assert b"a-person" not in path.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert read_record(path).run.scene.concepts[0].lora == str(tmp_path / "a-person/loras/cat.safetensors")


# --- what cannot be read ---

WRONG = {
    "not yaml": ("a.yaml", "prompt: [a\nb: c", r"a\.yaml, line 2, column \d+: not valid YAML"),
    "not json": ("a.json", '{"prompt": "a",\n}', r"a\.json, line 2, column \d+: not valid JSON"),
    "a list": (
        "a.yaml",
        "- a\n- b\n",
        r"expected prompt, negative_prompt, concepts, width, height, image, .*found a list \(2 ",
    ),
    "nothing": ("a.yaml", "", "found nothing"),
    "no prompt": ("a.yaml", "width: 64", "a.yaml: prompt: is missing"),
    "unknown field": (
        "a.yaml",
        SCENE + "    wieght: 2\n",
        r"concepts\[0\].wieght: unknown field; fields are name, lora",
    ),
    "a field twice": ("a.yaml", "prompt: a\nprompt: b\n", "'prompt' is given twice"),
    "a field twice in json": ("a.json", '{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
    "true for a word": ("a.yaml", "prompt: yes\n", "prompt: expected a valid string, found True; put it in quotes"),
    "a date": ("a.yaml", "prompt: 2020-02-02\n", "expected a valid string, found datetime.*put it in quotes"),
    "an impossible date": ("a.yaml", "prompt: 2020-13-45\n", "not valid YAML"),
    "words for a number": (
        "a.yaml",
        SCENE + "    weight: much\n",
        r"concepts\[0\].weight: expected a valid number.*found 'much'",
    ),
    "not a number": ("a.json", '{"prompt": "a", "width": NaN}', "NaN is not a number"),
    "a broken region": (
        "a.yaml",
        SCENE + "    region: [9, 0, 3, 4]\n",
        r"concepts\[0\].region: a region is \(left, top,",
    ),
    "a region outside": ("a.yaml", SCENE + "    region: [0, 0, 99, 9]\nwidth: 64\n", "leaves the canvas"),
    "the same name twice": ("a.yaml", SCENE + "  - name: cat\n", "'cat' stands twice"),
    "an alias": ("a.yaml", "prompt: &x a\nnegative_prompt: *x\n", r"line 2.*aliases \(\*name\) are not read"),
    "a tag that runs code": (
        "a.yaml",
        "prompt: !!python/object/apply:os.system [exit]\n",
        "could not determine a constructor",
    ),
    "deep yaml": ("a.yaml", "[" * 5000, "not valid YAML"),
    "deep json": ("a.json", "[" * 200_000, "nested too deeply"),
    "a mapping as a key": ("a.yaml", "? {a: b}\n: c\n", "not valid YAML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_file_the_position_and_what_was_expected(tmp_path: Path, name: str) -> None:
    file, text, message = WRONG[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(FileError, match=message) as caught:
        read_scene(tmp_path / file)
    assert str(tmp_path / file) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SCENE + "    weight: much\n  - lora: x\nwidth: -3\n")
    with pytest.raises(FileError) as caught:
        read_scene(tmp_path / "a.yaml")
    places = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert places == ["concepts[0].weight", "concepts[1].name", "width"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"prompt: \xff"), "line 1: not UTF-8 text: 0xff"),
        (lambda path: path.write_bytes(b"#" * (2**20 + 1)), "larger than 1048576 bytes"),
    ],
)
def test_unreadable_files(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "a.yaml")
    with pytest.raises(FileError, match=message):
        read_scene(tmp_path / "a.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfprompt: a cat\n")
    assert read_scene(tmp_path / "a.yaml").prompt == "a cat"


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SCENE)
    with pytest.raises(FileError, match=r"ends with \.yaml, \.yml, \.json"):
        read_scene(tmp_path / "a.txt")
    with pytest.raises(FileError, match=r"ends with \.yaml, \.yml, \.json"):
        write_scene(Scene(prompt="a"), tmp_path / "b.txt")
    assert not (tmp_path / "b.txt").exists()


def test_scene_files_are_not_overwritten_by_default(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# by hand\n" + SCENE)
    with pytest.raises(FileError, match="exists already"):
        write_scene(Scene(prompt="another"), tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text().startswith("# by hand")
    assert listed(tmp_path) == ["a.yaml"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("broadcast", "broadcast"),
        ("8", 8),
        ("0.5", 0.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("", None),
        ("a: b", {"a": "b"}),
    ],
)
def test_values_are_read_as_yaml(text: str, value: object) -> None:
    assert parse_value(text) == value


# --- images ---


def test_images_are_never_overwritten(tmp_path: Path) -> None:
    colours = ["red", "green", "blue"]
    paths = [save_image(Image.new("RGB", (8, 8), colour), tmp_path / "1.png") for colour in colours]
    assert [path.name for path in paths] == ["1.png", "1-2.png", "1-3.png"]
    for path, colour in zip(paths, colours, strict=True):
        assert read_pixels(path).getpixel((0, 0)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))


def test_a_link_that_leads_nowhere_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "1.png").symlink_to(tmp_path / "elsewhere.png")
    assert save_image(Image.new("RGB", (8, 8)), tmp_path / "1.png") == tmp_path / "1-2.png"
    assert not (tmp_path / "elsewhere.png").exists()


def test_without_hard_links_images_are_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr("lora_compose.compose.files.atomic.os.link", refuse)
    paths = [save_image(Image.new("RGB", (8, 8)), tmp_path / "1.png") for _ in range(2)]
    assert listed(tmp_path) == sorted(path.name for path in paths) == ["1-2.png", "1.png"]


def test_another_process_that_was_faster_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([tmp_path / "1.png", tmp_path / "1-2.png"])
    monkeypatch.setattr("lora_compose.compose.files.images.free_path", lambda path: next(answers))
    (tmp_path / "1.png").write_text("theirs")
    assert save_image(Image.new("RGB", (8, 8)), tmp_path / "1.png") == tmp_path / "1-2.png"
    assert (tmp_path / "1.png").read_text() == "theirs"


def test_free_path_counts_up(tmp_path: Path) -> None:
    assert free_path(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_path(tmp_path / "demo") == tmp_path / "demo-3"


def test_records_have_no_place_for_anything_else(tmp_path: Path) -> None:
    data = record(run_with("cat.safetensors")).model_dump(mode="json")
    wrong = {
        "extra": ({**data, "code": "x"}, r"its record: code: unknown field; fields are run, versions"),
        "hash": ({**data, "sha256": {"cat": "../../x"}}, r"sha256\.cat"),
        "threads": ({**data, "machine": {**data["machine"], "threads": 0}}, r"machine\.threads"),
        "run": ({**data, "run": {"scene": {}}}, r"run\.scene\.prompt: is missing"),
        "seed": ({**data, "run": {**data["run"], "seed": -1}}, r"run\.seed"),
        "list": ([data], "found a list"),
    }
    for name, (content, message) in wrong.items():
        path = png(tmp_path / f"{name}.png", lora_compose=json.dumps(content))
        with pytest.raises(FileError, match=message):
            read_record(path)


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", "null", "[" * 100_000, '{"run": NaN}', "\u00ff" * 50])
def test_garbage_in_place_of_a_record(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileError, match=r"1\.png"):
        read_record(png(tmp_path / "1.png", lora_compose=text))


def test_images_of_others_have_no_record(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="has no record of lora-compose"):
        read_record(png(tmp_path / "1.png", parameters="a cat, Steps: 20"))
    with pytest.raises(FileError, match="there is no file"):
        read_record(tmp_path / "none.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    (tmp_path / "text.png").write_text("hello")
    for name in ("1.jpg", "text.png"):
        with pytest.raises(FileError, match="not a readable PNG"):
            read_record(tmp_path / name)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(path: Path, *chunks: bytes) -> Path:
    """A PNG with chunks put in after its header."""
    data = png(path).read_bytes()
    path.write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return path


def test_a_record_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = with_chunks(tmp_path / "1.png", chunk(b"tEXt", b"lora-compose\0" + b"x" * (8 * 2**20 + 1)))
    with pytest.raises(FileError, match="at most 8388608 are read"):
        read_record(path)


def test_compressed_text_cannot_blow_up(tmp_path: Path) -> None:
    bomb = zlib.compress(b"x" * (200 * 2**20))
    path = with_chunks(tmp_path / "1.png", chunk(b"zTXt", b"lora-compose\0\0" + bomb))
    with pytest.raises(FileError, match=r"not a readable PNG.*too large"):
        read_record(path)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"tEXt", b"no separator")],
        [chunk(b"iTXt", b"lora-compose\0\0\0\0\0\xff\xfe")],
        [chunk(b"zTXt", b"lora-compose\0\0not zlib")],
        [chunk(b"tEXt", b"lora-compose\0{}")[:-4] + b"\0\0\0\0"],
        [b"\xff\xff\xff\xfftEXt"],
        [b"\0\0\0\1\0\0\0\0\0"],
    ],
)
def test_broken_chunks_are_refused_with_a_clear_error(tmp_path: Path, chunks: list[bytes]) -> None:
    with pytest.raises(FileError, match=r"1\.png"):
        read_record(with_chunks(tmp_path / "1.png", *chunks))


@given(data=st.data())
def test_a_damaged_image_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes are changed, and chunks of every kind put in with any content, with the right sum for it."""
    path = png(tmp_path_factory.getbasetemp() / "damaged.png", lora_compose="{}")
    whole = path.read_bytes()
    kinds = st.sampled_from([whole[at + 4 : at + 8] for at in _chunks(whole)] + OPTIONAL_CHUNKS)
    for at in data.draw(st.lists(st.sampled_from(_chunks(whole)[1:]), max_size=3).map(lambda at: sorted(at)[::-1])):
        whole = whole[:at] + chunk(data.draw(kinds), data.draw(st.binary(max_size=32))) + whole[at:]
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=2)):
        whole = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    path.write_bytes(whole)
    for read in (read_record, read_pixels):
        with suppress(FileError):
            read(path)


OPTIONAL_CHUNKS = [b"tEXt", b"iTXt", b"zTXt", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tRNS", b"PLTE", b"acTL",
                   b"fcTL", b"fdAT", b"eXIf"]  # fmt: skip


def _chunks(data: bytes) -> list[int]:
    """Where the chunks of a PNG begin."""
    found = [8]
    while (after := found[-1] + 12 + int.from_bytes(data[found[-1] : found[-1] + 4], "big")) < len(data):
        found.append(after)
    return found


def test_a_chunk_that_ends_too_early_behind_the_pixels_is_refused(tmp_path: Path) -> None:
    path = png(tmp_path / "1.png")
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk(b"iCCP", b"\0") + data[-12:])
    with pytest.raises(FileError, match=r"1\.png is not a readable PNG"):
        read_pixels(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
@pytest.mark.parametrize("read", [read_record, read_pixels, lambda path: read_scene(path.rename(f"{path}.yaml"))],
                         ids=["record", "pixels", "scene"])  # fmt: skip
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, read: Any, make: Any) -> None:
    path = tmp_path / "1.png"
    make(path)
    said: list[str] = []

    def reading() -> None:
        try:
            read(path)
        except FileError as error:
            said.append(str(error))

    thread = threading.Thread(target=reading, daemon=True)
    thread.start()
    thread.join(5)
    assert said, "it waits"
    assert "not a regular file" in said[0]


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    path = save_image(Image.effect_noise((64, 64), 50), tmp_path / "1.png", record(run_with("cat.safetensors")))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError, match="truncated or damaged"):
        read_pixels(path)


def test_an_image_with_too_many_pixels_is_not_unpacked(tmp_path: Path) -> None:
    path = png(tmp_path / "1.png")
    data = path.read_bytes()
    header = struct.pack(">II", 50_000, 1_500) + data[24:29]
    path.write_bytes(data[:8] + chunk(b"IHDR", header) + data[33:])
    with pytest.raises(FileError, match="too many"):
        read_pixels(path)


# --- sheets ---


def test_sheets_show_every_image_at_its_place() -> None:
    colours = [["red", "green"], ["blue", "black"]]
    rows = [
        Row((f"row {i}",), [Image.new("RGB", (8, 8), c) for c in line], parted=True) for i, line in enumerate(colours)
    ]
    drawn = sheet([("one",), ("two", "second line")], rows, title="Title", lines=["below"], side=64)
    counts: dict[Any, int] = {colour: count for count, colour in drawn.getcolors(maxcolors=2**24) or []}
    for colour in ("red", "green", "blue", "black"):
        assert counts[Image.new("RGB", (1, 1), colour).getpixel((0, 0))] >= 64 * 64
    assert drawn.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("text", ["", "\u732b and \U0001f408", "line\nbreak", "\x1b[31mred", "w" * 500])
def test_sheets_take_any_text(text: str) -> None:
    images = {seed: Image.new("RGB", (32, 64)) for seed in range(7)}
    drawn = seeds_sheet(images, text, [text])
    assert drawn.height > 2 * 256


def test_a_title_that_is_wider_than_the_images_is_whole() -> None:
    image = Image.new("RGB", (32, 32), "white")
    drawn = seeds_sheet({0: image}, "a bear and a robot on a white background in snow", [])
    assert drawn.crop((drawn.width - 24, 0, drawn.width, drawn.height)).getcolors() == [(24 * drawn.height, (255,) * 3)]


def test_text_cannot_steer_the_terminal() -> None:
    assert plain("a\x1b[2Jb\u202ec\r\u2028") == "a\\x1b[2Jb\\u202ec\\r\\u2028"
    assert plain("\u732b [bold] a\nb") == "\u732b [bold] a\nb"
