"""Every family of transformers that tests know; a new one is one line here."""

from collections.abc import Mapping

from anima import ANIMA
from flux import FLUX
from flux2 import FLUX2
from krea2 import KREA2
from qwen_image import QWEN_IMAGE
from transformer_families import Family
from z_image import Z_IMAGE

TRANSFORMERS: Mapping[str, Family] = {
    "anima": ANIMA, "flux": FLUX, "flux2": FLUX2, "krea2": KREA2, "z-image": Z_IMAGE, "qwen-image": QWEN_IMAGE
}  # fmt: skip
JOINT = [name for name in TRANSFORMERS if name != "anima"]
"""Families in which text and image attend to each other in one sequence; Anima has cross-attention, as a UNet has."""
