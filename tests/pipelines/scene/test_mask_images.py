"""Image files that users give: opened upright, and judged by their headers."""

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lora_compose.compose.page.store import Store
from lora_compose.pipelines.images.images import read_images
from lora_compose.pipelines.scene.mask_images import open_image, read_mask_image


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_images_and_masks_are_turned_as_their_exif_data_say(tmp_path: Path, suffix: str) -> None:
    wide, exif = Image.new("L", (32, 16)), Image.Exif()
    wide.paste(255, (0, 0, 16, 16))
    exif[0x0112] = 6  # turned by a quarter
    wide.save(path := tmp_path / f"it{suffix}", exif=exif)
    image, mask = read_images(path), read_mask_image(path, (16, 32))
    assert isinstance(image, list)
    for one in (image[0].convert("L"), mask):
        assert one.size == (16, 32)
        assert [one.getpixel((8, y)) for y in (4, 28)] == [255, 0]
    with path.open("rb") as file:
        kept = Store().add_image(path.name, file, 1024)
    assert kept.size == (16, 32)


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG, without pixels."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


@pytest.mark.parametrize("size", [(1, 30_000_000), (60_000_000, 1), (9_000, 9_000)])
def test_sizes_are_judged_by_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "it.png"
    path.write_bytes(png(*size))
    with pytest.raises(ValueError, match=f"it has {size[0]} x {size[1]} pixels; expected at most"):
        open_image(path, "image")


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "it.webp"
    with path.open("wb") as file:
        file.truncate(8 << 30)  # with holes: it takes no space
    with pytest.raises(ValueError, match="it has 8589934592 bytes; expected at most"):
        open_image(path, "mask")
