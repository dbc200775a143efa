"""Where concepts are to be: nowhere in particular, or each in its box."""

from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.page.boxes import TEMPLATES, fitted, template
from lora_compose.compose.page.draft import SIDES
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import Row, Visit
from lora_compose.compose.page.text import markdown

_HERE = Path(__file__).parent
_CANVAS = "do.canvas"


def layout_part(here: Visit) -> None:
    """The size of the canvas, and the boxes on it."""
    st.subheader("Layout", anchor=False)
    mode, sides = st.columns([1, 1], vertical_alignment="bottom")
    width, height = sides.columns(2, wrap=False)
    mode.segmented_control("Position of the concepts", [fields.ANYWHERE, fields.IN_BOXES], key=fields.BOXED,
                           required=True, width="stretch")  # fmt: skip
    width.number_input("Width", *SIDES, key=fields.WIDTH, step=8)
    height.number_input("Height", *SIDES, key=fields.HEIGHT, step=8)
    if not fields.boxed() or not here.rows:
        return
    with st.container(horizontal=True):
        for name in TEMPLATES:
            st.button(name, key=f"do.template.{name}", on_click=_apply, args=(here, name))
    boxes = [(i, row) for i, row in enumerate(here.rows) if _has_box(row)]
    _canvas(here, boxes)
    _masks(here)
    with st.expander("Box coordinates in pixels", icon=":material/pin:"):
        for _, row in boxes:
            _numbers(row)


def _apply(here: Visit, name: str) -> None:
    rows = [row for row in here.rows if _has_box(row)]
    if not rows:
        return
    for row, box in zip(rows, template(name, len(rows), *fields.size()), strict=True):
        fields.set_box(row, box)


def _has_box(row: Row) -> bool:
    return row.mask is None and not fields.is_style(row)


def _numbers(row: Row) -> None:
    st.caption(markdown(str(st.session_state[fields.of_row(row, "name")])))
    for column, edge in zip(st.columns(4, wrap=False), fields.EDGES, strict=True):
        column.number_input(edge.capitalize(), 0, SIDES[1], key=fields.of_row(row, edge), step=8)


def _masks(here: Visit) -> None:
    for row in here.rows:
        if row.mask is not None:
            name = markdown(str(st.session_state[fields.of_row(row, "name")]))
            st.caption(f"{name} has a mask file instead of a box: {markdown(row.mask)}")
            st.button("Use a box instead", key=f"do.unmask.{row.number}", on_click=_unmask, args=(row,))


def _unmask(row: Row) -> None:
    row.mask = None


def _canvas(here: Visit, boxes: list[tuple[int, Row]]) -> None:
    """The canvas on which boxes are drawn, dragged and moved by keys; the fields of the numbers hold the truth."""
    width, height = fields.size()
    data = {
        "width": width,
        "height": height,
        "boxes": [
            {
                "id": row.number,
                "name": str(st.session_state[fields.of_row(row, "name")]) or "?",
                "colour": colour(i),
                "box": list(fields.box_of(row)),
            }
            for i, row in boxes
        ],
    }
    _component()(key=_CANVAS, data=data, on_drawn_change=lambda: _drawn(here))
    st.caption("Drag a box to move it, its corners to resize it; drag on an empty area to redraw the selected box. "
               "Keyboard: Tab selects a box, arrows move it, Shift and arrows resize it.")  # fmt: skip


def _drawn(here: Visit) -> None:
    drawn = st.session_state[_CANVAS].get("drawn")
    if not isinstance(drawn, dict):
        return
    row = next((row for row in here.rows if row.number == drawn.get("id")), None)
    if row is not None and _is_box(drawn.get("box")):
        fields.set_box(row, fitted(drawn["box"], *fields.size()))


def _is_box(value: Any) -> bool:
    """A browser may send anything."""
    return isinstance(value, list) and len(value) == 4 and all(isinstance(edge, int | float) and abs(edge) < 1e6
                                                               for edge in value)  # fmt: skip


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return component(
        "lora_compose_boxes",
        html='<div class="stage" role="group" aria-label="Boxes of the concepts"></div>',
        css=(_HERE / "canvas.css").read_text(encoding="utf-8"),
        js=(_HERE / "canvas.js").read_text(encoding="utf-8"),
    )
