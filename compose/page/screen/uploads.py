"""Fields into which images are dropped, and what was wrong with the last ones."""

from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from lora_compose.compose.page.screen.state import PageSession, discard
from lora_compose.compose.page.store import PNG_LIMIT
from lora_compose.compose.page.text import markdown
from lora_compose.pipelines.support.field_errors import FieldError

TYPES = ("png", "jpg", "jpeg", "webp", "bmp")
Take = Callable[[PageSession, UploadedFile], None]


def upload_field(session: PageSession, place: str, label: str, take: Take, types: Sequence[str] = TYPES) -> None:
    """A field for one image.

    Args:
        place: The place on the screen, which shows what is wrong with the image.
        take: Takes the image over; raises ValueError if it cannot be used.
    """
    key = f"do.{place}.{session.uploads}"
    st.file_uploader(label, type=list(types), key=key, on_change=_dropped, args=(session, key, place, take),
                     max_upload_size=PNG_LIMIT // 2**20)  # fmt: skip


def kept_image(entries: list[Any], entry: Any, path: str, alt: str, words: str, key: str) -> None:
    """An image of a list, with words about it and a button that takes its entry out of the list."""
    left, right = st.columns([1, 3], vertical_alignment="center", wrap=False)
    left.image(path, width="stretch", alt=alt)
    right.caption(markdown(words))
    right.button("Remove", key=key, on_click=remove, args=(entries, entry), icon=":material/delete:")


def remove(entries: list[Any], entry: Any) -> None:
    """Removes an entry from a list; the button may be pressed twice before the page is drawn anew."""
    if entry in entries:
        entries.remove(entry)


def show_problems(session: PageSession, place: str) -> None:
    """Shows what is wrong at a place on the screen."""
    for problem in session.problems.get(place, []):
        st.error(markdown(problem), icon=":material/error:")


def _dropped(session: PageSession, key: str, place: str, take: Take) -> None:
    file = st.session_state[key]
    if not isinstance(file, UploadedFile):  # taken away again
        return
    session.uploads += 1
    session.problems[place] = []
    try:
        take(session, file)
    except FieldError as error:
        session.problems[place] = list(error.messages)
    except ValueError as error:
        session.problems[place] = [str(error)]
    finally:
        discard([file])
