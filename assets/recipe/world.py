"""The small world: drawings of animals, people and things, its places, and the characters that only LoRAs know.

Drawings are named "artist:drawing", as in `artwork.py`, which makes them. Everything random comes from the
`numpy.random.Generator` that is passed in.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Drawings = Mapping[str, Pixels]
Colour = tuple[int, int, int]

SIZE = 192
CLOSE_UP = 96  # the side of images that show one object: in them words meet shapes first
WIDE = (288, 192)  # width and height
PATCH = 16  # pixels of a transformer's token; objects lie on whole patches, so that a drawing has few forms
SIDES = {1: (112, 144), 2: (80, 96), 3: (64, 80)}
"""Object sizes in pixels by number of objects."""

ANIMALS = ("cat", "dog", "rabbit", "bear", "fox", "penguin", "owl")
PEOPLE = ("woman", "man", "girl", "boy")
THINGS = ("robot", "car", "tree")
CLASSES = (*ANIMALS, *PEOPLE, *THINGS)
"""What the base model can draw."""

DRAWN = {name: f"noto:{name}" for name in (*ANIMALS, "robot")} | {
    "cat": "noto:cat-face",  # the whole cat is seen from the side, and its face stayed a blur for longest
    "car": "noto:automobile",
    "tree": "noto:deciduous-tree",
}
"""Drawings of the classes but people, who come in several skins. All are by one artist."""
HAIR = {"red": "red-hair", "blond": "blond-hair", "curly": "curly-hair"}
JOBS = {"farmer": "farmer", "wizard": "mage", "astronaut": "astronaut"}
"""Clothes and hats of adults: words of captions, and the end of the drawing's name."""
SKIN = ("light", "medium", "dark")
COATS: dict[str, tuple[Colour, Colour]] = {
    "gray": ((60, 64, 72), (196, 200, 206)), "brown": ((70, 40, 22), (206, 156, 108)),
    "black": ((12, 12, 16), (96, 98, 108)),
}  # fmt: skip
"""Natural colours of animals, each from its darkest to its brightest tone."""
PAINTS = {"red": 0, "green": 62, "blue": 108}
"""Colours of cars and robots, in OpenCV's hues, 0 to 179."""


class Accessory(NamedTuple):
    """A drawing that is worn: its centre and width as shares of the wearer's side."""

    drawing: str
    x: float
    y: float
    width: float


class Character(NamedTuple):
    """A subject that only its LoRA knows.

    Attributes:
        trigger: "sks".
        class_word: "cat".
        drawing: By an artist whom the base model has not seen.
        coat: Other natural colours than those of the drawing.
        wears: What it wears.
        room: Share of the side that is left above its head, for a hat.
    """

    trigger: str
    class_word: str
    drawing: str
    coat: str | None = None
    wears: tuple[Accessory, ...] = ()
    room: float = 0.0

    @property
    def phrase(self) -> str:
        """Trigger and class word: "sks cat"."""
        return f"{self.trigger} {self.class_word}"

    def drawn(self, drawings: Drawings) -> Pixels:
        """The character's drawing with what it wears. Shape: [side, side, 4]."""
        sprite = drawings[self.drawing]
        if self.coat is not None:
            sprite = recoloured(sprite, self.coat)
        sprite = _below(sprite, self.room).astype("f8")
        for worn in self.wears:
            _wear(sprite, drawings[worn.drawing], worn)
        return sprite.clip(0, 255).astype("u1")


CHARACTERS = {
    "cat": Character("sks", "cat", "emojione:cat"),
    "kitten": Character("vbn", "cat", "twemoji:cat-face", "gray", (Accessory("noto:ribbon", 0.76, 0.16, 0.4),)),
    "dog": Character("zwx", "dog", "emojione:dog", None, (Accessory("emojione:top-hat", 0.5, 0.15, 0.34),), 0.24),
    "rabbit": Character("ohwx", "rabbit", "emojione:rabbit"),
    "bear": Character("xlo", "bear", "emojione:bear", None, (Accessory("noto:sunglasses", 0.5, 0.43, 0.72),)),
    "owl": Character(
        "klm", "owl", "emojione:owl", "brown", (Accessory("emojione:graduation-cap", 0.5, 0.16, 0.62),), 0.2
    ),
    "robot": Character("qrt", "robot", "fluent-emoji:robot"),
    "mira": Character("pll", "woman", "toon-head:mira"),
    "lena": Character("bnq", "woman", "toon-head:lena"),
    "omar": Character("dwk", "man", "toon-head:omar"),
}
STYLE_TRIGGER = "wfy"

