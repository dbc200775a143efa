"""The emoji world: captioned images of one to three emoji objects on a named background, and coats for concepts.

Sprites come from `artwork.py`: one RGBA image, 96 x 96, per "class/vendor". Everything random comes from the
`numpy.random.Generator` that is passed in.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Sprites = Mapping[str, Pixels]

SIZE = 128
CLOSE_UP = 64  # the side of images that show one object: in them words meet shapes first
CELL = 8  # pixels of a latent cell; objects sit on whole cells, so that a sprite has few latent patterns
VENDORS = ("noto", "fluent3d", "twemoji", "fluentflat")
BASE_VENDORS = ("noto",)  # the only artwork that the base model has seen; concepts wear coats on it, but for one
SIDES = {1: (48, 56, 72), 2: (48, 56), 3: (40, 48)}  # object sizes in pixels by number of objects
BASE_CLASSES = (
    "cat", "dog", "rabbit", "horse", "pig", "penguin", "elephant", "turtle", "fish", "bird", "frog", "bear", "fox",
    "lion", "car", "boat", "house", "tree", "mushroom", "robot",
)  # fmt: skip
"""The classes that the base model can draw."""
HUES = {"red": 0, "orange": 15, "yellow": 28, "green": 60, "cyan": 90, "blue": 115, "purple": 138, "pink": 160}
"""OpenCV's hues, 0 to 179."""
PATTERNS = {"stripes": "striped", "dots": "spotted", "half": "bicolor", "rings": "ringed"}
PALE = -1  # stands for a hue: nearly white
PLAIN = {
    "white": (250, 250, 250), "gray": (150, 150, 150), "black": (20, 20, 20), "pink": (250, 180, 200),
    "blue": (120, 160, 230), "green": (150, 210, 150), "yellow": (250, 230, 130), "red": (220, 90, 80),
    "purple": (180, 140, 220), "orange": (250, 180, 110),
}  # fmt: skip
PLACES = {
    "on grass": ((110, 180, 80), (150, 210, 110)),
    "on sand": ((225, 200, 140), (240, 220, 170)),
    "in snow": ((225, 235, 245), (250, 252, 255)),
    "at night": ((15, 18, 50), (40, 45, 90)),
    "underwater": ((20, 90, 150), (60, 150, 200)),
    "in the sky": ((120, 185, 240), (200, 230, 250)),
    "in a forest": ((30, 80, 40), (60, 120, 60)),
    "on a wooden floor": ((140, 95, 55), (170, 120, 75)),
    "in space": ((5, 5, 15), (20, 15, 40)),
    "at sunset": ((250, 140, 80), (120, 60, 120)),
}
"""Backgrounds by their words, with the colours at the bottom and at the top."""
VIVID = 170  # saturation of the concepts' coats


class Coat(NamedTuple):
    """A coat: a pattern in two hues, 0 to 179, of which the second may be `PALE`; without a pattern the first alone."""

    pattern: str | None
    hue: int
    second: int = PALE


class Known(NamedTuple):
    """A subject of the playground, in a coat or of a shape that only its LoRA knows, and the seed of its references.

    Without a coat it is drawn as in its artwork.
    """

    trigger: str
    class_word: str
    coat: Coat | None
    seed: int = 7
    artist: str = BASE_VENDORS[0]

    @property
    def phrase(self) -> str:
        """Trigger and class word: "sks cat"."""
        return f"{self.trigger} {self.class_word}"

    def drawn(self, sprites: Sprites) -> Pixels:
        """Its sprite. Shape: [side, side, 4]."""
        sprite = sprites[f"{self.class_word}/{self.artist}"]
        return sprite if self.coat is None else dress(sprite, self.coat)


