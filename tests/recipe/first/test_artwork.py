"""Artwork becomes sprites: packages as the npm registry has them, here with images made up."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from commands import call
from recipe.first import artwork
from recipe.first.artwork import CODEPOINTS, PACKAGES, SIZE, draw, fetch, fit
from recipe.first.world import VENDORS

COLOURS = {"noto": (200, 0, 0), "fluent3d": (0, 160, 0), "twemoji": (0, 0, 220), "fluentflat": (180, 120, 0)}
RECTANGLE = '<path fill="rgb{}" d="M4 10h24v12H4z"/>'


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four packages as they are unpacked, with a rectangle twice as wide as high for every class."""
    try:
        import cairosvg  # noqa: F401
    except (ImportError, OSError):  # without it, or without the library that it needs
        pytest.skip("needs cairosvg and the library cairo")
    folder = tmp_path_factory.mktemp("packages")
    root = {vendor: folder / name.replace("@", "").replace("/", "-") / "package" for vendor, name in PACKAGES.items()}
    for vendor, inside in {"noto": "img/google/64", "fluent3d": "assets", "twemoji": ".", "fluentflat": "."}.items():
        (root[vendor] / inside).mkdir(parents=True)
    bare = [codepoint.removesuffix("-fe0f") for codepoint in CODEPOINTS.values()]
    for codepoint in CODEPOINTS.values():
        (root["noto"] / f"img/google/64/{codepoint}.png").write_bytes(rectangle("noto", "PNG"))
    for codepoint in bare:  # sets differ in how they spell a code point
        (root["fluent3d"] / f"assets/{codepoint}.webp").write_bytes(rectangle("fluent3d", "WEBP"))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{RECTANGLE.format(COLOURS["twemoji"])}</svg>'
        )
        (root["twemoji"] / f"{codepoint}.svg").write_text(svg)
    icons = {name: {"body": RECTANGLE.format(COLOURS["fluentflat"])} for name in CODEPOINTS}
    (root["fluentflat"] / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
    names = dict(zip(bare, CODEPOINTS, strict=True))
    (root["fluentflat"] / "chars.json").write_text(json.dumps(names))
    return folder


def rectangle(vendor: str, format: str) -> bytes:
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).rectangle((8, 20, 55, 43), fill=COLOURS[vendor])
    data = io.BytesIO()
    image.save(data, format, lossless=True)
    return data.getvalue()


def test_every_class_of_every_vendor_is_cut_out_and_centred(packages: Path, tmp_path: Path) -> None:
    said = call(tmp_path / "sprites.npz", "--art", packages, of=artwork.main).output
    assert f"{len(CODEPOINTS) * len(VENDORS)} sprites" in said
    sprites = np.load(tmp_path / "sprites.npz")
    assert set(sprites) == {f"{name}/{vendor}" for name in CODEPOINTS for vendor in VENDORS}
    for key, sprite in sprites.items():
        assert sprite.shape == (SIZE, SIZE, 4)
        assert sprite.dtype == np.uint8
        rows, columns = np.where(sprite[..., 3] > 128)
        assert (columns.min(), columns.max()) == (0, SIZE - 1), key
        assert abs(int(rows.min()) + int(rows.max()) - (SIZE - 1)) <= 2, key
        assert abs(int(rows.max()) - int(rows.min()) + 1 - SIZE // 2) <= 2, key
        middle = sprite[SIZE // 2, SIZE // 2, :3].astype(int)
        assert np.abs(middle - COLOURS[key.partition("/")[2]]).max() <= 4, key


def test_high_images_are_centred_as_well() -> None:
    image = Image.new("RGBA", (30, 50))
    ImageDraw.Draw(image).rectangle((3, 0, 12, 39), fill="black")
    rows, columns = np.where(fit(image)[..., 3] > 128)
    assert (rows.min(), rows.max()) == (0, SIZE - 1)
    assert abs(int(columns.min()) + int(columns.max()) - (SIZE - 1)) <= 2


def test_a_set_without_an_image_is_named(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(PACKAGES["noto"], packages)
    assert draw(folder, "noto", "1f4a9") is None
    monkeypatch.setattr(artwork, "CODEPOINTS", {**CODEPOINTS, "comet": "2604-fe0f"})
    said = call(tmp_path / "sprites.npz", "--art", packages, code=2, of=artwork.main).output
    assert "the packages have no image for comet/noto, comet/fluent3d, comet/twemoji, comet/fluentflat" in said
    assert not (tmp_path / "sprites.npz").exists()


def test_without_npm_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm is needed to fetch the artwork; install Node\.js"):
        fetch(PACKAGES["noto"], tmp_path / "art")
