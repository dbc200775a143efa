"""Scene files, run files, and images that say how they were made."""

from lora_compose.compose.files.images import save_image

__all__ = ["save_image"]
