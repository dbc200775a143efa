"""Explains an image: what decided where each LoRA acts, and where the model looked for each concept."""

import streamlit as st

from lora_compose.compose.figures.overlay import heat, masks, outlined
from lora_compose.compose.page.labels import Decides, label_of
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.work import Result
from lora_compose.pipelines.scene.mask_images import in_pixels

_DECIDED: dict[Decides, str] = {
    "boxes": "**Your boxes** decided where each LoRA acts.",
    "found areas": "**Areas that the method found** decided where each LoRA acts.",
    "words": "**Words** decided: each LoRA acts on its trigger, in all of the image.",
    "nothing": "**Nothing** was divided: each LoRA acts in all of the image.",
}


def decided_by(result: Result) -> Decides:
    """What decided where each LoRA of an image acts."""
    subjects = [concept for concept in result.run.scene.concepts if not concept.is_style]
    label = label_of(result.run.method or "")
    boxed = [concept.region is not None for concept in subjects]
    if label.keeps_boxes and boxed and all(boxed) and result.run.settings.get("keep_regions", True):
        return "boxes"
    if label.decides == "found areas" and len(subjects) < 2:
        return "nothing"  # there is nothing to tell apart
    return "nothing" if label.decides == "boxes" and not any(boxed) else label.decides


def understand_view(session: PageSession) -> None:
    """The reason why each LoRA acted where it did, and the attention maps, of the image on the canvas."""
    result = session.result
    if result is None or not result.run.scene.concepts:
        st.info("Generate an image with concepts first.", icon=":material/visibility:")
        return
    attention, decides = result.attention, decided_by(result)
    step = None
    if attention is not None:
        names = ["All", *(str(step + 1) for step in attention.steps)]
        chosen = st.select_slider("Step", names, key="do.attention.step")
        step = None if chosen == "All" else names.index(chosen) - 1
    left, right = st.columns(2, wrap=False)
    left.image(result.jpeg, width="stretch", alt=result.run.scene.prompt)
    left.caption("The image")
    concepts = result.run.scene.concepts
    if decides == "boxes":
        size = result.made.image.size
        boxes = [
            in_pixels(concept.region, *size) if isinstance(concept.region, tuple) else None for concept in concepts
        ]
        right.image(outlined(result.made.image, boxes), width="stretch", alt="The boxes over the image")
    elif decides == "found areas" and attention is not None:
        right.image(masks(result.made.image, attention, step), width="stretch", alt="The areas over the image")
    right.caption(_DECIDED[decides])
    _exceptions(result, decides)
    if attention is None:
        st.info("Where the model looked was not kept for this image: it is turned off under “Negative prompt, "
                "scheduler”.", icon=":material/visibility:")  # fmt: skip
        return
    for start in range(0, len(concepts), 2):
        for column, i in zip(st.columns(2, wrap=False), range(start, min(start + 2, len(concepts))), strict=False):
            column.image(
                heat(result.made.image, attention, i, step), width="stretch", alt=f"Attention to {concepts[i].name}"
            )
            column.caption(f"Where the model looked for {markdown(concepts[i].name)}, “{markdown(concepts[i].phrase)}”")
    grid = attention.maps.shape[-2:]
    role = " The areas follow from it." if decides == "found areas" else ""
    st.caption(f"Cross-attention to the words of each concept, on a grid of {grid[1]} x {grid[0]} cells, each map "
               f"scaled to its own maximum.{role}")  # fmt: skip


def _exceptions(result: Result, decides: Decides) -> None:
    """Sentences about concepts for which something else decided."""
    if decides != "boxes":
        return
    for concept in result.run.scene.concepts:
        if concept.region is None:
            st.caption(f"{markdown(concept.name)} has no box and acts in all of the image.")
        elif isinstance(concept.region, str):
            st.caption(f"{markdown(concept.name)} has a mask file instead of a box: {markdown(concept.region)}")
