"""The fields of the screen, by name: a form is written into them, and read from them."""

import math
from collections.abc import Mapping
from typing import Any

import streamlit as st

from lora_compose.compose.page.boxes import fitted, one_more
from lora_compose.compose.page.controls import changed, controls
from lora_compose.compose.page.form import Form, example, read_seeds
from lora_compose.compose.page.labels import label_of
from lora_compose.compose.page.screen.state import PageSession, Row
from lora_compose.compose.page.store import ShownLora
from lora_compose.compose.page.text import page_message
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.pipelines.methods import METHODS
from lora_compose.pipelines.scene.mask_images import in_pixels
from lora_compose.pipelines.scene.scene import Concept, ControlFile, IPAdapterFile, Run
from lora_compose.pipelines.scene.sources import shown
from lora_compose.pipelines.scene.strength import blocks_text, weight_text
from lora_compose.pipelines.support.field_errors import FieldError
from lora_compose.pipelines.support.home import expanded

SET = "set."
"""Prefix of the names of all fields."""

PROMPT, NEGATIVE = "set.prompt", "set.negative"
WIDTH, HEIGHT, BOXED = "set.width", "set.height", "set.boxed"
METHOD, SCHEDULER, STEPS, GUIDANCE, SEEDS = "set.method", "set.scheduler", "set.steps", "set.guidance", "set.seeds"
ATTENTION = "set.attention"
STRENGTH, PAINTED, BRUSH = "set.strength", "set.painted", "set.brush"
ANYWHERE, BOXES = "Anywhere", "Boxes"
AUTOMATIC = "automatic"
ALL, PART = "All of it", "What you paint"
DEFAULT_STRENGTH = 0.7
EDGES = ("left", "top", "right", "bottom")

MOST_WEIGHT, WEIGHT_STEP = 2.0, 0.05
"""Range of the slider of a weight; other weights, and those that change over the steps, are text."""

REFERENCES = {"As its file says": None, "Yes": True, "No": False}
"""Whether a concept acts on reference images, too."""

_TEXTS = ("name", "trigger", "class_word", "prompt", "negative_prompt")


def of_row(row: Row, field: str) -> str:
    """The name of a concept's field."""
    return f"set.concept.{row.number}.{field}"


def of_setting(method: str, name: str) -> str:
    """The name of a method's setting."""
    return f"set.method.{method}.{name}"


def keep(session: PageSession) -> None:
    """Keeps the values of fields that are not on the screen, which Streamlit would drop, and all for a reload."""
    for name in list(st.session_state):
        if str(name).startswith(SET):
            st.session_state[name] = st.session_state[name]
            session.fields[str(name)] = st.session_state[name]


def fill(session: PageSession, form: Form, loras: Mapping[str, ShownLora | None]) -> None:
    """Writes a form into the fields, replacing their values; of missing LoRAs `loras` has None, by concept."""
    values: dict[str, Any] = {
        PROMPT: form.prompt,
        NEGATIVE: form.negative_prompt,
        WIDTH: form.size[0],
        HEIGHT: form.size[1],
        BOXED: BOXES if form.boxed else ANYWHERE,
        METHOD: form.method or AUTOMATIC,
        SCHEDULER: form.scheduler or AUTOMATIC,
        STEPS: form.steps,
        GUIDANCE: float(form.guidance_scale),
        SEEDS: ", ".join(map(str, form.seeds)),
    }
    for method in METHODS:
        given = form.settings if method == form.method else {}
        for control in controls(method):
            name = of_setting(method, control.name)
            if control.name in given or name in st.session_state:
                values[name] = control.shown(given.get(control.name, control.default))
    st.session_state.update(values)
    st.session_state.setdefault(ATTENTION, True)
    st.session_state[STRENGTH] = DEFAULT_STRENGTH if form.strength is None else form.strength
    st.session_state[PAINTED] = PART if form.mask_image is not None else ALL
    st.session_state[BRUSH] = False
    known = session.start is not None and form.image == session.start.path
    session.start = session.start if known else None
    session.references = list(form.references)
    given = [*form.controls, *form.ip_adapters]
    session.guides = [guide for guide in given if session.options.local and expanded(guide.image).is_file()]
    session.rows = []
    for concept in form.concepts:
        # The path of a mask in somebody's image is not opened for others than the owner of this machine.
        mask = concept.region if isinstance(concept.region, str) and session.options.local else None
        add(session, concept, loras.get(concept.name), form.size, wanted=shown(concept.lora), mask=mask)


