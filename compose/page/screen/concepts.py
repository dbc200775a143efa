"""The concepts: their LoRAs, their names, and what is wrong with them."""

import logging
from collections.abc import Callable
from pathlib import Path

import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.page.form import MOST_CONCEPTS, MOST_NAME, MOST_TEXT, free_name
from lora_compose.compose.page.open_models import Busy
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.picker import picker_part
from lora_compose.compose.page.screen.state import FILE_PATIENCE, PageSession, Row, discard, reading
from lora_compose.compose.page.screen.uploads import remove, show_problems
from lora_compose.compose.page.store import UPLOAD_LIMIT, ShownLora, is_on_hub, named, tile
from lora_compose.compose.page.text import markdown, markup
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.scene.scene import Concept

logger = logging.getLogger(__name__)

_PLACE = "concepts"
_MOST_PROPOSALS = 3
_MB = 2**20


def concepts_part(session: PageSession) -> None:
    """A card for every concept, and ways to add more."""
    _adding(session)
    show_problems(session, _PLACE)
    for i, row in enumerate(list(session.rows)):
        _card(session, i, row)
    if not session.rows:
        st.info("No concepts: the model generates a plain image. Add a LoRA to compose.", icon=":material/add_circle:")


def _card(session: PageSession, i: int, row: Row) -> None:
    with st.container(border=True, key=f"card_{row.number}", gap="xsmall"):
        st.html(f"<style>.st-key-card_{row.number} {{ border-left: 5px solid {colour(i)} !important; }}</style>")
        if row.bystander:
            _bystander(session, i, row)
        else:
            _with_lora(session, i, row)


def _bystander(session: PageSession, i: int, row: Row) -> None:
    result, name, noun = st.columns([1, 3, 3], vertical_alignment="center", wrap=False)
    result.image(tile(i), width=64, alt="Its colour")
    _text(name, row, "name")
    _text(noun, row, "class_word", "The noun that names it in the prompt, where it follows no trigger.")
    with st.container(horizontal=True, vertical_alignment="center", wrap=False):
        st.caption("A bystander: it has no LoRA, and those of others keep off.")
        with st.popover("More"):
            _own_prompts(row, "Prompt of its box, with the class word, for methods with a text per box. Empty: made "
                              "from the prompt.")  # fmt: skip
        _remove_button(session, row)


def _with_lora(session: PageSession, i: int, row: Row) -> None:
    lora = row.lora
    result, name, trigger, noun = st.columns([1, 2, 2, 2], vertical_alignment="center", wrap=False)
    result.image((lora.thumbnail if lora else None) or tile(i), width=64, alt="What it was trained on")
    _text(name, row, "name")
    _text(trigger, row, "trigger", "The rare word or words that the LoRA was trained with, without the class word.")
    _text(noun, row, "class_word", "The plain noun that follows the trigger in the prompt.")
    if lora is not None and not fields.is_style(row):
        _proposals(row, lora)
    with st.container(horizontal=True, vertical_alignment="center", wrap=False):
        st.slider("Weight", 0.0, fields.MOST_WEIGHT, step=fields.WEIGHT_STEP, key=fields.of_row(row, "weight"),
                  format="weight %.2f", label_visibility="collapsed",
                  disabled=fields.has_schedule(row))  # fmt: skip
        with st.popover("More"):
            _details(session, row)
        _remove_button(session, row)
    if about := _about(session, row):
        st.html(f'<div class="lc-file">{about}</div>')
    if row.lora is None and is_on_hub(row.wanted):
        st.warning(f"This LoRA is in a repository on the hub: {markdown(row.wanted)}. Download it if you trust it.",
                   icon=":material/cloud_download:")  # fmt: skip
        st.button("Download it from the hub", key=f"do.hub.{row.number}", on_click=_picked,
                  args=(session, [row.wanted]), icon=":material/download:")  # fmt: skip
    elif row.lora is None:
        st.error(f"This LoRA is missing: {markdown(row.wanted)}. Upload it, or remove the concept.")
    elif (fit := session.fit(row)) is not None and fit[2]:
        st.error("This LoRA does not fit the open model.", icon=":material/error:")  # reason: at the button


