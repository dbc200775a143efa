"""From a run to an image: opening models, making images, making them again."""