def add(
    session: PageSession,
    concept: Concept,
    lora: ShownLora | None,
    size: tuple[int, int],
    wanted: str = "",
    mask: str | None = None,
) -> Row:
    """Adds a concept with its fields filled in."""
    row = session.new_row(lora, wanted, mask, concept.alpha, bystander=concept.is_bystander)
    known = {"trigger": lora.trigger, "class_word": lora.class_word} if lora is not None else {}
    for field in _TEXTS:
        value = getattr(concept, field)
        st.session_state[of_row(row, field)] = known.get(field, "") if value is None else value
    st.session_state[of_row(row, "weight")], st.session_state[of_row(row, "schedule")] = _weight_fields(concept.weight)
    st.session_state[of_row(row, "blocks")] = blocks_text(concept.blocks)
    st.session_state[of_row(row, "any_weight")] = bool(concept.any_weight)
    st.session_state[of_row(row, "style")] = concept.is_style
    acts = next(label for label, value in REFERENCES.items() if value is concept.references)
    st.session_state[of_row(row, "references")] = acts
    box = in_pixels(concept.region, *size) if isinstance(concept.region, tuple) else (0, 0, *size)
    set_box(row, box)
    return row


def clear_example(session: PageSession) -> bool:
    """Removes LoRAs of the playgrounds that do not fit, and the example's prompt; without concepts, the method too.

    Returns:
        Whether no concept is left.
    """
    ours = [row for row in session.rows if row.lora is not None and row.lora.source.partition(":")[0] in PLAYGROUNDS]
    gone = [row for row in ours if (fit := session.fit(row)) is not None and fit[2]]
    session.rows = [row for row in session.rows if row not in gone]
    if gone and st.session_state[PROMPT] == example().prompt:
        st.session_state[PROMPT] = ""
    cleared = bool(gone) and not session.rows
    if cleared:
        st.session_state[METHOD] = AUTOMATIC
    return cleared


def place_anew(session: PageSession, row: Row) -> None:
    """Gives the last concept a box of its own, next to the others."""
    others = [other for other in session.rows if other is not row and has_box(other)]
    boxes = one_more([box_of(other) for other in others], *size())
    for placed, box in zip([*others, row], boxes, strict=True):
        set_box(placed, box)


def set_box(row: Row, box: tuple[int, int, int, int]) -> None:
    """Writes a concept's box into its fields."""
    for edge, value in zip(EDGES, box, strict=True):
        st.session_state[of_row(row, edge)] = int(value)


def resize(session: PageSession, new: tuple[int, int]) -> None:
    """Makes the canvas larger or smaller, with all boxes."""
    old = size()
    boxes = {row.number: box_of(row) for row in session.rows}
    st.session_state[WIDTH], st.session_state[HEIGHT] = new
    for row in session.rows:
        scaled = [edge * new[i % 2] / old[i % 2] for i, edge in enumerate(boxes[row.number])]
        set_box(row, fitted(scaled, *new))


def size() -> tuple[int, int]:
    """The canvas."""
    return int(st.session_state[WIDTH]), int(st.session_state[HEIGHT])


def boxed() -> bool:
    """Whether concepts have boxes."""
    return st.session_state[BOXED] == BOXES


def without_boxes() -> None:
    """Lets the method be chosen where boxes are switched off and the chosen one needs them."""
    method = st.session_state[METHOD]
    if not boxed() and method != AUTOMATIC and label_of(method).decides == "boxes":
        st.session_state[METHOD] = AUTOMATIC


def with_boxes() -> None:
    """Switches boxes on where the chosen method needs them."""
    if label_of(st.session_state[METHOD]).decides == "boxes":
        st.session_state[BOXED] = BOXES


def box_of(row: Row) -> tuple[int, int, int, int]:
    """A concept's box, made to fit the canvas."""
    return fitted([st.session_state[of_row(row, edge)] for edge in EDGES], *size())


def is_style(row: Row) -> bool:
    """Whether a concept is a style, which has no box."""
    return bool(st.session_state[of_row(row, "style")])


def has_schedule(row: Row) -> bool:
    """Whether a concept's weight is text, and not that of the slider."""
    return bool(st.session_state[of_row(row, "schedule")].strip())


def has_box(row: Row) -> bool:
    """Whether a concept has a box, and neither a mask nor the whole canvas."""
    return row.mask is None and not is_style(row)


def concept_of(row: Row) -> Concept:
    """A concept from its fields.

    Raises:
        ValueError: If it has no name, a weight that cannot be read, or is a bystander without a class word.
    """
    texts = {field: str(st.session_state[of_row(row, field)]).strip() for field in (*_TEXTS, "schedule")}
    if not texts["name"]:
        raise ValueError("A concept has no name. Give it one.")
    if row.bystander and not texts["class_word"]:
        raise ValueError(f"{texts['name']} has no class word. Type the noun that names it in the prompt.")
    of_all = {
        "name": texts["name"],
        "class_word": texts["class_word"],
        "region": None if is_style(row) else row.mask or box_of(row),
        "prompt": texts["prompt"] or None,
        "negative_prompt": texts["negative_prompt"] or None,
    }
    try:
        if row.bystander:
            return Concept(**of_all, role="bystander")
        return Concept(
            **of_all,
            lora=None if row.lora is None else row.lora.source,
            trigger=texts["trigger"],
            weight=texts["schedule"] or round(st.session_state[of_row(row, "weight")], 4),
            blocks=st.session_state[of_row(row, "blocks")].strip() or None,
            any_weight=bool(st.session_state[of_row(row, "any_weight")]) or None,
            role="style" if is_style(row) else None,
            references=REFERENCES[st.session_state[of_row(row, "references")]],
            alpha=row.alpha,
        )
    except FieldError as error:
        raise ValueError(f"{texts['name']}: {page_message('; '.join(error.messages))}") from error


