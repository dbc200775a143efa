"""The styles that Streamlit's theme does not cover."""

from pathlib import Path

import streamlit as st

_STYLE = Path(__file__).parent / "style.css"


def style() -> None:
    """Puts the style sheet into the page."""
    st.html(f"<style>{_STYLE.read_text(encoding='utf-8')}</style>")
