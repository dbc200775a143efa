"""Regions drawn as mask images."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components import State
from lora_compose.attention import grid_at
from lora_compose.attention.masks import box_mask
from lora_compose.compose.commands.asked import parse_concept
from lora_compose.compose.files.scenes import read_scene, write_scene
from lora_compose.pipelines.scene.regions import Regions, check_mask, read_mask, region_mask
from lora_compose.pipelines.scene.scene import Concept, Scene

BOX = (32, 16, 96, 128)


def drawn(path: Path, box: tuple[int, int, int, int] = BOX, size: tuple[int, int] = (128, 128)) -> str:
    image = Image.new("L", size)
    image.paste(255, box)
    image.save(path)
    return str(path)


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (4, 4), (3, 5)])
def test_a_drawn_box_is_the_box(tmp_path: Path, grid: tuple[int, int]) -> None:
    mask = region_mask(drawn(tmp_path / "mask.png"), (128, 128), grid)
    if all(128 % side == 0 for side in grid):
        assert torch.allclose(mask, box_mask(BOX, (128, 128), grid), atol=1e-6)
    assert mask.shape == grid
    assert mask.max() == 1


def test_a_mask_of_another_size_means_the_same_place(tmp_path: Path) -> None:
    small = drawn(tmp_path / "small.png", (8, 4, 24, 32), (32, 32))
    assert torch.allclose(region_mask(small, (128, 128), (8, 8)), box_mask(BOX, (128, 128), (8, 8)), atol=1e-6)


def test_opacity_counts_where_there_is_any(tmp_path: Path) -> None:
    image = Image.new("RGBA", (10, 10), (255, 255, 255, 0))
    image.paste((0, 0, 0, 255), (0, 0, 5, 10))
    image.save(tmp_path / "mask.png")
    mask = read_mask(str(tmp_path / "mask.png"))
    assert mask[:, :5].min() == 1
    assert mask[:, 5:].max() == 0


def test_a_black_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is black all over"):
        read_mask(drawn(tmp_path / "mask.png", (0, 0, 0, 0)))


def test_a_missing_mask_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no mask '.*lost.png'"):
        read_mask(str(tmp_path / "lost.png"))


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot be read"):
        read_mask(str(tmp_path / "mask.png"))


def test_a_device_is_no_mask(tmp_path: Path) -> None:
    (tmp_path / "mask.png").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="cannot be read: it is not a regular file"):
        read_mask(str(tmp_path / "mask.png"))


def test_a_damaged_mask_is_refused(tmp_path: Path) -> None:
    data = Path(drawn(tmp_path / "mask.png")).read_bytes()
    body = b"iCCP\0"  # a profile that ends before it begins, behind the pixels
    profile = (1).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    (tmp_path / "mask.png").write_bytes(data[:-12] + profile + data[-12:])
    with pytest.raises(ValueError, match="cannot be read"):
        read_mask(str(tmp_path / "mask.png"))


@pytest.mark.parametrize("quality", [30, 95])
def test_the_cells_of_a_mask_do_not_depend_on_how_bright_it_is(tmp_path: Path, quality: int) -> None:
    """A photograph of a mask: not all of the white is white, and not all of the black is black."""
    noise = np.random.default_rng(0).integers(0, 20, (128, 128))
    drawing = np.where(np.asarray(Image.open(drawn(tmp_path / "mask.png"))) > 0, 230 + noise, noise)
    drawing[64, 64] = 255
    path = str(tmp_path / "mask.jpg")
    Image.fromarray(drawing.astype("u1")).save(path, quality=quality)
    assert len(np.unique(np.asarray(Image.open(path)))) > 4
    found, expected = (Regions.of([region], (128, 128), (16, 16), range(4), 1.0) for region in (path, BOX))
    for level, cells in expected.cells.items():
        assert torch.equal(found.cells[level], cells)
    assert region_mask(path, (128, 128), (16, 16)).unique().numel() > 4, "as a soft mask it keeps its greys"


def test_half_of_the_highest_value_is_the_border_of_a_sharp_mask(tmp_path: Path) -> None:
    drawing = np.zeros((8, 8), dtype="u1")
    drawing[:, 2:4], drawing[:, 4:6], drawing[:, 6:] = 49, 50, 100
    Image.fromarray(drawing).save(tmp_path / "mask.png")
    (cells,) = Regions.of([str(tmp_path / "mask.png")], (64, 64), (8, 8), [0], 1.0).cells.values()
    assert torch.equal(cells[..., 0], torch.arange(8).expand(8, 8) >= 4)


# A box of the scenes that the authors of LoRA-Composer (arXiv 2403.11627) published, a pixel from the lower border.
PUBLISHED = (290, 375, 490, 767)


@pytest.mark.parametrize(("level", "rows", "columns"), [(2, (12, 23), (10, 15)), (3, (6, 11), (5, 7))])
def test_regions_of_a_published_box_are_as_published(
    level: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    boxes = [PUBLISHED, None, (0, 0, 1024, 768), (0, 0, 1023, 767)]
    regions = Regions.of(boxes, (768, 1024), (96, 128), [0, 2, 3], 1.0)
    assert regions.indices == (0, 2, 3)
    box, canvas, nearly = regions.cells[level].unbind(dim=-1)
    expected = torch.zeros_like(box)
    expected[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal(box, expected)
    assert canvas.all()
    assert nearly[:-1, :-1].all()
    assert not nearly[-1].any()
    assert not nearly[:, -1].any()


@pytest.mark.parametrize("box", [(13, 40, 135, 201), (0, 0, 100, 90), (97, 1, 136, 104), (8, 8, 16, 16)])
def test_coarse_cells_of_a_region_are_blocks_that_lie_in_it_altogether(box: tuple[int, int, int, int]) -> None:
    """On a canvas of 27 x 17 latents, which no grid divides: the last blocks are smaller."""
    height, width = 27, 17
    regions = Regions.of([box], (height * 8, width * 8), (height, width), range(4), 1.0)
    pixels = np.zeros((height * 8, width * 8), dtype=bool)
    pixels[box[1] : box[3], box[0] : box[2]] = True
    painted = np.array(
        [[pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].all() for x in range(width)] for y in range(height)]
    )
    for level, cells in regions.cells.items():
        side = 2**level
        share = np.array([
            [painted[y : y + side, x : x + side].mean() for x in range(0, width, side)] for y in range(0, height, side)
        ])  # fmt: skip
        inside = share == 1
        if inside.any():
            assert np.array_equal(cells[..., 0].numpy(), inside)
        else:  # the best covered cell stays
            assert cells[..., 0].any()
            assert (share[cells[..., 0].numpy()] > 0).all()


def test_other_proportions_than_the_canvas_are_refused(tmp_path: Path) -> None:
    path = drawn(tmp_path / "mask.png", size=(128, 64))
    with pytest.raises(ValueError, match="128 x 64 pixels, the canvas 128 x 128: their proportions differ"):
        check_mask(path, 128, 128)
    check_mask(path, 256, 128)


def test_a_drawn_half_makes_the_image_of_a_box(playground, tmp_path: Path) -> None:
    left, right = (0, 0, 32, 64), (32, 0, 64, 64)
    masks = tuple(drawn(tmp_path / f"{box[0]}.png", box, (64, 64)) for box in (left, right))
    images = [
        playground(
            "a xlo bear and a qrt robot on grass",
            concepts=[
                Concept(name="bear-ordinary", trigger="xlo", region=regions[0]),
                Concept(name="robot-ordinary", trigger="qrt", region=regions[1]),
            ],
            method="regional", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent",
            width=64, height=64,
        ).images
        for regions in ((left, right), masks, (right, left))
    ]  # fmt: skip
    assert torch.allclose(images[0], images[1], atol=1e-4)
    assert not torch.allclose(images[0], images[2], atol=1e-2)


def test_a_bad_mask_is_refused_before_anything_is_changed(playground, tmp_path: Path) -> None:
    before = State(playground)
    wide = drawn(tmp_path / "wide.png", size=(128, 64))
    for path, message in ((str(tmp_path / "lost.png"), "there is no mask"), (wide, "their proportions differ")):
        concept = Concept(name="bear-ordinary", trigger="xlo", region=path)
        with pytest.raises(ValueError, match=message):
            playground("a xlo bear", concepts=[concept], method="regional", num_inference_steps=1)
    before.assert_unchanged()


def test_masks_in_scene_files_are_relative_to_them(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    path = drawn(tmp_path / "masks/cat.png")
    scene = Scene(prompt="a sks cat", concepts=(Concept(name="cat", lora="playground:cat", region=path),))
    write_scene(scene, tmp_path / "scene.yaml")
    assert "masks/cat.png" in (tmp_path / "scene.yaml").read_text(encoding="utf-8")
    assert str(tmp_path) not in (tmp_path / "scene.yaml").read_text(encoding="utf-8")
    assert read_scene(tmp_path / "scene.yaml") == scene


def test_a_mask_can_be_named_on_the_command_line() -> None:
    assert parse_concept("path=cat.safetensors,region=masks/cat.png").region == "masks/cat.png"
    assert parse_concept("path=cat.safetensors,region=0:0:64:128").region == (0, 0, 64, 128)
    with pytest.raises(ValueError, match="or a mask image"):
        parse_concept("path=cat.safetensors,region=left")


def test_greys_are_parts(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 51, dtype="u1")).save(tmp_path / "mask.png")
    assert read_mask(str(tmp_path / "mask.png")).unique().tolist() == pytest.approx([0.2])


# Parts of the canvas


@given(st.data(), st.integers(0, 3), st.floats(0, 20))
def test_windows_hold_their_region_and_lie_on_the_canvas(data: st.DataObject, levels: int, side: float) -> None:
    canvas = tuple(data.draw(st.integers(1, 40)) for _ in range(2))
    starts = [data.draw(st.integers(0, length - 1)) for length in canvas]
    box = [
        slice(start, data.draw(st.integers(start + 1, length))) for start, length in zip(starts, canvas, strict=True)
    ]
    region = torch.zeros(*canvas, 1, dtype=torch.bool)
    region[box[0], box[1]] = True
    regions = Regions((0,), {0: region, levels: region[:: 2**levels, :: 2**levels]})  # the coarsest grid says how often
    for window, inside, length in zip(regions.window(0, side), box, canvas, strict=True):
        assert 0 <= window.start <= inside.start
        assert inside.stop <= window.stop <= length
        assert window.stop - window.start >= min(side, length)
        assert window.start % 2**levels == 0
        assert window.stop % 2**levels == 0 or window.stop == length


@given(st.data(), st.integers(0, 3), st.floats(0, 20), st.sampled_from([0.0, 0.5, 1.0]))
def test_windows_hold_their_region_on_every_grid(
    data: st.DataObject, levels: int, side: float, threshold: float
) -> None:
    height, width = (data.draw(st.integers(1, 40)) for _ in range(2))
    left, top = data.draw(st.integers(0, width * 8 - 1)), data.draw(st.integers(0, height * 8 - 1))
    box = left, top, data.draw(st.integers(left + 1, width * 8)), data.draw(st.integers(top + 1, height * 8))
    size = height * 8, width * 8
    regions = Regions.of([None, box], size, (height, width), range(levels + 1), threshold)
    window = regions.window(0, side)
    part = regions.part(window, 0)
    for level, cells in part.cells.items():
        assert cells.sum() == regions.cells[level].sum() > 0
        assert cells.shape[:2] == grid_at(part.grid, level)
