"""Images that the model reads beside the prompt, for models that read them."""

from pathlib import Path

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.screen.uploads import kept_image, show_problems, upload_field
from lora_compose.pipelines.scene.scene import MOST_REFERENCES

_SIDE = 2048  # pixels; models read about 1024 x 1024


def references_part(session: PageSession) -> None:
    """The reference images, and the upload field for one more; nothing for models that read none."""
    if not session.model.reads_references:
        return
    with st.expander("Reference images", icon=":material/imagesmode:", expanded=bool(session.references)):
        for number, path in enumerate(session.references):
            name = session.store.images.get(path, Path(path).name)
            alt, key = f"Reference image {number + 1}", f"do.unreference.{number}"
            kept_image(session.references, path, path, alt, name, key)
        if len(session.references) < MOST_REFERENCES:
            upload_field(session, "reference", "Drop an image that the model reads beside the prompt", _take)
    show_problems(session, "reference")


def _take(session: PageSession, file: UploadedFile) -> None:
    session.references.append(session.store.add_image(file.name, file, _SIDE, cell=1).path)
