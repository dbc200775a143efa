"""Two images of the same size over each other, with a divider between them."""

from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

from lora_compose.compose.page.screen.canvas import as_uri
from lora_compose.compose.page.work import Result

_HERE = Path(__file__).parent


def wipe(left: Result, right: Result, key: str) -> None:
    """Compares two images by wiping."""
    sides = [{"image": as_uri(result.made.image), "alt": result.run.scene.prompt} for result in (left, right)]
    _component()(key=key, data={"sides": sides, "ratio": left.made.image.width / left.made.image.height})


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return component(
        "lora_compose_wipe",
        html='<div class="wipe"><img /><img class="right" />'
        '<input type="range" min="0" max="100" value="50" aria-label="Divider between the two images" /></div>',
        css=(_HERE / "wipe.css").read_text(encoding="utf-8"),
        js=(_HERE / "wipe.js").read_text(encoding="utf-8"),
    )
