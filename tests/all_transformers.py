"""Every family of transformers that tests know; a new one is one line here."""

from collections.abc import Mapping

from anima import ANIMA
from chroma import CHROMA
from flux import FLUX
from flux2 import FLUX2
from flux2_dev import FLUX2_DEV
from flux3 import FLUX3, FLUX3_DISTILLED
from flux_kontext import KONTEXT
from ideogram4 import IDEOGRAM4
from krea2 import KREA2
from qwen_image import QWEN_IMAGE
from qwen_image_edit import QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2511
from transformer_families import Family
from z_image import Z_IMAGE

TRANSFORMERS: Mapping[str, Family] = {
    "anima": ANIMA, "chroma": CHROMA, "flux": FLUX, "flux2": FLUX2, "flux3": FLUX3, "ideogram4": IDEOGRAM4,
    "krea2": KREA2, "z-image": Z_IMAGE, "qwen-image": QWEN_IMAGE,
}  # fmt: skip
JOINT = [name for name in TRANSFORMERS if name != "anima"]
"""Families in which text and image attend to each other in one sequence; Anima has cross-attention, as a UNet has."""
MODULAR = ("anima", "flux3", "flux3-distilled")
"""Families that diffusers has as modular pipelines only, which have no callbacks, and no methods but their call."""
OF_THE_SAME_MODEL: Mapping[str, Family] = {
    "kontext": KONTEXT, "flux2-dev": FLUX2_DEV, "qwen-image-edit": QWEN_IMAGE_EDIT,
    "qwen-image-edit-2511": QWEN_IMAGE_EDIT_2511, "flux3-distilled": FLUX3_DISTILLED,
}  # fmt: skip
"""Further pipelines of the transformers above. By default `test_references.py` alone is about them."""
FEW = ("flux", "z-image", "qwen-image")
"""One with two streams and then one, one with one alone, and one with two: for what methods do on any of them."""
EVERY: Mapping[str, Family] = {**TRANSFORMERS, **OF_THE_SAME_MODEL}
"""For parameters of tests."""
