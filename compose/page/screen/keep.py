"""What one does with an image: keep it, look closely, vary it, and have it set everything as when it was made."""

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.files.images import Record, save_image
from lora_compose.compose.generate.machine import devices
from lora_compose.compose.page.draft import FACTORS, draft_of, variations
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.model import take_over
from lora_compose.compose.page.screen.state import FILE_PATIENCE, MOST_WAITING, Visit, checking, discard
from lora_compose.compose.page.shelf import Busy, Choice
from lora_compose.compose.page.store import PNG_LIMIT, dropped, is_on_hub, located
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.work import Picture
from lora_compose.pipelines.scene import Run

_PLACE = "restore"


def keep_buttons(here: Visit, picture: Picture) -> None:
    """What one can do with an image."""
    with st.container(horizontal=True, gap="xsmall"):
        st.download_button("Download", here.png(picture), f"{picture.run.seed}.png", "image/png",
                           key=f"do.download.{picture.key}", icon=":material/download:", on_click="ignore",
                           help="A PNG with everything needed to reproduce it.")  # fmt: skip
        st.button("Save to the shared folder", key=f"do.keep.{picture.key}", on_click=_keep, args=(here, picture),
                  icon=":material/save:",
                  help="Copies it to the folder of this page. Everyone who opens the page can see it.")  # fmt: skip
        st.button("Use its settings", key=f"do.reuse.{picture.key}", on_click=reuse, args=(here, picture.made.record),
                  icon=":material/undo:")  # fmt: skip
        if st.button("Zoom", key=f"do.zoom.{picture.key}", icon=":material/zoom_in:"):
            _zoomed(picture)
        varied = variations(picture.run)
        st.button("Variations of this seed", key=f"do.vary.{picture.key}", on_click=_vary, args=(here, varied),
                  icon=":material/auto_awesome_motion:",
                  disabled=not varied or picture.run.model != here.slot.choice.model
                  or len(here.waiting) >= MOST_WAITING, help=(
            f"{len(FACTORS)} images from the same start noise, with the weights of all LoRAs times "
            f"{', '.join(f'{factor:g}' for factor in FACTORS)}."
        ))  # fmt: skip


@st.dialog("Image", width="large")
def _zoomed(picture: Picture) -> None:
    st.image(picture.made.image, width="stretch", alt=picture.run.scene.prompt)


def _vary(here: Visit, runs: list[Run]) -> None:
    here.begin(runs, [None] * len(runs), comparing=False, record_attention=st.session_state[fields.ATTENTION])


def restoring(here: Visit) -> None:
    """A place to drop an image that sets everything."""
    with st.expander("Load settings from a PNG", icon=":material/image_search:"):
        key = f"do.restore.{here.uploads}"
        st.file_uploader("Drop a PNG made by lora-compose", type=["png"], key=key, on_change=_dropped, args=(here, key),
                         max_upload_size=PNG_LIMIT // 2**20)  # fmt: skip
    for said in here.troubles.get(_PLACE, []):
        st.warning(markdown(said), icon=":material/image_search:")


def restore(here: Visit, record: Record) -> None:
    """Sets every field to its value in an image's record, and lists those that could not be set.

    Raises:
        ValueError: If it is beyond the page's limits, or its model cannot be opened; nothing has changed then.
    """
    run = record.run
    draft = draft_of(run, here.slot.size)
    device = run.device if run.device in devices() else None
    with checking(FILE_PATIENCE):
        loras = located(record, here.store.uploads, here.options.loras, local=here.options.local)
    memory = here.slot.choice.memory_for(run.model, device)
    is_open = take_over(here, Choice(run.model, run.dtype, _same_device(here, device), memory))
    fields.fill(here, draft, loras)
    for concept, row in zip(run.scene.concepts, here.rows, strict=True):
        row.sha256 = record.sha256.get(concept.name, "")
    said = fields.changed_from(here, run)
    gone = {concept.name: concept.lora or "" for concept in run.scene.concepts if loras[concept.name] is None}
    if missing := [name for name, source in gone.items() if not is_on_hub(source)]:
        said.append(f"The settings are loaded, but LoRAs are missing: {', '.join(missing)}.")
    if on_hub := [f"{name} ({source})" for name, source in gone.items() if is_on_hub(source)]:
        said.append(f"LoRAs are in repositories on the hub: {', '.join(on_hub)}. Nothing is downloaded until you press "
                    "the button of the concept.")  # fmt: skip
    if not is_open:
        said.append(f"It was made with the model {run.model} in {run.dtype}, which is not open. It is filled in under "
                    "“Model”: open it there if you trust it.")  # fmt: skip
    if draft.image is not None and here.start is None:
        said.append("The image that it started from is not here: drop it under “Start from an image”.")
    if run.scene.padding_mask_crop is not None:
        said.append("It enlarged the part around its mask, which this page does not.")
    if run.device is not None and device is None:
        said.append(f"It was made on {run.device}, which this machine does not have.")
    if not here.options.local and any(row.mask is not None for row in here.rows):
        said.append("It has mask files, which cannot be opened from here; boxes replace them.")
        for row in here.rows:
            row.mask = None
    here.troubles[_PLACE] = said


def _same_device(here: Visit, device: str | None) -> str | None:
    """The open model's own word for its device, so that the same model is not opened twice."""
    chosen = here.slot.choice.device
    return chosen if chosen is None and (device is None or device == devices()[0]) else device


def _dropped(here: Visit, key: str) -> None:
    file = st.session_state[key]
    if not isinstance(file, UploadedFile):  # taken away again
        return
    here.uploads += 1
    try:
        reuse(here, dropped(file.name, file))
    except ValueError as error:
        here.troubles[_PLACE] = [str(error)]
    finally:
        discard([file])


def reuse(here: Visit, record: Record) -> None:
    """Sets every field as an image's record says, or says why not."""
    try:
        restore(here, record)
    except Busy:
        here.troubles[_PLACE] = ["Nothing is set yet: files of other sessions are being read. Try again later."]
    except (ValueError, OSError) as error:
        here.troubles[_PLACE] = str(error).splitlines()


def _keep(here: Visit, picture: Picture) -> None:
    try:
        to = save_image(picture.made.image, here.options.pictures / f"{picture.run.seed}.png", picture.made.record)
    except OSError as error:  # a full disk, a folder that may not be written
        st.toast(f"Not saved: {markdown(str(error))}", icon=":material/error:")
        return
    st.toast(f"Saved as {markdown(str(to))}", icon=":material/save:")