def form(session: PageSession) -> Form:
    """The form from the fields; raises ValueError if they say nothing that can be used; the message says where."""
    missing = [row.wanted for row in session.rows if row.missing]
    if missing:
        raise ValueError(f"LoRAs are missing: {', '.join(missing)}. Upload or download them, or remove these concepts.")
    if unfit := [fit[2] for row in session.rows if (fit := session.fit(row)) is not None and fit[2]]:
        raise ValueError("\n".join(unfit))
    method = None if st.session_state[METHOD] == AUTOMATIC else st.session_state[METHOD]
    if session.rows and not boxed() and method and label_of(method).decides == "boxes":
        raise ValueError(f"“{label_of(method).name}” needs boxes: choose “{BOXES}” above the image, or another method.")
    start, paints = session.start, st.session_state[PAINTED] == PART
    if start is not None and start.size != size():
        width, height = start.size
        raise ValueError(
            f"The image to start from has {width} x {height} pixels: choose that size, or remove the image."
        )
    if start is not None and paints and start.mask is None:
        raise ValueError("Paint over the part that is to change: turn on “Brush” above the image.")
    return Form(
        image=None if start is None else start.path,
        mask_image=start.mask if start is not None and paints else None,
        strength=None if start is None else round(st.session_state[STRENGTH], 4),
        references=tuple(session.references) if session.model.reads_references else (),
        controls=tuple(guide for guide in session.guides if isinstance(guide, ControlFile)),
        ip_adapters=tuple(guide for guide in session.guides if isinstance(guide, IPAdapterFile)),
        choice=session.model.choice,
        prompt=st.session_state[PROMPT],
        negative_prompt=st.session_state[NEGATIVE],
        concepts=tuple(concept_of(row) for row in session.rows),
        boxed=boxed(),
        size=size(),
        method=method if session.rows else None,
        settings=settings(method) if method and session.rows else {},
        scheduler=None if st.session_state[SCHEDULER] == AUTOMATIC else st.session_state[SCHEDULER],
        steps=int(st.session_state[STEPS]),
        guidance_scale=float(st.session_state[GUIDANCE]),
        seeds=read_seeds(st.session_state[SEEDS]),
    )


def changed_from(session: PageSession, run: Run) -> list[str]:
    """The fields that differ from a run after they were filled with it, one line each."""
    changes: dict[str, tuple[Any, Any]] = {
        "prompt": (run.scene.prompt, st.session_state[PROMPT]),
        "negative prompt": (run.scene.negative_prompt, st.session_state[NEGATIVE]),
    }
    for concept, row in zip(run.scene.concepts, session.rows, strict=True):
        now = concept_of(row)
        for name in type(concept).model_fields.keys() - {"lora", "merge", "role"}:
            before = getattr(concept, name)
            # what an image leaves open is filled in without a note, except regions
            if before is not None or (name == "region" and boxed() and not is_style(row)):
                changes[f"{name.replace('_', ' ')} of {concept.name}"] = before, getattr(now, name)
    return [
        f"The {name} was {_short(before)} and is {_short(now)} here."
        for name, (before, now) in changes.items()
        if before != now
    ]


def _weight_fields(weight: Any) -> tuple[float, str]:
    """The slider and the text of a weight, of which one is used."""
    weight = 1.0 if weight is None else weight
    plain = isinstance(weight, int | float) and 0 <= weight <= MOST_WEIGHT
    if plain and math.isclose(weight / WEIGHT_STEP, round(weight / WEIGHT_STEP), abs_tol=1e-9):
        return float(weight), ""
    return 1.0, weight_text(weight)


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"“{text}”" if isinstance(value, str) else text


def settings(method: str) -> dict[str, Any]:
    """A method's settings that differ from its defaults; raises ValueError if the method does not take them."""
    keys = {control.name: of_setting(method, control.name) for control in controls(method)}
    shown = {name: st.session_state[key] for name, key in keys.items() if key in st.session_state}
    try:
        return changed(method, shown)
    except ValueError as error:
        raise ValueError(page_message(str(error), method)) from error