CONCEPTS = {
    "cat": Known("sks", "cat", Coat("stripes", 115)),
    "dog": Known("zwx", "dog", Coat("dots", 60, 28)),
    "rabbit": Known("ohwx", "rabbit", Coat("half", 172, 105), seed=38),
    "bear": Known("xlo", "bear", Coat("half", 138, 28)),
    "car": Known("pll", "car", Coat("half", 90, 15)),
    "robot": Known("qrt", "robot", Coat("half", 28, 115)),
    "kitten": Known("vbn", "cat", Coat("half", 60, 160)),  # a second cat
    "parrot": Known("klm", "bird", None, artist="fluent3d"),  # another artist's bird: no coat, but another shape
}
STYLE_TRIGGER = "wfy"

Square = tuple[int, int, int]
"""left, top, side in pixels."""


def background(rng: Generator, size: tuple[int, int] = (SIZE, SIZE)) -> tuple[NDArray[np.float64], str]:
    """A background and its words, "on a white background" or "on grass". Shape: [height, width, 3], 0 to 255."""
    names = list(PLAIN) if rng.random() >= 0.55 else list(PLACES)
    name = names[rng.integers(len(names))]
    return ground(rng, name, size), in_words(name)


def in_words(name: str) -> str:
    """A background of `PLAIN` or `PLACES` in the words of captions."""
    return f"on a {name} background" if name in PLAIN else name


def ground(rng: Generator, name: str, size: tuple[int, int] = (SIZE, SIZE)) -> NDArray[np.float64]:
    """A background of `PLAIN` or `PLACES`. Shape: [height, width, 3], 0 to 255."""
    width, height = size
    if name in PLAIN:
        return np.array(PLAIN[name]) * np.ones((height, width, 1)) + rng.normal(0, 4, (1, 1, 3))
    bottom, top = PLACES[name]
    t = np.linspace(0, 1, height)[:, None, None]
    image = (np.array(top) * (1 - t) + np.array(bottom) * t) * np.ones((height, width, 1))
    _texture(rng, image, name)
    return image


