"""The images of a user's session and those of the shared folder; two of them can be compared by wiping."""

from pathlib import Path

import streamlit as st
from PIL import Image

from lora_compose.compose.files.images import Record, read_pixels, read_record
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.page.labels import label_of
from lora_compose.compose.page.screen.canvas import as_uri, page_component
from lora_compose.compose.page.screen.keep import reuse
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.store import MOST_FILES, image_files
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.work import Result
from lora_compose.pipelines.scene.scene import Run

_ACROSS = 3
_SMALL = 512  # pixels of the longer side
_LEFT, _RIGHT = "do.wipe.left", "do.wipe.right"


def gallery_view(session: PageSession) -> None:
    """The images of the user's session, and those in the folder."""
    if len(session.results) > 1:
        _wiping(session)
    st.markdown("**Your images**")
    if not session.results:
        st.caption("None yet.")
    for start in range(0, len(session.results), _ACROSS):
        for column, result in zip(
            st.columns(_ACROSS, wrap=False), session.results[start : start + _ACROSS], strict=False
        ):
            with column:
                st.image(result.jpeg, width="stretch", alt=result.run.scene.prompt)
                st.caption(markdown(_name(result.run)))
                st.button("View image", key=f"do.look.{result.key}", on_click=session.look_at, args=(result,),
                          width="stretch")  # fmt: skip
    _folder(session)


def _wiping(session: PageSession) -> None:
    """Two images over each other; the newest two unless others are chosen."""
    with st.expander("Compare two images by wiping", icon=":material/compare:"):
        known = {result.key: result for result in session.results}
        numbers = {key: len(known) - i for i, key in enumerate(known)}
        chosen = []
        for column, label, key, default in zip(
            st.columns(2, wrap=False), ("Left", "Right"), (_LEFT, _RIGHT), (1, 0), strict=True
        ):
            if st.session_state.get(key) not in known:
                st.session_state[key] = session.results[default].key
            picked = column.selectbox(label, list(known), key=key,
                                      format_func=lambda key: f"{numbers[key]}: {_name(known[key].run)}")  # fmt: skip
            chosen.append(known[picked])
        _wipe(*chosen, key="do.wipe")


def _name(run: Run) -> str:
    return f"{label_of(run.method).name if run.method else 'no concepts'}, seed {run.seed}"


def _folder(session: PageSession) -> None:
    folder = session.options.images
    st.markdown(f"**Shared folder** {markdown(str(folder))}")
    paths = image_files(folder)
    if not paths:
        st.caption("Nothing saved yet. Everyone who opens this page can see this folder.")
    for start in range(0, len(paths), _ACROSS):
        for column, path in zip(st.columns(_ACROSS, wrap=False), paths[start : start + _ACROSS], strict=False):
            with column:
                _kept(session, path)


def _kept(session: PageSession, path: Path) -> None:
    try:
        record, small = _small(path, path.stat().st_mtime_ns)
    except (FileError, OSError):
        return  # sheets and images of other programs have nothing to restore
    st.image(small, width="stretch", alt=record.run.scene.prompt)
    st.caption(markdown(f"{path.name}: {_name(record.run)}"))
    st.button("Use its settings", key=f"do.kept.{path}", on_click=reuse, args=(session, record), width="stretch")


@st.cache_data(show_spinner=False, max_entries=2 * MOST_FILES)
def _small(path: Path, changed: int) -> tuple[Record, Image.Image]:
    record, image = read_record(path), read_pixels(path)
    image.thumbnail((_SMALL, _SMALL))
    return record, image


def _wipe(left: Result, right: Result, key: str) -> None:
    """Two images of the same size over each other, with a divider between them."""
    sides = [{"image": as_uri(result.made.image), "alt": result.run.scene.prompt} for result in (left, right)]
    html = ('<div class="wipe"><img /><img class="right" /><input type="range" min="0" max="100" value="50" '
            'aria-label="Divider between the two images" /></div>')  # fmt: skip
    data = {"sides": sides, "ratio": left.made.image.width / left.made.image.height}
    page_component("wipe", html)(key=key, data=data)
