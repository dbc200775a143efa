"""Words that the playground's model was trained on."""

BASE_CLASSES = (
    "cat", "dog", "rabbit", "horse", "pig", "penguin", "elephant", "turtle", "fish", "bird", "frog", "bear", "fox",
    "lion", "car", "boat", "house", "tree", "mushroom", "robot",
)  # fmt: skip
"""The classes that it can draw without LoRAs."""

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
