"""Further images: reference images, and control images and IP-Adapters with the models that read them."""

from pathlib import Path

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.screen.uploads import kept_image, show_problems, upload_field
from lora_compose.pipelines.scene.scene import MOST_REFERENCES, ControlFile, IPAdapterFile

_CONTROL, _ADAPTER = "ControlNet or T2I-Adapter", "IP-Adapter"
_KIND, _MODEL, _WEIGHTS, _SCALE = "new.guide.kind", "new.guide.model", "new.guide.weights", "new.guide.scale"

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
            upload_field(session, "reference", "Drop an image that the model reads beside the prompt", _take_reference)
    show_problems(session, "reference")


def _take_reference(session: PageSession, file: UploadedFile) -> None:
    session.references.append(session.store.add_image(file.name, file, _SIDE, cell=1).path)


def guides_part(session: PageSession) -> None:
    """Control images and IP-Adapters, and a form for more; models are named on the machine itself."""
    with st.expander("Guide with another image", icon=":material/route:", expanded=bool(session.guides)):
        for number, guide in enumerate(session.guides):
            kind = _CONTROL if isinstance(guide, ControlFile) else _ADAPTER
            words = f"{kind} {Path(guide.model).name}, scale {guide.scale:g}"
            key = f"do.unguide.{number}"
            kept_image(session.guides, guide, guide.image, f"The image of the {kind}", words, key)
        if session.options.local:
            _more(session)
        else:
            st.caption("Only who opens the page on its own machine can name models for this.")
    show_problems(session, "guide")


def _more(session: PageSession) -> None:
    kind = st.selectbox("What reads the image", [_CONTROL, _ADAPTER], key=_KIND)
    st.text_input("Its model: a folder, or a repository on the hub", key=_MODEL)
    if kind == _ADAPTER:
        st.text_input("The file of its weights, in that folder", key=_WEIGHTS, placeholder="ip-adapter.safetensors")
    st.slider("How strongly it guides", 0.0, 2.0, 1.0, step=0.05, key=_SCALE)
    upload_field(session, "guide", "Drop its image to add it", _take)


def _take(session: PageSession, file: UploadedFile) -> None:
    given = {"model": st.session_state[_MODEL].strip(), "scale": st.session_state[_SCALE]}
    image = session.store.add_image(file.name, file, max(session.model.size))
    if st.session_state[_KIND] == _CONTROL:
        session.guides.append(ControlFile(image=image.path, **given))
    else:
        weights = st.session_state[_WEIGHTS].strip()
        session.guides.append(IPAdapterFile(image=image.path, weight_name=weights, **given))
