"""Images to keep: download, folder, gallery, and an image that sets everything as it was when it was made."""

from pathlib import Path

import streamlit as st
from PIL import Image
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.files.images import Record, read_pixels, read_record, save_image
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.generate.machine import devices
from lora_compose.compose.page.draft import draft_of
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.model import take_over
from lora_compose.compose.page.screen.state import FILE_PATIENCE, Visit, checking, discard
from lora_compose.compose.page.shelf import Busy, Choice
from lora_compose.compose.page.store import MOST_FILES, PNG_LIMIT, dropped, is_on_hub, located, picture_files
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.work import Picture

_PLACE = "restore"
_ACROSS = 3
_SMALL = 512  # pixels of the longer side


def keep_buttons(here: Visit, picture: Picture) -> None:
    """What one can do with an image."""
    with st.container(horizontal=True):
        st.download_button("Download", here.png(picture), f"{picture.run.seed}.png", "image/png",
                           key=f"do.download.{picture.key}", icon=":material/download:", on_click="ignore",
                           help="A PNG with everything needed to reproduce it.")  # fmt: skip
        st.button("Save to the shared folder", key=f"do.keep.{picture.key}", on_click=_keep, args=(here, picture),
                  icon=":material/save:",
                  help="Copies it to the folder of this page. Everyone who opens the page can see it.")  # fmt: skip
        st.button("Use its settings", key=f"do.reuse.{picture.key}", on_click=_reuse, args=(here, picture.made.record),
                  icon=":material/undo:")  # fmt: skip


def restoring(here: Visit) -> None:
    """A place to drop an image that sets everything."""
    with st.expander("Load settings from a PNG", icon=":material/image_search:"):
        key = f"do.restore.{here.uploads}"
        st.file_uploader("Drop a PNG made by lora-compose", type=["png"], key=key, on_change=_dropped, args=(here, key),
                         max_upload_size=PNG_LIMIT // 2**20)  # fmt: skip
    for said in here.troubles.get(_PLACE, []):
        st.warning(markdown(said), icon=":material/image_search:")


def gallery_view(here: Visit) -> None:
    """The images of this visit, and those in the folder."""
    st.markdown("**This session**")
    if not here.pictures:
        st.caption("None yet.")
    for start in range(0, len(here.pictures), _ACROSS):
        for column, picture in zip(
            st.columns(_ACROSS, wrap=False), here.pictures[start : start + _ACROSS], strict=False
        ):
            with column:
                st.image(picture.made.image, width="stretch", alt=picture.run.scene.prompt)
                st.caption(markdown(f"{picture.run.method or 'no method'}, seed {picture.run.seed}"))
                st.button("View image", key=f"do.look.{picture.key}", on_click=_look, args=(here, picture),
                          width="stretch")  # fmt: skip
    _folder(here)


def _folder(here: Visit) -> None:
    folder = here.options.pictures
    st.markdown(f"**Shared folder** {markdown(str(folder))}")
    paths = picture_files(folder)
    if not paths:
        st.caption("Nothing saved yet. Everyone who opens this page can see this folder.")
    for start in range(0, len(paths), _ACROSS):
        for column, path in zip(st.columns(_ACROSS, wrap=False), paths[start : start + _ACROSS], strict=False):
            with column:
                _kept(here, path)


def _kept(here: Visit, path: Path) -> None:
    try:
        record, small = _small(path, path.stat().st_mtime_ns)
    except (FileError, OSError):
        return  # sheets and images of other programs have nothing to restore
    st.image(small, width="stretch", alt=record.run.scene.prompt)
    st.caption(markdown(f"{path.name}: {record.run.method or 'no method'}, seed {record.run.seed}"))
    st.button("Use its settings", key=f"do.kept.{path}", on_click=_reuse, args=(here, record), width="stretch")


@st.cache_data(show_spinner=False, max_entries=2 * MOST_FILES)
def _small(path: Path, changed: int) -> tuple[Record, Image.Image]:
    record, image = read_record(path), read_pixels(path)
    image.thumbnail((_SMALL, _SMALL))
    return record, image


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
        _reuse(here, dropped(file.name, file))
    except ValueError as error:
        here.troubles[_PLACE] = [str(error)]
    finally:
        discard([file])


def _reuse(here: Visit, record: Record) -> None:
    try:
        restore(here, record)
    except Busy:
        here.troubles[_PLACE] = ["Nothing is set yet: files of other sessions are being read. Try again later."]
    except (ValueError, OSError) as error:
        here.troubles[_PLACE] = str(error).splitlines()


def _look(here: Visit, picture: Picture) -> None:
    here.shown = picture.key
    st.session_state["set.view"] = "Image"


def _keep(here: Visit, picture: Picture) -> None:
    try:
        to = save_image(picture.made.image, here.options.pictures / f"{picture.run.seed}.png", picture.made.record)
    except OSError as error:  # a full disk, a folder that may not be written
        st.toast(f"Not saved: {markdown(str(error))}", icon=":material/error:")
        return
    st.toast(f"Saved as {markdown(str(to))}", icon=":material/save:")