def _text(column: DeltaGenerator, row: Row, field: str, text: str | None = None) -> None:
    label = field.replace("_", " ").capitalize()
    column.text_input(label, key=fields.of_row(row, field), max_chars=MOST_NAME, help=text)


def _remove_button(session: PageSession, row: Row) -> None:
    st.button("Remove", key=f"do.remove.{row.number}", on_click=remove, args=(session.rows, row),
              icon=":material/delete:")  # fmt: skip


def _proposals(row: Row, lora: ShownLora) -> None:
    """Buttons with words of the file, for the first of trigger and class word that is empty."""
    for field, label, candidates in (
        ("trigger", "Trigger", lora.triggers),
        ("class_word", "Class word", lora.class_words),
    ):
        key = fields.of_row(row, field)
        if st.session_state[key].strip():
            continue
        short = [candidate for candidate in candidates if len(candidate.words) <= MOST_NAME][:_MOST_PROPOSALS]
        with st.container(horizontal=True):
            for i, candidate in enumerate(short):
                st.button(markdown(f"{label} “{candidate.words}”, {candidate.where}"),
                          key=f"do.{field}.{row.number}.{i}", on_click=st.session_state.update,
                          args=({key: candidate.words},))  # fmt: skip
        return


def _details(session: PageSession, row: Row) -> None:
    st.text_input("Weight that changes over the steps", key=fields.of_row(row, "schedule"), max_chars=MOST_TEXT, help=(
        "Used instead of the slider: “1..0.4” falls linearly, “0:1,0.5:0” is off in the second half, “1,0.5,0” sets "
        "equal parts."
    ))  # fmt: skip
    st.text_input("Weight by block", key=fields.of_row(row, "blocks"), max_chars=MOST_TEXT, help=(
        "Factors on parts of the LoRA, e.g. “down:0.5,mid:1,up.1:0,text:0”. Empty: 1 everywhere."
    ))  # fmt: skip
    st.checkbox("Any weight: also beyond 10 and -10", key=fields.of_row(row, "any_weight"))
    st.checkbox("A style: it acts everywhere and has no box", key=fields.of_row(row, "style"))
    if session.model.reads_references:
        st.selectbox("Acts on reference images, too", fields.REFERENCES, key=fields.of_row(row, "references"), help=(
            "For LoRAs that were trained to read them, such as control and edit LoRAs."
        ))  # fmt: skip
    _own_prompts(row, "Prompt of its box, with the trigger, for methods with a text per box. Empty: made from the "
                      "prompt.")  # fmt: skip


def _own_prompts(row: Row, text: str) -> None:
    st.text_area("Own prompt", key=fields.of_row(row, "prompt"), height=68, help=text)
    st.text_area("Own negative prompt", key=fields.of_row(row, "negative_prompt"), height=68)


def _about(session: PageSession, row: Row) -> str:
    if row.lora is None:
        return ""
    parts = [row.lora.shown]
    if fields.has_schedule(row):
        parts.append("weight changes over the steps")
    if fields.is_style(row):
        parts.append("style")
    if row.alpha is not None:
        parts.append(f"alpha {row.alpha:g}")
    if row.lora.trained_with:
        parts.append(f"trained with {row.lora.trained_with}")
    fit = session.fit(row)
    if fit is not None and fit[1]:
        parts.append(fit[1])
    return markup(" · ".join(parts))


