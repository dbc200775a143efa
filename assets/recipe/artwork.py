"""The artwork: fetches five sets of drawings from the npm registry and writes those of the world into one file.

    pip install --editable '.[dev]'
    PYTHONPATH=assets python -m recipe.artwork drawings.npz

| set | artist in `world.py` | terms |
|---|---|---|
| @iconify-json/noto (Noto Emoji) | noto | Apache-2.0 |
| @iconify-json/emojione (EmojiOne 2) | emojione | CC-BY 4.0 |
| @iconify-json/twemoji (Twemoji) | twemoji | CC-BY 4.0 |
| @iconify-json/fluent-emoji (Fluent Emoji) | fluent-emoji | MIT |
| @dicebear/toon-head (ToonHead by Johan Melin) | toon-head | CC-BY 4.0 |

Needs the commands `npm` and `node`. Every entry "artist:drawing" is an RGBA image of 192 x 192 pixels.
"""

import io
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import resvg_py
import typer
from PIL import Image

from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.world import SIZE, Pixels, base_drawings, character_drawings

PACKAGES = (
    "@iconify-json/noto@1.2.9", "@iconify-json/emojione@1.2.3", "@iconify-json/twemoji@1.2.5",
    "@iconify-json/fluent-emoji@1.2.7", "@dicebear/core@9.4.3", "@dicebear/toon-head@9.4.3",
)  # fmt: skip
DRAWN_AT = 384  # pixels; reduced afterwards, for smooth borders
TOONS: dict[str, dict[str, Any]] = {
    "mira": {"hair": ["sideComed"], "rearHair": ["longWavy"], "rearHairProbability": 100, "hairColor": ["a55728"],
             "skinColor": ["f1c3a5"], "clothes": ["dress"], "clothesColor": ["147f3c"], "mouth": ["smile"],
             "eyes": ["happy"], "eyebrows": ["happy"], "beardProbability": 0},
    "lena": {"hair": ["bun"], "rearHairProbability": 0, "hairColor": ["2c1b18"], "skinColor": ["a36b4f"],
             "clothes": ["turtleNeck"], "clothesColor": ["eab308"], "mouth": ["laugh"], "eyes": ["wide"],
             "eyebrows": ["raised"], "beardProbability": 0},
    "omar": {"hair": ["spiky"], "rearHairProbability": 0, "hairColor": ["2c1b18"], "skinColor": ["c68e7a"],
             "beard": ["fullBeard"], "beardProbability": 100, "clothes": ["openJacket"], "clothesColor": ["0b3286"],
             "mouth": ["smile"], "eyes": ["wide"], "eyebrows": ["neutral"]},
}  # fmt: skip
"""Options of the people that ToonHead draws."""


@handle_errors()
def main(
    out: Annotated[Path, typer.Argument(help="The file to write, .npz.")],
    packages: Annotated[Path | None, typer.Option(help="Folder for the packages; default: a temporary one.")] = None,
    more: Annotated[int, typer.Option(min=0, help="Further drawings of these artists, for the VAE alone.")] = 600,
) -> None:
    """Fetches the artwork and writes the drawings."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = packages or Path(temporary)
        install(folder)
        sources = {artist: IconSet(folder, artist) for artist in ("noto", "emojione", "twemoji", "fluent-emoji")}
        names = sorted({*base_drawings(), *character_drawings()})
        drawings: dict[str, Any] = {name: fit(svg) for name, svg in _svgs(folder, sources, names).items()}
        for name in _others(sources, set(names), more):
            artist, drawing = name.split(":")
            drawings[f"other:{name}"] = fit(sources[artist].svg(drawing))
    np.savez_compressed(out, **drawings)
    echo(f"{len(drawings)} drawings in {out}")


def install(folder: Path) -> None:
    """Installs the packages, without running scripts of theirs.

    Raises:
        ValueError: If npm is missing or cannot fetch them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--ignore-scripts", "--silent", "--no-save", "--prefix", str(folder), *PACKAGES]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("npm is needed to fetch the artwork; install Node.js") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"npm could not fetch the artwork: {error.stderr.strip()[-300:]}") from error


class IconSet:
    """An artist's drawings as SVG.

    Args:
        folder: Where the packages are.
        artist: Name of the set.
    """

    def __init__(self, folder: Path, artist: str) -> None:
        path = folder / "node_modules" / "@iconify-json" / artist / "icons.json"
        self._set = json.loads(path.read_text(encoding="utf-8"))
        self.artist = artist
        self.names = sorted(self._set["icons"])

    def svg(self, drawing: str) -> str:
        """A drawing.

        Raises:
            ValueError: If the set does not have it.
        """
        alias = self._set.get("aliases", {}).get(drawing, {"parent": drawing})
        icon = self._set["icons"].get(alias["parent"])
        if icon is None:
            raise ValueError(f"{self.artist} has no drawing {drawing!r}")
        width, height = (icon.get(side, self._set.get(side, 16)) for side in ("width", "height"))
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'{head} viewBox="0 0 {width} {height}" width="{DRAWN_AT}" height="{DRAWN_AT}">{icon["body"]}</svg>'


def _svgs(folder: Path, sources: dict[str, IconSet], names: list[str]) -> dict[str, str]:
    split = {name: name.split(":") for name in names}
    return {
        name: _toon(folder, TOONS[drawing]) if artist == "toon-head" else sources[artist].svg(drawing)
        for name, (artist, drawing) in split.items()
    }


def _toon(folder: Path, options: dict[str, Any]) -> str:
    """A person by ToonHead."""
    script = f"""
        import {{ createAvatar }} from "@dicebear/core";
        import * as toon from "@dicebear/toon-head";
        process.stdout.write(createAvatar(toon, {json.dumps(options | {"size": DRAWN_AT})}).toString());
    """
    command = ["node", "--input-type=module", "--eval", script]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def _others(sources: dict[str, IconSet], known: set[str], count: int) -> list[str]:
    """Further drawings, in a fixed order."""
    rest = [f"{artist}:{name}" for artist, icons in sources.items() for name in icons.names]
    rest = [name for name in rest if name not in known and "flag" not in name]
    return [rest[i] for i in np.random.default_rng(0).permutation(len(rest))[:count]]


def fit(svg: str) -> Pixels:
    """A drawing cropped to its content and centred. Shape: [SIZE, SIZE, 4]."""
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    rows, columns = np.where(np.asarray(image)[..., 3] > 16)
    image = image.crop((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    scale = SIZE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), ((SIZE - size[0]) // 2, SIZE - size[1]))
    return np.asarray(canvas)


if __name__ == "__main__":
    typer.run(main)
