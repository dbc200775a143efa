"""The looks that Streamlit's theme does not cover."""

from pathlib import Path

import streamlit as st

_STYLE = Path(__file__).parent / "style.css"


def style() -> None:
    """Puts the style sheet into the page."""
    st.html(f"<style>{_STYLE.read_text(encoding='utf-8')}</style>")


def heading() -> None:
    """The name of the page, and what it is for."""
    st.html('<header class="lc-head"><h1>lora-compose</h1><p>Several concept LoRAs in one image, each with its '
            "own identity.</p></header>")  # fmt: skip
