"""The canvas: the image with the boxes of the concepts over it, where they are drawn, dragged and moved by keys."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image
from streamlit.components.v2 import component

from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.page.boxes import TEMPLATES, fitted, template
from lora_compose.compose.page.form import SIDES, example
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.start import keep_mask, painted, painting, paints, unpaint
from lora_compose.compose.page.screen.state import PageSession, Row
from lora_compose.compose.page.text import markdown

_HTML = Path(__file__).parent / "canvas.html"
_CANVAS, _DRAWN, _SHOWN = "do.canvas", "do.drawn", "set.outlines"
_SIDE = 1024  # pixels of the longer side that are sent to the browser


def position_part(session: PageSession) -> None:
    """Whether concepts have boxes, and ways to arrange them."""
    if not session.rows and not paints(session):
        return
    st.session_state.setdefault(_SHOWN, True)
    with st.container(horizontal=True, vertical_alignment="center", key="position"):
        if paints(session):
            st.toggle("Brush", key=fields.BRUSH, help="Paint over the part of the image that is to change.")
            st.button("Clear what you painted", key="do.unpaint", on_click=unpaint, args=(session,),
                      disabled=session.start is None or session.start.mask is None)  # fmt: skip
        if not session.rows:
            return
        st.segmented_control("Position of the concepts", [fields.ANYWHERE, fields.BOXES], key=fields.BOXED,
                             required=True, label_visibility="collapsed", on_change=fields.without_boxes)  # fmt: skip
        if fields.boxed():
            with st.popover("Arrange", icon=":material/dashboard:"):
                _arranging(session)
            st.toggle("Show boxes", key=_SHOWN)


def canvas(session: PageSession, image: Image.Image | None, alt: str) -> None:
    """The image, or an empty canvas, with the boxes, whose coordinates are kept in the fields."""
    if st.session_state.pop(_DRAWN, False):
        st.rerun()  # the whole page, since this part may have been rerun alone
    width, height = fields.size()
    shown = fields.boxed() and st.session_state[_SHOWN] if session.rows and not painting(session) else False
    data = {
        "width": width,
        "height": height,
        "image": _sent(session, image),
        "alt": alt,
        "next": what_next(st.session_state[fields.PROMPT]),
        "paint": painted(session),
        "boxes": [
            {
                "id": row.number,
                "name": str(st.session_state[fields.of_row(row, "name")]) or "?",
                "colour": colour(i),
                "box": list(fields.box_of(row)),
            }
            for i, row in (_with_boxes(session) if shown else [])
        ],
    }
    page_component("canvas", _HTML.read_text(encoding="utf-8"))(
        key=_CANVAS, data=data, on_drawn_change=lambda: _drawn(session), on_mask_change=lambda: _masked(session)
    )  # fmt: skip


def what_next(prompt: str) -> str:
    """What to do for an image."""
    if prompt == example().prompt:
        return "An example is filled in: press Generate, and change what you like."
    return "Press Generate." if prompt.strip() else "Write a prompt and add LoRAs, then press Generate."


def _arranging(session: PageSession) -> None:
    with st.container(horizontal=True):
        for name in TEMPLATES:
            st.button(name, key=f"do.template.{name}", on_click=_apply, args=(session, name))
    st.caption("Drag a box to move it, its corners to resize it; drag on an empty area to redraw the selected box. "
               "Keyboard: Tab selects a box, arrows move it, Shift and arrows resize it.")  # fmt: skip
    _masks(session)
    for _, row in _with_boxes(session):
        st.caption(f"{markdown(str(st.session_state[fields.of_row(row, 'name')]))}, in pixels")
        for column, edge in zip(st.columns(4, wrap=False), fields.EDGES, strict=True):
            column.number_input(edge.capitalize(), 0, SIDES[1], key=fields.of_row(row, edge), step=8)


def _apply(session: PageSession, name: str) -> None:
    rows = [row for _, row in _with_boxes(session)]
    for row, box in zip(rows, template(name, len(rows), *fields.size()) if rows else [], strict=True):
        fields.set_box(row, box)


def _with_boxes(session: PageSession) -> list[tuple[int, Row]]:
    """The concepts with boxes, each with its index among all, which is that of its colour."""
    return [(i, row) for i, row in enumerate(session.rows) if fields.has_box(row)]


def _masks(session: PageSession) -> None:
    for row in session.rows:
        if row.mask is not None:
            name = markdown(str(st.session_state[fields.of_row(row, "name")]))
            st.caption(f"{name} has a mask file instead of a box: {markdown(row.mask)}")
            st.button("Use a box instead", key=f"do.unmask.{row.number}", on_click=setattr, args=(row, "mask", None))


def _drawn(session: PageSession) -> None:
    drawn = st.session_state[_CANVAS].get("drawn")
    if not isinstance(drawn, dict):
        return
    row = next((row for row in session.rows if row.number == drawn.get("id")), None)
    if row is not None and _is_box(drawn.get("box")):
        fields.set_box(row, fitted(drawn["box"], *fields.size()))
        st.session_state[_DRAWN] = True


def _masked(session: PageSession) -> None:
    keep_mask(session, st.session_state[_CANVAS].get("mask"))
    st.session_state[_DRAWN] = True


def _is_box(value: Any) -> bool:
    """A browser may send anything."""
    return isinstance(value, list) and len(value) == 4 and all(isinstance(edge, int | float) and abs(edge) < 1e6
                                                               for edge in value)  # fmt: skip


def _sent(session: PageSession, image: Image.Image | None) -> str | None:
    """An image as the browser gets it, encoded once while it is the same."""
    if session.sent[0] is not image:
        session.sent = image, None if image is None else as_uri(image)
    return session.sent[1]


def as_uri(image: Image.Image) -> str:
    """An image as a data URI, in a size that is sent quickly."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=92)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode('ascii')}"


@st.cache_resource(show_spinner=False)
def page_component(name: str, html: str) -> Any:
    """A component with the style sheet and the script of this name."""
    css, js = ((Path(__file__).parent / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return component(f"lora_compose_{name}", html=html, css=css, js=js)
