"""Words that the playground's model was trained on."""

BASE_CLASSES = (
    "cat", "dog", "rabbit", "horse", "pig", "penguin", "elephant", "turtle", "fish", "bird", "frog", "bear", "fox",
    "lion", "car", "boat", "house", "tree", "mushroom", "robot",
)  # fmt: skip
"""The classes that it can draw without LoRAs."""

PLACES = (
    "on grass", "on sand", "in snow", "at night", "underwater", "in the sky",
    "in a forest", "on a wooden floor", "in space", "at sunset",
)  # fmt: skip
"""Backgrounds by their words."""