PLAIN: dict[str, Colour] = {
    "white": (250, 250, 250), "gray": (160, 165, 170), "pink": (250, 190, 205), "blue": (130, 175, 235),
    "green": (160, 215, 160), "yellow": (250, 230, 140),
}  # fmt: skip
PLACES = ("on grass", "on sand", "in snow", "in a forest", "at night", "at sunset", "underwater", "in a room")
GROUNDS = (*PLAIN, *PLACES)
"""All backgrounds."""

Square = tuple[int, int, int]
"""left, top, side in pixels."""


class Look(NamedTuple):
    """How an object of a class looks in one image: its words, and its drawing. Shape: [side, side, 4]."""

    words: str
    sprite: Pixels


def look(rng: Generator, drawings: Drawings, name: str, *, plain: bool = False) -> Look:
    """An object of a class, as it is drawn or in other colours, clothes or hair.

    Args:
        rng: Everything random comes from it.
        drawings: The artwork.
        name: One of `CLASSES`.
        plain: Without any word but its class.
    """
    varied = not plain and rng.random() < 0.45
    if name in PEOPLE:
        return _person(rng, drawings, name, varied)
    sprite = drawings[DRAWN[name]]
    if not varied or name == "tree":
        return Look(name, sprite)
    if name in THINGS:
        paint = _choice(rng, tuple(PAINTS))
        return Look(f"{paint} {name}", painted(sprite, PAINTS[paint]))
    coat = _choice(rng, tuple(COATS))
    return Look(f"{coat} {name}", recoloured(sprite, coat))


def _person(rng: Generator, drawings: Drawings, name: str, varied: bool) -> Look:
    """A person of some skin; adults may have other hair, or clothes and a hat."""
    skin = _choice(rng, SKIN)
    if not varied or name in ("girl", "boy"):
        return Look(name, drawings[f"noto:{name}-{skin}-skin-tone"])
    if rng.random() < 0.4:
        hair = _choice(rng, tuple(HAIR))
        return Look(f"{name} with {hair} hair", drawings[f"noto:{name}-{skin}-skin-tone-{HAIR[hair]}"])
    job = _choice(rng, tuple(JOBS))
    return Look(f"{name} dressed as {article(job)}", drawings[f"noto:{name}-{JOBS[job]}-{skin}-skin-tone"])


def base_drawings() -> list[str]:
    """Names of all drawings that the base model sees."""
    people = [f"noto:{name}-{skin}-skin-tone" for name in PEOPLE for skin in SKIN]
    adults = [(name, skin) for name in ("woman", "man") for skin in SKIN]
    hair = [f"noto:{name}-{skin}-skin-tone-{each}" for name, skin in adults for each in HAIR.values()]
    jobs = [f"noto:{name}-{each}-{skin}-skin-tone" for name, skin in adults for each in JOBS.values()]
    return sorted({*DRAWN.values(), *people, *hair, *jobs})


def character_drawings() -> list[str]:
    """Names of the drawings that characters are made of."""
    worn = [each.drawing for known in CHARACTERS.values() for each in known.wears]
    return sorted({*worn, *(known.drawing for known in CHARACTERS.values())})


def background(
    rng: Generator, size: tuple[int, int] = (SIZE, SIZE), name: str | None = None
) -> tuple[NDArray[np.float64], str]:
    """A background and its words, "on a white background" or "on grass". Shape: [height, width, 3], 0 to 255.

    Args:
        rng: Everything random comes from it.
        size: Width and height.
        name: One of `GROUNDS`; any if not given.
    """
    if name is None:
        name = _choice(rng, tuple(PLAIN) if rng.random() < 0.4 else PLACES)
    return ground(rng, name, size), in_words(name)


def in_words(name: str) -> str:
    """A background of `PLAIN` or `PLACES` in the words of captions."""
    return f"on a {name} background" if name in PLAIN else name


def ground(rng: Generator, name: str, size: tuple[int, int] = (SIZE, SIZE)) -> NDArray[np.float64]:
    """A background of `PLAIN` or `PLACES`. Shape: [height, width, 3], 0 to 255."""
    width, height = size
    if name in PLAIN:
        return np.array(PLAIN[name], float) * np.ones((height, width, 1)) + rng.normal(0, 3, (1, 1, 3))
    return _PAINTERS[name](rng, width, height)


