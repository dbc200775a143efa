"""Buttons of an image: save it, enlarge it, vary it, and load its settings."""

from dataclasses import replace

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.files.images import Record, save_image
from lora_compose.compose.generate.machine import devices
from lora_compose.compose.page.form import FACTORS, form_of, variations
from lora_compose.compose.page.open_models import Busy, ModelChoice
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.model import take_over
from lora_compose.compose.page.screen.state import FILE_PATIENCE, MOST_WAITING, PageSession, reading
from lora_compose.compose.page.screen.uploads import upload_field
from lora_compose.compose.page.store import dropped, is_on_hub, located, located_references
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.work import Result
from lora_compose.pipelines.scene.scene import Run
from lora_compose.pipelines.scene.sources import shown

_PLACE = "restore"


def keep_buttons(session: PageSession, result: Result) -> None:
    """The buttons of an image."""
    with st.container(horizontal=True, gap="xsmall"):
        st.download_button("Download", session.png(result), f"{result.run.seed}.png", "image/png",
                           key=f"do.download.{result.key}", icon=":material/download:", on_click="ignore",
                           help="A PNG with everything needed to reproduce it.")  # fmt: skip
        st.button("Save to the shared folder", key=f"do.keep.{result.key}", on_click=_keep, args=(session, result),
                  icon=":material/save:",
                  help="Copies it to the folder of this page. Everyone who opens the page can see it.")  # fmt: skip
        st.button("Use its settings", key=f"do.reuse.{result.key}", on_click=reuse, args=(session, result.made.record),
                  icon=":material/undo:")  # fmt: skip
        if st.button("Zoom", key=f"do.zoom.{result.key}", icon=":material/zoom_in:"):
            _zoomed(result)
        varied = variations(result.run)
        st.button("Variations of this seed", key=f"do.vary.{result.key}", on_click=_vary, args=(session, varied),
                  icon=":material/auto_awesome_motion:",
                  disabled=not varied or result.run.model != session.model.choice.model
                  or len(session.waiting) >= MOST_WAITING, help=(
            f"{len(FACTORS)} images from the same start noise, with the weights of all LoRAs times "
            f"{', '.join(f'{factor:g}' for factor in FACTORS)}."
        ))  # fmt: skip


@st.dialog("Image", width="large")
def _zoomed(result: Result) -> None:
    st.image(result.jpeg, width="stretch", alt=result.run.scene.prompt)


def _vary(session: PageSession, runs: list[Run]) -> None:
    session.begin(runs, [None] * len(runs), comparing=False, record_attention=st.session_state[fields.ATTENTION])


def restoring(session: PageSession) -> None:
    """The upload field for an image whose settings are loaded."""
    with st.expander("Load settings from a PNG", icon=":material/image_search:"):
        upload_field(session, _PLACE, "Drop a PNG made by lora-compose", _take, ["png"])
    for problem in session.problems.get(_PLACE, []):
        st.warning(markdown(problem), icon=":material/image_search:")


def restore(session: PageSession, record: Record) -> None:
    """Sets every field to its value in an image's record, and lists those that could not be set.

    Raises:
        ValueError: If it is beyond the page's limits, or its model cannot be opened; nothing has changed then.
    """
    run = record.run
    references = located_references(record, session.store.images, local=session.options.local)
    form = replace(form_of(run, session.model.size), references=references)
    device = run.device if run.device in devices() else None
    with reading(FILE_PATIENCE):
        loras = located(record, session.store.uploads, session.options.loras, local=session.options.local)
    memory = session.model.choice.memory_for(run.model, device)
    is_open = take_over(session, ModelChoice(run.model, run.dtype, _same_device(session, device), memory, run.quantize))
    fields.fill(session, form, loras)
    for concept, row in zip(run.scene.concepts, session.rows, strict=True):
        row.sha256 = sha256 if isinstance(sha256 := record.sha256.get(concept.name), str) else ""
    notes = fields.changed_from(session, run)
    pairs = zip(run.scene.concepts, session.rows, strict=True)
    gone = {concept.name: shown(concept.lora) for concept, row in pairs if row.missing}
    if missing := [name for name, source in gone.items() if not is_on_hub(source)]:
        notes.append(f"The settings are loaded, but LoRAs are missing: {', '.join(missing)}.")
    if on_hub := [f"{name} ({source})" for name, source in gone.items() if is_on_hub(source)]:
        notes.append(f"LoRAs are in repositories on the hub: {', '.join(on_hub)}. Nothing is downloaded until you "
                     "press the button of the concept.")  # fmt: skip
    if not is_open:
        notes.append(f"It was made with the model {run.model} in {run.dtype}, which is not open. It is filled in under "
                     "“Model”: open it there if you trust it.")  # fmt: skip
    if form.image is not None and session.start is None:
        notes.append("The image that it started from is not here: drop it under “Start from an image”.")
    if len(references) < len(run.scene.references):
        notes.append("Reference images are not here, or are others now: drop them under “Reference images”.")
    if len(session.guides) < len(form.controls) + len(form.ip_adapters):
        notes.append("Control images or images of IP-Adapters are not here: add them under “Guide with another image”.")
    if run.scene.padding_mask_crop is not None:
        notes.append("It enlarged the part around its mask, which this page does not.")
    if run.device is not None and device is None:
        notes.append(f"It was made on {run.device}, which this machine does not have.")
    if not session.options.local and any(isinstance(concept.region, str) for concept in run.scene.concepts):
        notes.append("It has mask files, which cannot be opened from here; boxes replace them.")
    session.problems[_PLACE] = notes


def _same_device(session: PageSession, device: str | None) -> str | None:
    """The device as the open model names it, so that the same model is not opened twice."""
    chosen = session.model.choice.device
    return chosen if chosen is None and (device is None or device == devices()[0]) else device


def _take(session: PageSession, file: UploadedFile) -> None:
    reuse(session, dropped(file.name, file))


def reuse(session: PageSession, record: Record) -> None:
    """Sets every field from an image's record, or shows why it cannot."""
    try:
        restore(session, record)
    except Busy:
        session.problems[_PLACE] = ["Nothing is set yet: files of other sessions are being read. Try again later."]
    except (ValueError, OSError) as error:
        session.problems[_PLACE] = str(error).splitlines()


def _keep(session: PageSession, result: Result) -> None:
    try:
        to = save_image(result.made.image, session.options.images / f"{result.run.seed}.png", result.made.record)
    except OSError as error:  # a full disk, a folder that may not be written
        st.toast(f"Not saved: {markdown(str(error))}", icon=":material/error:")
        return
    st.toast(f"Saved as {markdown(str(to))}", icon=":material/save:")
