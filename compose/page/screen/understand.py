"""Why an image came out as it did: where the model looked for each concept, step by step."""

import streamlit as st

from lora_compose.compose.figures.overlay import heat, masks
from lora_compose.compose.page.screen.state import Visit
from lora_compose.compose.page.text import markdown


def understand_view(here: Visit) -> None:
    """Attention maps and masks of the image that is looked at."""
    picture = here.picture
    if picture is None:
        st.info("Generate an image first.", icon=":material/visibility:")
        return
    attention = picture.attention
    if attention is None:
        st.info("This image has no attention maps. They are kept for images with concepts, unless that "
                "is turned off under “More”.", icon=":material/visibility:")  # fmt: skip
        return
    names = ["All", *(str(step + 1) for step in attention.steps)]
    chosen = st.select_slider("Step", names, key="do.attention.step")
    step = None if chosen == "All" else names.index(chosen) - 1
    left, right = st.columns(2, wrap=False)
    left.image(picture.made.image, width="stretch", alt=picture.run.scene.prompt)
    left.caption("The image")
    right.image(masks(picture.made.image, attention, step), width="stretch", alt="Region ownership")
    right.caption("Region ownership")
    concepts = picture.run.scene.concepts
    for start in range(0, len(concepts), 2):
        for column, i in zip(st.columns(2, wrap=False), range(start, min(start + 2, len(concepts))), strict=False):
            column.image(
                heat(picture.made.image, attention, i, step), width="stretch", alt=f"Attention to {concepts[i].name}"
            )
            column.caption(f"Attention to {markdown(concepts[i].name)}, "
                           f"“{markdown(concepts[i].phrase)}”")  # fmt: skip
    grid = attention.maps.shape[-2:]
    st.caption(
        f"Cross-attention to the words of each concept on the grid of {grid[1]} x {grid[0]} cells, each map scaled to "
        "its own maximum. A cell belongs to a concept where the method says so; otherwise where its map is above half "
        "of its maximum and higher than all others, relative to theirs."
    )