def _adding(session: PageSession) -> None:
    full = is_full(session)
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key="adding"):
        st.header("Concepts", anchor=False)
        upload = st.popover("Upload LoRAs", icon=":material/upload:", disabled=full)
        ready = st.popover("Choose LoRAs", icon=":material/folder:", disabled=full)
        st.button("Without a LoRA", key="do.bystander", on_click=_add_bystander, args=(session,),
                  icon=":material/person_add:", disabled=len(session.rows) >= MOST_CONCEPTS, help=(
            "Adds a bystander: a subject without a LoRA, such as a second cat beside yours. The LoRAs keep off it."
        ))  # fmt: skip
    with upload:
        key = f"do.upload.{session.uploads}"
        st.file_uploader("safetensors files", type=["safetensors"], accept_multiple_files=True, key=key,
                         on_change=_uploaded, args=(session, key), max_upload_size=UPLOAD_LIMIT // _MB)  # fmt: skip
        st.caption("They stay on this machine until your session ends. Pickles (.pt, .ckpt, .bin) are refused: "
                   "they could run code.")  # fmt: skip
    with ready:
        picker_part(session, _picked)
    if full:
        st.caption(f"{MOST_CONCEPTS} concepts are the maximum.")


def _uploaded(session: PageSession, key: str) -> None:
    files = [file for file in st.session_state[key] if isinstance(file, UploadedFile)]  # others are gone already
    try:
        _add_all(session, [(file.name, lambda file=file: _upload(session, file)) for file in files])
    finally:
        discard(files)


def _picked(session: PageSession, sources: list[str]) -> None:
    _add_all(session, [(source, lambda source=source: _named(source)) for source in sources])


def _upload(session: PageSession, file: UploadedFile) -> ShownLora:
    with reading(FILE_PATIENCE):
        return session.store.add_upload(file.name, file)


def _named(source: str) -> ShownLora:
    if is_on_hub(source):
        find_file(source)  # the download, outside the lock
    with reading(FILE_PATIENCE):
        return named(source)


def _add_all(session: PageSession, wanted: list[tuple[str, Callable[[], ShownLora]]]) -> None:
    """Adds the usable LoRAs, and lists the errors of the others."""
    problems = []
    for name, read in wanted:
        if is_full(session):
            problems.append(f"{MOST_CONCEPTS} concepts are the maximum; {name} and the following are left out.")
            break
        try:
            problems += filter(None, [add_lora(session, read())])
        except Busy:
            problems.append(f"{name} is not read yet: files of other sessions are being read. Try again later.")
        except (ValueError, OSError) as error:
            problems.append(str(error))
        except Exception as error:  # files are not trusted: whatever errors they cause, the page goes on
            logger.exception("a LoRA could not be added")
            problems.append(f"{name} cannot be used ({type(error).__name__}).")
    session.problems[_PLACE] = problems
    session.uploads += 1


def add_lora(session: PageSession, lora: ShownLora) -> str:
    """Adds a concept, or fills one that waits for its LoRA; returns a warning, if there is one."""
    waiting = [row for row in session.rows if row.missing]  # an image has named them
    alike = [row for row in waiting if _stem(row.wanted) == _stem(lora.shown)]
    row = next((row for row in waiting if row.wanted == lora.source), alike[0] if alike else None)
    if row is None:
        concept = lora.concept(free_name(_stem(lora.shown), _names(session)))
        fields.place_anew(session, fields.add(session, concept, lora, fields.size()))
        return ""
    row.lora = lora
    for field, known in (("trigger", lora.trigger), ("class_word", lora.class_word)):
        st.session_state[fields.of_row(row, field)] = st.session_state[fields.of_row(row, field)] or known
    same = row.sha256 in ("", lora.sha256)
    return "" if same else f"{lora.shown} is not the file that the image was made with."


def _add_bystander(session: PageSession) -> None:
    """Adds a card whose class word is still to be typed."""
    if len(session.rows) >= MOST_CONCEPTS:  # the button may be pressed twice before the page is drawn anew
        return
    concept = Concept(name=free_name("other", _names(session)), role="bystander")
    row = fields.add(session, concept, None, fields.size())
    st.session_state[fields.of_row(row, "class_word")] = ""
    fields.place_anew(session, row)


def _names(session: PageSession) -> list[str]:
    return [st.session_state[fields.of_row(row, "name")] for row in session.rows]


def is_full(session: PageSession) -> bool:
    """Whether there is room for no further LoRA."""
    return len(session.rows) >= MOST_CONCEPTS and not any(row.missing for row in session.rows)


def _stem(name: str) -> str:
    return Path(name.rpartition(":")[2]).stem
