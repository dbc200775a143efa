"""The top of the page: its name, the model and the size of the image."""

from pathlib import Path

import streamlit as st
from PIL import Image, ImageDraw

from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.page.form import SIDES
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.model import PLACE, model_part
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.screen.uploads import show_problems

_STYLE = Path(__file__).parent / "style.css"
SHAPES = {"Square": (1.0, 1.0), "Portrait": (2 / 3, 1.0), "Landscape": (1.0, 2 / 3)}
"""Widths and heights relative to the side that the model was made for."""


def icon() -> Image.Image:
    """Two boxes in the colours of concepts. Streamlit would load an icon given by name from another host."""
    image = Image.new("RGBA", (64, 64))
    for i, box in enumerate(((2, 8, 34, 56), (30, 2, 62, 50))):
        ImageDraw.Draw(image).rounded_rectangle(box, 10, fill=colour(i))
    return image


def style() -> None:
    """Puts the styles into the page that Streamlit's theme does not cover."""
    st.html(f"<style>{_STYLE.read_text(encoding='utf-8')}</style>")


def top_part(session: PageSession) -> None:
    """The title, the open model, and the size of images."""
    with st.container(horizontal=True, vertical_alignment="center", key="top"):
        st.html('<header class="lc-head"><h1>lora-compose</h1><p>Several concept LoRAs in one image, each with its '
                "own identity.</p></header>", width="stretch")  # fmt: skip
        model_part(session)
        _size(session)
    show_problems(session, PLACE)


def _size(session: PageSession) -> None:
    width, height = fields.size()
    with st.popover(f"Size: **{width} × {height}**", icon=":material/aspect_ratio:"):  # noqa: RUF001
        with st.container(horizontal=True):
            for name, shares in SHAPES.items():
                sides = [round(own * share / 8) * 8 for own, share in zip(session.model.size, shares, strict=True)]
                st.button(name, key=f"do.shape.{name}", on_click=fields.resize, args=(session, tuple(sides)))
        left, right = st.columns(2, wrap=False)
        left.number_input("Width", *SIDES, key=fields.WIDTH, step=8)
        right.number_input("Height", *SIDES, key=fields.HEIGHT, step=8)
        st.caption(f"In pixels. The model was made for {session.model.size[0]} x {session.model.size[1]}.")
