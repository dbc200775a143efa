"""Images that the model reads beside the prompt, for models that read them."""

from pathlib import Path

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.page.screen.start import TYPES
from lora_compose.compose.page.screen.state import PageSession, discard
from lora_compose.compose.page.store import PNG_LIMIT
from lora_compose.compose.page.text import markdown
from lora_compose.pipelines.scene.scene import MOST_REFERENCES

_PLACE = "references"
_SIDE = 2048  # pixels; models read about 1024 x 1024


def references_part(session: PageSession) -> None:
    """The reference images, and the upload field for one more; nothing for models that read none."""
    if not session.model.reads_references:
        return
    with st.expander("Reference images", icon=":material/imagesmode:", expanded=bool(session.references)):
        for number, path in enumerate(session.references):
            left, right = st.columns([1, 3], vertical_alignment="center", wrap=False)
            left.image(path, width="stretch", alt=f"Reference image {number + 1}")
            right.caption(markdown(session.store.images.get(path, Path(path).name)))
            right.button("Remove", key=f"do.unreference.{number}", on_click=_remove, args=(session, path),
                         icon=":material/delete:")  # fmt: skip
        if len(session.references) < MOST_REFERENCES:
            key = f"do.reference.{session.uploads}"
            st.file_uploader("Drop an image that the model reads beside the prompt", type=TYPES, key=key,
                             on_change=_dropped, args=(session, key), max_upload_size=PNG_LIMIT // 2**20)  # fmt: skip
    for problem in session.problems.get(_PLACE, []):
        st.error(markdown(problem), icon=":material/error:")


def _dropped(session: PageSession, key: str) -> None:
    file = st.session_state[key]
    if not isinstance(file, UploadedFile):  # taken away again
        return
    session.uploads += 1
    session.problems[_PLACE] = []
    try:
        session.references.append(session.store.add_image(file.name, file, _SIDE, cell=1).path)
    except ValueError as error:
        session.problems[_PLACE] = [str(error)]
    finally:
        discard([file])


def _remove(session: PageSession, path: str) -> None:
    if path in session.references:  # otherwise an earlier press has removed it
        session.references.remove(path)