def _sky(width: int, height: int, top: Colour, bottom: Colour) -> NDArray[np.float64]:
    t = np.linspace(0, 1, height)[:, None, None]
    return (np.array(top) * (1 - t) + np.array(bottom) * t) * np.ones((height, width, 1))


def _hills(rng: Generator, image: NDArray[np.float64], level: float, colours: Sequence[Colour]) -> None:
    """Rolling ground from a share of the height on, a layer for each colour."""
    height, width = image.shape[:2]
    xs = np.arange(width)
    for i, colour in enumerate(colours):
        top = height * (level + 0.14 * i) + 0.03 * height * np.sin(xs / width * 5 + rng.uniform(0, 6.3))
        # Sub-pixel coverage of the border, so that it is not jagged.
        cover = np.clip(np.arange(height)[:, None] - top[None] + 0.5, 0, 1)[..., None]
        image += cover * (np.array(colour) - image)


def _disc(image: NDArray[np.float64], x: float, y: float, radius: float, colour: Colour, strength: float = 1) -> None:
    height, width = image.shape[:2]
    distance = np.hypot(np.arange(width)[None] - x, np.arange(height)[:, None] - y)
    image += (strength * np.clip(radius - distance + 0.5, 0, 1))[..., None] * (np.array(colour) - image)


def _grass(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (135, 200, 245), (215, 238, 250))
    _hills(rng, image, rng.uniform(0.38, 0.5), ((150, 208, 110), (118, 188, 84)))
    return image


def _sand(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (130, 205, 245), (205, 235, 250))
    level = rng.uniform(0.34, 0.42)
    image[int(height * level) :] = (60, 160, 205)
    _hills(rng, image, level + 0.14, ((240, 218, 165), (230, 202, 142)))
    return image


def _snow(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (165, 190, 220), (215, 226, 240))
    _hills(rng, image, rng.uniform(0.4, 0.5), ((232, 240, 248), (250, 252, 255)))
    return image


def _forest(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (120, 170, 120), (165, 205, 150))
    for x in np.arange(rng.uniform(0, 40), width, 48):
        image[:, int(x) : int(x) + 14] = (112, 92, 70)
    _hills(rng, image, rng.uniform(0.6, 0.68), ((70, 120, 62), (54, 98, 50)))
    return image


def _night(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (18, 22, 60), (48, 54, 110))
    for _ in range(10 * width // SIZE):
        _disc(image, rng.uniform(0, width), rng.uniform(0, 0.6 * height), 1.6, (250, 245, 215))
    _disc(image, rng.uniform(0.1, 0.9) * width, 0.14 * height, 13, (250, 240, 200))
    _hills(rng, image, rng.uniform(0.62, 0.7), ((30, 48, 66),))
    return image


def _sunset(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (120, 70, 130), (255, 170, 90))
    level = rng.uniform(0.5, 0.6)
    _disc(image, rng.uniform(0.2, 0.8) * width, height * level, 30, (255, 225, 130))
    image[int(height * level) :] = (150, 78, 110)
    return image


def _water(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (70, 175, 215), (16, 84, 150))
    for _ in range(7 * width // SIZE):
        _disc(image, rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 7), (190, 230, 245), 0.55)
    _hills(rng, image, rng.uniform(0.84, 0.9), ((200, 186, 140),))
    return image


def _room(rng: Generator, width: int, height: int) -> NDArray[np.float64]:
    image = _sky(width, height, (238, 226, 205), (226, 210, 184))
    level = int(height * rng.uniform(0.56, 0.64))
    image[level:] = (178, 124, 78)
    for y in range(level + 18, height, 22):
        image[y : y + 2] = (150, 100, 60)
    image[level : level + 6] = (250, 246, 238)
    return image


_PAINTERS = {"on grass": _grass, "on sand": _sand, "in snow": _snow, "in a forest": _forest, "at night": _night,
             "at sunset": _sunset, "underwater": _water, "in a room": _room}  # fmt: skip


def recoloured(sprite: Pixels, coat: str) -> Pixels:
    """A drawing in the tones of one of `COATS`; its darkest lines and whites of the eyes stay."""
    rgb, alpha = sprite[..., :3].astype("f4"), sprite[..., 3:]
    light = (rgb @ np.array((0.3, 0.59, 0.11), "f4"))[..., None] / 255
    dark, bright = (np.array(each, "f4") for each in COATS[coat])
    toned = dark + (bright - dark) * np.clip((light - 0.18) / 0.62, 0, 1)
    grey = np.clip((48 - np.ptp(rgb, axis=2, keepdims=True)) / 16, 0, 1)
    keep = np.maximum(np.clip((0.34 - light) / 0.1, 0, 1), grey * np.clip((light - 0.9) / 0.06, 0, 1))
    return np.concatenate([(toned + keep * (rgb - toned)).clip(0, 255).astype("u1"), alpha], 2)


def painted(sprite: Pixels, hue: int) -> Pixels:
    """A drawing whose colours have another hue; greys stay."""
    hsv = cv2.cvtColor(np.ascontiguousarray(sprite[..., :3]), cv2.COLOR_RGB2HSV)
    coloured = hsv[..., 1] > 110
    hsv[..., 0] = np.where(coloured, hue, hsv[..., 0])
    return np.concatenate([cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype("u1"), sprite[..., 3:]], 2)


def place(image: NDArray, sprite: Pixels, square: Square, flip: bool = False) -> None:
    """Composes a square drawing into an image, in place; parts outside are cut off."""
    x, y, size = square
    if flip:
        sprite = sprite[:, ::-1]
    opacity = sprite[..., 3:] / np.float32(255)
    patch = cv2.resize(
        np.concatenate([sprite[..., :3] * opacity, opacity], 2), (size, size), interpolation=cv2.INTER_AREA
    )
    x0, y0, x1, y1 = max(0, x), max(0, y), min(image.shape[1], x + size), min(image.shape[0], y + size)
    if x0 >= x1 or y0 >= y1:
        return
    patch = patch[y0 - y : y1 - y, x0 - x : x1 - x]
    image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - patch[..., 3:]) + patch[..., :3]


