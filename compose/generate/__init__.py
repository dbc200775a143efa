"""From a run to an image: opens models, generates images, and reproduces them."""

from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model

__all__ = ["make", "open_model"]
