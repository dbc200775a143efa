"""Words that the playgrounds' models were trained on."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUND_FLUX


class Words(NamedTuple):
    """Words of a small world: classes that its model can draw without LoRAs, and backgrounds (`places`)."""

    classes: tuple[str, ...]
    places: tuple[str, ...]


WORDS: Mapping[str, Words] = MappingProxyType(
    {
        PLAYGROUND: Words(
            (
                "cat", "dog", "rabbit", "bear", "fox", "penguin", "owl", "woman", "man", "girl", "boy", "robot", "car",
                "tree",
            ),
            (
                "on grass", "on sand", "in snow", "in a forest", "at night", "at sunset", "underwater", "in a room",
            ),
        ),
        PLAYGROUND_FLUX: Words(
            (
                "cat", "dog", "rabbit", "horse", "pig", "penguin", "elephant", "turtle", "fish", "bird", "frog", "bear",
                "fox", "lion", "car", "boat", "house", "tree", "mushroom", "robot",
            ),
            (
                "on grass", "on sand", "in snow", "at night", "underwater", "in the sky", "in a forest",
                "on a wooden floor", "in space", "at sunset",
            ),
        ),
    }
)  # fmt: skip
"""By the model's name."""
