"""LoRAs to choose from: those of a folder, of the open playground, and uploads, with their images and words."""

from collections.abc import Callable, Sequence
from pathlib import Path

import streamlit as st

from lora_compose.compose.page.catalog import shown_lora
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.store import ShownLora, in_folder, playground, tile
from lora_compose.compose.page.text import markdown
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.pipelines.concepts.loading import LoraError
from lora_compose.pipelines.support.home import expanded

MOST = 12
"""LoRAs that are shown at once."""

_ACROSS = 3
_FOLDER, _INSIDE, _SEARCH = "set.folder", "do.pick.inside", "do.pick.search"


def picker_part(session: PageSession, take: Callable[[PageSession, list[str]], None]) -> None:
    """LoRAs with their images, found by name, trigger or family; `take` adds some by their sources."""
    folder = _folder(session)
    search = st.text_input("Search by name, trigger or model family", key=_SEARCH)
    of_folder, problems = _in_folder(folder) if folder is not None else ([], [])
    every = [*of_folder, *session.store.uploads, *of_the_playground(session)]
    matching = [lora for lora in every if all(word in _text(lora) for word in search.lower().split())]
    shown = matching[:MOST]
    for start in range(0, len(shown), _ACROSS):
        for column, lora in zip(st.columns(_ACROSS, wrap=False), shown[start : start + _ACROSS], strict=False):
            with column:
                _card(session, lora, take)
    if len(matching) > MOST:
        st.caption(f"{MOST} of {len(matching)} are shown: search for others.")
    if len(shown) > 1:
        st.button(f"Add these {len(shown)}", key="do.add.shown", on_click=take,
                  args=(session, [lora.source for lora in shown]))  # fmt: skip
    if not matching:
        st.caption("Nothing is found.")
    for problem in problems:
        st.error(markdown(problem))


def of_the_playground(session: PageSession) -> Sequence[ShownLora]:
    """The LoRAs of the playground that is open; none with another model, which they do not fit."""
    model = session.model.choice.model
    return _read_once(model) if model in PLAYGROUNDS else []


def _card(session: PageSession, lora: ShownLora, take: Callable[[PageSession, list[str]], None]) -> None:
    st.image(lora.thumbnail or tile(len(session.rows)), width=64, alt="What it was trained on")
    words = f"{lora.trigger} {lora.class_word}".strip() or "no trigger in the file"
    foreign = f" · for {lora.family}" if lora.family not in (None, session.model.family) else ""
    st.caption(f"**{markdown(lora.shown)}**  \n{markdown(words + foreign)}")
    st.button("Add", key=f"do.add.{lora.source}", on_click=take, args=(session, [lora.source]), width="stretch")


def _folder(session: PageSession) -> Path | None:
    """The folder that the user names, or the one inside of it that is chosen; with a page for others that of `ui`."""
    folder = session.options.loras
    if session.options.local:
        text = st.text_input("A folder on this machine", value=str(folder or ""), key=_FOLDER)
        folder = expanded(text) if text.strip() else None
    inside = _folders(folder) if folder is not None else []
    if folder is None or not inside:
        return folder
    name = st.selectbox("Folder inside of it", [".", *inside], key=_INSIDE)
    return folder / name


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # said where its files are listed
        return []


def _in_folder(folder: Path) -> tuple[list[ShownLora], list[str]]:
    """The LoRAs of a folder, and what is wrong with the folder or its files."""
    try:
        paths = in_folder(folder)
    except ValueError as error:
        return [], [str(error)]
    loras, problems = [], []
    for path in paths:
        try:
            loras.append(_header_of(path, path.stat().st_mtime_ns))
        except (LoraError, OSError) as error:
            problems.append(str(error))
    return loras, problems


def _text(lora: ShownLora) -> str:
    return f"{lora.shown} {lora.trigger} {lora.class_word} {lora.family or ''}".lower()


@st.cache_resource(show_spinner=False, max_entries=2000)
def _header_of(path: Path, changed: int) -> ShownLora:
    return shown_lora(path)


@st.cache_resource(show_spinner=False)
def _read_once(model: str) -> tuple[ShownLora, ...]:
    return tuple(playground(model))
