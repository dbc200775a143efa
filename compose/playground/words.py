"""Words that the playgrounds' models were trained on."""

CLASSES = (
    "cat", "dog", "rabbit", "bear", "fox", "penguin", "owl", "woman", "man", "girl", "boy", "robot", "car", "tree",
)  # fmt: skip
"""What they draw without LoRAs."""
PLACES = ("on grass", "on sand", "in snow", "in a forest", "at night", "at sunset", "underwater", "in a room")
