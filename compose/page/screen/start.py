"""An image to start from, and the mask that is painted over it."""

from base64 import b64encode
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.screen.uploads import show_problems, upload_field
from lora_compose.compose.page.store import StartImage
from lora_compose.compose.page.text import markdown
from lora_compose.pipelines.scene.mask_images import URI_PREFIX

_PLACE = "start"
_LARGER = 1.5  # times the side that a model was made for


def start_part(session: PageSession) -> None:
    """The upload field for a start image, and its settings."""
    start = session.start
    with st.expander("Start from an image", icon=":material/add_photo_alternate:", expanded=start is not None):
        if start is None:
            upload_field(session, _PLACE, "Drop an image that your subjects are put into", _take)
        else:
            left, right = st.columns([1, 3], vertical_alignment="center", wrap=False)
            left.image(start.path, width="stretch", alt="The image to start from")
            right.caption(markdown(f"{start.shown}, {start.size[0]} x {start.size[1]} pixels"))
            right.button(
                "Remove the image", key="do.unstart", on_click=_remove, args=(session,), icon=":material/delete:"
            )
            st.slider("Strength: how much changes", 0.05, 1.0, step=0.05, key=fields.STRENGTH, help=(
                "The share of the steps that are run. At 1 only what is outside of the mask is left of the image."
            ))  # fmt: skip
            st.segmented_control("What is repainted", [fields.ALL, fields.PART], key=fields.PAINTED, required=True,
                                 help="Outside of what you paint, every pixel stays.", on_change=_choose)  # fmt: skip
    show_problems(session, _PLACE)


def paints(session: PageSession) -> bool:
    """Whether only the part of an image is repainted that was painted with the brush."""
    return session.start is not None and st.session_state[fields.PAINTED] == fields.PART


def painting(session: PageSession) -> bool:
    """Whether the brush is on."""
    return paints(session) and bool(st.session_state[fields.BRUSH])


def painted(session: PageSession) -> dict[str, Any] | None:
    """The mask that the canvas shows while the brush is on; None while it is off."""
    if session.start is None or not painting(session):
        return None
    if session.start.mask is None:
        return {"key": session.start.path, "mask": None}
    data = b64encode(Path(session.start.mask).read_bytes()).decode("ascii")
    return {"key": session.start.mask, "mask": URI_PREFIX + data}


def keep_mask(session: PageSession, sent: Any) -> None:
    """Takes a mask from the browser, which may send anything."""
    if session.start is None or not isinstance(sent, str) or not sent.startswith(URI_PREFIX):
        return
    try:
        session.start = session.store.add_mask(session.start, sent)
    except ValueError as error:
        session.problems[_PLACE] = [str(error)]


def unpaint(session: PageSession) -> None:
    """Removes the mask."""
    if session.start is not None:
        session.start = StartImage(session.start.path, session.start.shown, session.start.size)


def start_image(start: StartImage) -> Image.Image:
    """The image to start from."""
    with Image.open(start.path) as image:
        return image.convert("RGB")


def _take(session: PageSession, file: UploadedFile) -> None:
    model, side = session.model, round(_LARGER * max(session.model.size))
    session.start = session.store.add_image(file.name, file, side, model.cell, model.size_from_start)
    fields.resize(session, session.start.size)
    session.shown = ""


def _choose() -> None:
    st.session_state[fields.BRUSH] = st.session_state[fields.PAINTED] == fields.PART


def _remove(session: PageSession) -> None:
    session.start = None
    st.session_state[fields.BRUSH] = False
