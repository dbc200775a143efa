"""Sheets: images in rows and columns with labels, on white."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lora_compose.compose.figures.overlay import Attention, draft_heat, heat, masks
from lora_compose.compose.support.terminal import plain
from lora_compose.pipelines.scene.scene import Run

_MARGIN, _GAP = 24, 12
_TITLE, _LINE = 44, 26  # heights of text
_INK, _FAINT, _RULE = "#1a1a1a", "#6b6b6b", "#d9d9d9"


@dataclass(frozen=True)
class Row:
    """A row of images, one for every column, with lines of text to the left, the first larger, and captions above.

    A parted row is set apart from the row above by a line.
    """

    label: Sequence[str]
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()
    parted: bool = False


def sheet(
    columns: Sequence[Sequence[str]],
    rows: Sequence[Row],
    *,
    title: str = "",
    lines: Sequence[str] = (),
    side: int = 256,
) -> Image.Image:
    """Draws images in rows; the first line of text above each column is larger, and `lines` stand below the title.

    `side` is the longer side of an image on the sheet, in pixels. Small images are enlarged without blur.
    """
    labels = max((_width(text, i) for row in rows for i, text in enumerate(row.label)), default=0)
    cell = _fitted(rows[0].images[0].size, side)
    left = _MARGIN + (labels + 2 * _GAP if labels else 0)
    across = left + len(columns) * (cell[0] + _GAP) - _GAP
    headings = [_title_font().getlength(plain(title)), *(_width(line, 1) for line in lines)]
    wide = max(across, _MARGIN + math.ceil(max(headings)))
    header = _MARGIN + (_TITLE if title else 0) + _LINE * len(lines) + (_GAP if title or lines else 0)
    top = header + _LINE * max((len(column) for column in columns), default=0) + _GAP
    canvas = Image.new("RGB", (wide + _MARGIN, top + sum(_height(row, cell) for row in rows) + _MARGIN - _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    _heading(draw, title, lines)
    for i, column in enumerate(columns):
        _text(draw, (left + i * (cell[0] + _GAP), header), column, cell[0])
    for row in rows:
        _row(canvas, row, (left, top), cell, labels)
        top += _height(row, cell)
    return canvas


def seeds_sheet(images: Mapping[int, Image.Image], title: str, lines: Sequence[str]) -> Image.Image:
    """Images that differ in their seed only, at most five in a row."""
    seeds = list(images)
    across = min(5, len(seeds))
    parts = [seeds[start : start + across] for start in range(0, len(seeds), across)]
    rows = [Row((), [images[seed] for seed in part], [f"seed {seed}" for seed in part]) for part in parts]
    side = min(512, max(256, *images[seeds[0]].size))
    return sheet([()] * across, rows, title=title, lines=lines, side=side)


def _height(row: Row, cell: tuple[int, int]) -> int:
    return cell[1] + _GAP + (2 * _GAP if row.parted else 0) + (_LINE if row.captions else 0)


def _row(canvas: Image.Image, row: Row, corner: tuple[int, int], cell: tuple[int, int], labels: int) -> None:
    draw = ImageDraw.Draw(canvas)
    left, top = corner
    if row.parted:
        top += _GAP
        draw.line((_MARGIN, top - _GAP // 2, canvas.width - _MARGIN, top - _GAP // 2), fill=_RULE, width=2)
        top += _GAP
    _text(draw, (_MARGIN, top), row.label, labels)
    for i, caption in enumerate(row.captions):
        _text(draw, (left + i * (cell[0] + _GAP), top), [caption], cell[0])
    top += _LINE if row.captions else 0
    for i, image in enumerate(row.images):
        canvas.paste(_resized(image, cell), (left + i * (cell[0] + _GAP), top))


def _heading(draw: ImageDraw.ImageDraw, title: str, lines: Sequence[str]) -> None:
    y = _MARGIN
    if title:
        draw.text((_MARGIN, y), plain(title), fill=_INK, font=_title_font())
        y += _TITLE
    for line in lines:
        draw.text((_MARGIN, y), plain(line), fill=_FAINT, font=_font(1))
        y += _LINE


def _text(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], width: int) -> None:
    x, y = place
    for i, line in enumerate(lines):
        draw.text((x, y), _shortened(plain(line), i, width), fill=_FAINT if i else _INK, font=_font(i))
        y += _LINE


def _title_font() -> Any:
    return ImageFont.load_default(30)


def _font(line: int) -> Any:
    return ImageFont.load_default(17 if line else 21)


def _width(text: str, line: int) -> int:
    return round(_font(line).getlength(plain(text)))


def _shortened(text: str, line: int, width: int) -> str:
    if _width(text, line) <= width:
        return text
    while text and _width(f"{text}...", line) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    width, height = size
    scale = side / max(size)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    grown = size[0] >= image.width
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if grown else Image.Resampling.BOX)


def maps_sheet(image: Image.Image, run: Run, attention: Attention) -> Image.Image:
    """An image with the maps and masks of its concepts, at up to five of the recorded steps."""
    last = len(attention.steps) - 1
    chosen = sorted({round(last * part / 4) for part in range(5)})
    draft, rows = attention.draft, []
    for i, concept in enumerate(run.scene.concepts):
        before = [] if draft is None else [draft_heat(image, draft, i)]
        images = [image, *before, *(heat(image, attention, i, step) for step in chosen)]
        rows.append(Row((concept.name, *textwrap.wrap(f'attention to "{concept.phrase}"', 22)), images, parted=True))
    # A draft has no masks of its own: the canvas is divided after it.
    before = [] if draft is None else [image.convert("L")]
    images = [image, *before, *(masks(image, attention, step) for step in chosen)]
    rows.append(Row(("masks", "region ownership"), images, parted=True))
    titles = [] if draft is None else [("draft", "class words, no LoRA")]
    titles += [(f"step {attention.steps[step] + 1}", f"of {run.steps}") for step in chosen]
    line = f"{run.method}, seed {run.seed}; each map is scaled to its own maximum"
    return sheet([("the image",), *titles], rows, title=run.scene.prompt, lines=[line], side=192)