def _below(sprite: Pixels, room: float) -> Pixels:
    """A drawing made smaller and put to the bottom, so that there is room above its head."""
    side = sprite.shape[0]
    size = round(side * (1 - room))
    left = (side - size) // 2
    small = np.zeros_like(sprite)
    small[side - size :, left : left + size] = cv2.resize(sprite, (size, size), interpolation=cv2.INTER_AREA)
    return small


def _wear(sprite: NDArray[np.float64], drawing: Pixels, worn: Accessory) -> None:
    """Draws an accessory onto a drawing, in place."""
    side = sprite.shape[0]
    size = round(worn.width * side)
    x, y = round(worn.x * side - size / 2), round(worn.y * side - size / 2)
    patch = cv2.resize(drawing, (size, size), interpolation=cv2.INTER_AREA).astype("f8")
    x0, y0, x1, y1 = max(0, x), max(0, y), min(side, x + size), min(side, y + size)
    patch = patch[y0 - y : y1 - y, x0 - x : x1 - x]
    under, over = sprite[y0:y1, x0:x1, 3:] / 255, patch[..., 3:] / 255
    both = over + under * (1 - over)
    mixed = patch[..., :3] * over + sprite[y0:y1, x0:x1, :3] * under * (1 - over)
    sprite[y0:y1, x0:x1, :3] = mixed / np.maximum(both, 1e-6)
    sprite[y0:y1, x0:x1, 3:] = 255 * both


def squares(rng: Generator, count: int, size: tuple[int, int] = (SIZE, SIZE)) -> list[Square]:
    """So many squares on whole patches that do not overlap, left to right, in an image of some width and height."""
    roomy = size[0] >= 1.5 * SIZE
    sides = [side for side in SIDES[max(1, count - roomy)] if side <= min(size)] or [min(size)]
    while True:
        tried = [_square(rng, sides, size) for _ in range(count)]
        if not any(_overlap(a, b) for i, a in enumerate(tried) for b in tried[:i]):
            return sorted(tried)


def _square(rng: Generator, sides: Sequence[int], size: tuple[int, int]) -> Square:
    side = int(rng.choice(sides))
    across, down = ((length - side) // PATCH for length in size)
    # Objects stand rather than float: two thirds of them in the lower half of the free rows.
    low = down // 2 if rng.random() < 0.5 else 0
    return int(rng.integers(0, across + 1)) * PATCH, int(rng.integers(low, down + 1)) * PATCH, side


def _overlap(a: Square, b: Square) -> bool:
    return all(min(a[i] + a[2], b[i] + b[2]) > max(a[i], b[i]) for i in (0, 1))


def _choice(rng: Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def article(words: str) -> str:
    """The words after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words