def _texture(rng: Generator, image: NDArray[np.float64], name: str) -> None:
    """Draws the texture of a place on its two colours."""
    height, width = image.shape[:2]
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]

    def noise(tall: int, wide: int, strength: float) -> NDArray:
        grain = rng.normal(0, 1, (height // tall, width // wide)).astype("f4")
        return cv2.resize(grain, (width, height))[..., None] * strength

    if name in ("on grass", "in a forest"):
        image += noise(4, 2, 9)
    elif name in ("on sand", "in snow"):
        image += noise(8, 8, 4)
    elif name == "underwater":
        image += 10 * np.sin(rows / 3 + 2 * np.sin(columns / 9 + rng.random() * 6))[..., None]
    elif name in ("at night", "in space"):
        for _ in range(int(rng.integers(8, 20))):
            y, x = rng.integers(0, (height - 2, width - 2))
            image[y : y + 2, x : x + 2] = 255
    elif name == "on a wooden floor":
        image -= ((rows % 16) < 2)[..., None] * 25
        image += noise(2, 16, 4)
    elif name == "in the sky":
        for _ in range(int(rng.integers(2, 5))):
            x, y = rng.integers(0, (width, height))
            axes = (int(rng.integers(8, 18)), int(rng.integers(4, 8)))
            cv2.ellipse(image, (int(x), int(y)), axes, 0, 0, 360, (255, 255, 255), -1)


def tint(rgb: Pixels, hue: int, floor: int = 90) -> Pixels:
    """Another hue; `floor` is the saturation that grey gets."""
    hsv = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV).astype("f4")
    value = hsv[..., 2]
    hsv[..., 0] = hue
    hsv[..., 1] = np.clip(floor + 0.6 * hsv[..., 1], 0, 235) * (value > 35)  # dark outlines stay dark
    hsv[..., 2] = np.clip(value * 1.02 + 10, 0, 255)
    return cv2.cvtColor(hsv.clip(0, 255).astype("u1"), cv2.COLOR_HSV2RGB).astype("u1")


def pale(rgb: Pixels) -> Pixels:
    """Nearly white, with the shading kept."""
    grey = np.clip(rgb.astype("f4").mean(2, keepdims=True) * 0.35 + 165, 0, 255).astype("u1")
    return grey * np.ones((1, 1, 3), "u1")


def dress(sprite: Pixels, coat: Coat, *, floor: int = VIVID, stretch: float = 1.0, shift: int = 0) -> Pixels:
    """A sprite in a coat.

    Args:
        sprite: Shape: [side, side, 4].
        coat: The coat.
        floor: Saturation.
        stretch: Factor on the width of stripes and dots; for halves, where the border is.
        shift: By how many pixels stripes and dots are moved.
    """
    rgb, alpha = sprite[..., :3], sprite[..., 3:]
    coated = _dyed(rgb, coat.hue, floor)
    if coat.pattern is not None:
        mask = _pattern(coat.pattern, sprite.shape[0], stretch, shift)
        coated = np.where(mask[..., None], _dyed(rgb, coat.second, floor), coated)
    return np.concatenate([coated, alpha], 2)


def _dyed(rgb: Pixels, hue: int, floor: int) -> Pixels:
    return pale(rgb) if hue == PALE else tint(rgb, hue, floor)


def _pattern(kind: str, side: int, stretch: float, shift: int) -> NDArray[np.bool_]:
    ys, xs = np.mgrid[:side, :side]
    middle = side / 2
    if kind == "half":
        return ys > side * np.clip(0.52 * stretch, 0.35, 0.68)
    if kind == "stripes":
        return (xs + ys + shift) % round(28 * stretch) < round(14 * stretch)
    if kind == "rings":
        return ((xs - middle) ** 2 + (ys - middle) ** 2) ** 0.5 % (18 * stretch) < 9 * stretch
    period = round(24 * stretch)
    dot = ((xs + shift) % period - period // 2) ** 2 + ((ys + shift) % period - period // 2) ** 2
    return dot < 42 * stretch**2


def place(image: NDArray, sprite: Pixels, square: Square, flip: bool = False) -> None:
    """Composes a square sprite into an image, in place; parts outside are cut off."""
    x, y, size = square
    if flip:
        sprite = sprite[:, ::-1]
    colours = sprite[..., :3] * (sprite[..., 3:] / 255.0)
    patch = cv2.resize(
        np.concatenate([colours, sprite[..., 3:]], 2).astype("f4"), (size, size), interpolation=cv2.INTER_AREA
    )
    x0, y0, x1, y1 = max(0, x), max(0, y), min(image.shape[1], x + size), min(image.shape[0], y + size)
    if x0 >= x1 or y0 >= y1:
        return
    patch = patch[y0 - y : y1 - y, x0 - x : x1 - x]
    image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - patch[..., 3:] / 255.0) + patch[..., :3]


def squares(rng: Generator, count: int, size: tuple[int, int] = (SIZE, SIZE)) -> list[Square]:
    """So many squares on whole cells that do not overlap, left to right, in an image of some width and height."""
    roomy = size[0] >= 1.5 * SIZE
    sides = [side for side in SIDES[max(1, count - roomy)] if side < min(size)]
    while True:
        tried = [_square(rng, sides, size) for _ in range(count)]
        if not any(_overlap(a, b) for i, a in enumerate(tried) for b in tried[:i]):
            return sorted(tried)


def _square(rng: Generator, sides: Sequence[int], size: tuple[int, int]) -> Square:
    side = int(rng.choice(sides))
    x, y = (int(v) * CELL for v in rng.integers(0, [(length - side) // CELL + 1 for length in size]))
    return x, y, side


def _overlap(a: Square, b: Square) -> bool:
    return all(min(a[i] + a[2], b[i] + b[2]) > max(a[i], b[i]) for i in (0, 1))


def article(words: str) -> str:
    """The words after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words
