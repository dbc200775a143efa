"""Scene files, and images with records."""

from lora_compose.compose.files.images import save_image

__all__ = ["save_image"]
