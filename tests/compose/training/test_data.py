"""Images and captions that are read for training."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_compose.compose.playground.assets import playground_references
from lora_compose.compose.training.data import (
    DataError,
    digest,
    load_image,
    pixels_of,
    read_images,
    square,
    warn_of_small,
)
from small_world import SIZE
from trainings import paint_folder


def test_captions_come_from_the_table_or_from_beside_or_are_the_prompt(tmp_path: Path) -> None:
    folder = paint_folder(tmp_path, 4)
    (folder / "captions.tsv").write_text("0.png\ta sks cat\t1 2 3\n\n2.png\tthe  sks cat\n", encoding="utf-8")
    (folder / "1.txt").write_text("a sks cat\nin snow\n", encoding="utf-8")
    (folder / "notes.md").write_text("no image")
    found = read_images(folder, ["first", "second", "third", "fourth"])
    assert [image.caption for image in found] == ["a sks cat", "a sks cat in snow", "the sks cat", "fourth"]
    assert [image.path.name for image in found] == ["0.png", "1.png", "2.png", "3.png"]


def test_images_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = paint_folder(tmp_path, 11)
    assert [image.path.stem for image in read_images(folder, ["x"])] == [str(i) for i in range(11)]


def test_the_references_of_the_playground_are_read() -> None:
    folder = playground_references("cat")[0].parent
    found = read_images(folder, ["x"])
    lines = (folder / "captions.tsv").read_text(encoding="utf-8").splitlines()
    assert [f"{image.path.name}\t{image.caption}" for image in found] == [line.rpartition("\t")[0] for line in lines]
    assert {image.size for image in found} == {(SIZE, SIZE)}


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("0.png a sks cat", "line 1: expected a file name, a tab and a caption"),
        ("0.png\ta\n0.png\tb", "line 2: 0.png has a caption already"),
        ("0.png\t  \t1 2", "line 1: expected"),
    ],
)
def test_broken_tables_are_refused_with_the_line(tmp_path: Path, lines: str, complaint: str) -> None:
    folder = paint_folder(tmp_path, 1)
    (folder / "captions.tsv").write_text(lines)
    with pytest.raises(DataError, match=complaint):
        read_images(folder, ["x"])


def test_captions_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = paint_folder(tmp_path, 1)
    (folder / "0.txt").write_bytes(b"a \xff cat")
    with pytest.raises(DataError, match=r"0\.txt is not UTF-8 text: byte 2 is 0xff"):
        read_images(folder, ["x"])


def test_captions_of_missing_images_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = paint_folder(tmp_path, 1)
    (folder / "captions.tsv").write_text("0.png\ta\n9.png\tb\n../1.png\tc\n")
    assert len(read_images(folder, ["x"])) == 1
    assert "images that are not there: ../1.png, 9.png" in caplog.text


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images; expected files that end with \.png, \.jpg"):
        read_images(tmp_path, ["x"])
    with pytest.raises(DataError, match="there is no folder"):
        read_images(tmp_path / "nowhere", ["x"])


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
def test_a_broken_image_is_named(tmp_path: Path, how: str) -> None:
    path = paint_folder(tmp_path, 3) / "1.png"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[how])
    with pytest.raises(DataError, match=r"1\.png is not a readable image"):
        read_images(tmp_path, ["x"])


def test_images_are_turned_upright_and_put_on_white(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    Image.new("P", (8, 8)).save(tmp_path / "palette.png")
    assert load_image(tmp_path / "palette.png").mode == "RGB"


def test_the_middle_of_an_image_is_taken() -> None:
    columns = np.zeros((20, 60, 3), "u1")
    columns[:, 20:40] = 255
    image, cut = square(Image.fromarray(columns), 20)
    assert image.size == (20, 20)
    assert cut == (0, 20)
    assert torch.equal(pixels_of(image), torch.ones(1, 3, 20, 20))
    tall, cut = square(Image.fromarray(columns).rotate(90, expand=True), 40)
    assert (tall.size, cut) == ((40, 40), (40, 0))
    assert pixels_of(tall).min() >= -1


def test_small_images_are_enlarged_and_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = paint_folder(tmp_path, 2, (24, 50))
    Image.new("RGB", (64, 64)).save(folder / "large.png")
    found = read_images(folder, ["x"])
    warn_of_small(found, 32)
    assert "2 of 3 images are smaller than 32 x 32" in caplog.text
    assert "0.png, 1.png" in caplog.text
    assert square(load_image(found[0].path), 32)[0].size == (32, 32)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        warn_of_small(found, 24)
    assert caplog.text == ""


def test_the_digest_sees_images_captions_and_nothing_else(tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "a", 2)
    before = digest(read_images(folder, ["x"]))
    assert digest(read_images(paint_folder(tmp_path / "b", 2), ["x"])) == before
    assert digest(read_images(folder, ["y"])) != before
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    assert digest(read_images(folder, ["x"])) != before
