"""From a run to an image: opening models, making images, making them again."""

from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model

__all__ = ["make", "open_model"]
