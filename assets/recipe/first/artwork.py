"""Emoji artwork as sprites: fetches four sets from the npm registry and writes one file with 70 classes x 4 vendors.

    pip install --editable '.[dev]'
    python -m recipe.first.artwork sprites.npz

| set | vendor | terms |
|---|---|---|
| emoji-datasource-google (Noto Emoji) | noto | Apache-2.0 |
| @lobehub/fluent-emoji-3d (Fluent Emoji) | fluent3d | MIT |
| @twemoji/svg (Twemoji) | twemoji | CC-BY 4.0 |
| @iconify-json/fluent-emoji-flat (Fluent Emoji) | fluentflat | MIT |

Needs the command `npm`, and the library cairo. Every entry "class/vendor" is an RGBA image of 96 x 96 pixels.
"""

import io
import json
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.first.world import VENDORS, Pixels

SIZE = 96
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "fluent3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "twemoji": "@twemoji/svg@15.0.0",
    "fluentflat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
CODEPOINTS = {
    "cat": "1f408", "dog": "1f415", "rabbit": "1f407", "horse": "1f40e", "cow": "1f404", "pig": "1f416",
    "sheep": "1f411", "penguin": "1f427", "elephant": "1f418", "turtle": "1f422", "fish": "1f41f", "bird": "1f426",
    "snake": "1f40d", "frog": "1f438", "bear": "1f43b", "panda": "1f43c", "fox": "1f98a", "lion": "1f981",
    "tiger": "1f405", "monkey": "1f412", "mouse": "1f401", "snail": "1f40c", "bee": "1f41d", "butterfly": "1f98b",
    "whale": "1f433", "octopus": "1f419", "crab": "1f980", "duck": "1f986", "owl": "1f989", "dinosaur": "1f995",
    "unicorn": "1f984", "chicken": "1f414", "car": "1f697", "bus": "1f68c", "bicycle": "1f6b2",
    "airplane": "2708-fe0f", "rocket": "1f680", "train": "1f682", "boat": "26f5", "truck": "1f69a", "house": "1f3e0",
    "castle": "1f3f0", "tree": "1f333", "sunflower": "1f33b", "tulip": "1f337", "cactus": "1f335",
    "mushroom": "1f344", "apple": "1f34e", "banana": "1f34c", "pizza": "1f355", "cake": "1f382", "burger": "1f354",
    "hat": "1f3a9", "boot": "1f462", "backpack": "1f392", "umbrella": "2602-fe0f", "guitar": "1f3b8", "ball": "26bd",
    "balloon": "1f388", "gift": "1f381", "clock": "23f0", "lamp": "1f4a1", "camera": "1f4f7", "robot": "1f916",
    "ghost": "1f47b", "snowman": "26c4", "star": "2b50", "teddy": "1f9f8", "chair": "1fa91", "book": "1f4d5",
}  # fmt: skip
"""More classes than the base model knows: `world.BASE_CLASSES` lists those that it knows."""


@handle_errors()
def main(
    out: Annotated[Path, typer.Argument(help="The file to write, .npz.")],
    art: Annotated[Path | None, typer.Option(help="Folder for the packages; default: a temporary one.")] = None,
) -> None:
    """Fetches the artwork and writes the sprites."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {vendor: fetch(package, art or Path(temporary)) for vendor, package in PACKAGES.items()}
        drawn = {
            f"{name}/{vendor}": draw(folders[vendor], vendor, codepoint)
            for name, codepoint in CODEPOINTS.items()
            for vendor in VENDORS
        }
    missing = [key for key, image in drawn.items() if image is None]
    if missing:
        raise ValueError(f"the packages have no image for {', '.join(missing)}")
    sprites: dict[str, Any] = {key: fit(image) for key, image in drawn.items() if image is not None}
    np.savez_compressed(out, **sprites)
    echo(f"{len(drawn)} sprites in {out}")


def fetch(package: str, to: Path) -> Path:
    """Downloads and unpacks a package of the npm registry, unless it is there already.

    Raises:
        ValueError: If npm is missing or has no such package.
    """
    folder = to / package.replace("@", "").replace("/", "-")
    if folder.is_dir():
        return folder / "package"
    to.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", package, "--silent", "--pack-destination", str(to)]
    try:
        packed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    except FileNotFoundError as error:
        raise ValueError("npm is needed to fetch the artwork; install Node.js") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"npm could not fetch {package}: {error.stderr.strip()[-300:]}") from error
    with tarfile.open(to / Path(packed).name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def draw(package: Path, vendor: str, codepoint: str) -> Image.Image | None:
    """A set's image of a code point; None if it has none."""
    if vendor == "fluentflat":
        return _iconify(package, codepoint)
    pattern = {"noto": "img/google/64/{}.png", "fluent3d": "assets/{}.webp", "twemoji": "{}.svg"}[vendor]
    for name in _spellings(codepoint):
        path = package / pattern.format(name)
        if path.is_file():
            if path.suffix == ".svg":
                return _from_svg(path.read_bytes())
            with Image.open(path) as image:  # reads its pixels lazily, and keeps the file open until then
                return image.convert("RGBA")
    return None


def fit(image: Image.Image) -> Pixels:
    """An image cropped to its content and centred. Shape: [SIZE, SIZE, 4]."""
    image = image.convert("RGBA")
    rows, columns = np.where(np.asarray(image)[..., 3] > 16)
    image = image.crop((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    scale = SIZE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return np.asarray(canvas)


def _spellings(codepoint: str) -> tuple[str, ...]:
    bare = codepoint.replace("-fe0f", "")
    return codepoint, bare, f"{bare}-fe0f"


def _iconify(package: Path, codepoint: str) -> Image.Image | None:
    icons, names = _iconify_index(package)
    for spelling in _spellings(codepoint):
        icon = icons["icons"].get(names.get(spelling))
        if icon is not None:
            width, height = (icon.get(side, icons.get(side, 32)) for side in ("width", "height"))
            head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            return _from_svg(f'{head} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'.encode())
    return None


@cache
def _iconify_index(package: Path) -> tuple[dict[str, Any], dict[str, str]]:
    icons, names = (json.loads((package / name).read_text(encoding="utf-8")) for name in ("icons.json", "chars.json"))
    return icons, names


def _from_svg(svg: bytes) -> Image.Image:
    import cairosvg

    png: Any = cairosvg.svg2png(bytestring=svg, output_width=192, output_height=192)
    return Image.open(io.BytesIO(png))


if __name__ == "__main__":
    typer.run(main)
