"""Several LoRAs merged into one: a file to download, or a concept."""

import logging
from pathlib import Path

import streamlit as st

from lora_compose.compose.page.labels import MERGER_LABELS
from lora_compose.compose.page.merging import Merged, merge_loras, read_chosen
from lora_compose.compose.page.open_models import Busy
from lora_compose.compose.page.screen.concepts import add_lora, is_full
from lora_compose.compose.page.screen.picker import of_the_playground
from lora_compose.compose.page.screen.state import FILE_PATIENCE, PageSession, reading
from lora_compose.compose.page.screen.uploads import show_problems
from lora_compose.compose.page.store import ShownLora
from lora_compose.compose.page.text import markdown, page_message

logger = logging.getLogger(__name__)

MOST = 8
"""LoRAs that are merged at once: each is read whole."""

_PLACE = "merging"
_CHOSEN, _METHOD = "do.merge.loras", "do.merge.method"


def merging_view(session: PageSession) -> None:
    """The LoRAs to merge, how strong each is, and how they are merged."""
    ready = _ready(session)
    names = st.multiselect("LoRAs to merge", list(ready), key=_CHOSEN, max_selections=MOST, help=(
        "The playground's, your uploads, and those of your concepts. For a subject and a style choose the subject "
        "first."
    ))  # fmt: skip
    for name in names:
        st.number_input(f"Weight of {markdown(name)}", -4.0, 4.0, 1.0, 0.05, key=_weight_key(name))
    method = st.selectbox("How", list(MERGER_LABELS), key=_METHOD, format_func=lambda key: MERGER_LABELS[key][0])
    st.caption(MERGER_LABELS[method][1])
    st.button("Merge", key="do.merge", icon=":material/merge:", disabled=len(names) < 2, on_click=_merge,
              args=(session, [ready[name] for name in names], names))  # fmt: skip
    show_problems(session, _PLACE)
    if session.merged is not None:
        _result(session, session.merged)


def _result(session: PageSession, merged: Merged) -> None:
    lora, path = merged.lora, Path(merged.lora.source)
    kept = ", ".join(f"{share:.0%} of {shown}" for shown, share in merged.kept)
    st.success(markdown(f"{lora.shown} holds {kept}."), icon=":material/check:")
    for note in merged.notes:
        st.caption(f":material/info: {markdown(page_message(note, files=session.store.names))}")
    with st.container(horizontal=True, gap="xsmall"):
        st.download_button("Download the LoRA", path.read_bytes, lora.shown, "application/octet-stream",
                           key=f"do.merged.download.{path.stem}", icon=":material/download:",
                           on_click="ignore")  # fmt: skip
        st.button("Use as a concept", key="do.merged.use", icon=":material/add_circle:", disabled=is_full(session),
                  on_click=_use, args=(session, lora))  # fmt: skip


def _use(session: PageSession, lora: ShownLora) -> None:
    session.problems[_PLACE] = [trouble for trouble in [add_lora(session, lora)] if trouble]


def _ready(session: PageSession) -> dict[str, ShownLora]:
    """The LoRAs that can be merged, by what they are called; of two with one name, the second has a number."""
    own = [row.lora for row in session.rows if row.lora is not None]
    every = {lora.source: lora for lora in (*of_the_playground(session), *session.store.uploads, *own)}
    by_name: dict[str, ShownLora] = {}
    for lora in every.values():
        words = f"{lora.trigger} {lora.class_word}".strip()
        name = f"{lora.shown} ({words})" if words else lora.shown
        by_name[name if name not in by_name else f"{name} {len(by_name)}"] = lora
    return by_name


def _merge(session: PageSession, loras: list[ShownLora], names: list[str]) -> None:
    """Merges, or says why not; what was merged before is shown no longer."""
    method, weights = st.session_state[_METHOD], [float(st.session_state[_weight_key(name)]) for name in names]
    session.merged, session.problems[_PLACE] = None, []
    try:
        with reading(FILE_PATIENCE):
            given = read_chosen(list(zip(loras, weights, strict=True)), method)
        with session.model.turn((), wait=False) as pipe:
            session.merged = merge_loras(session.store, pipe, given, loras[0], method)
    except Busy:
        session.problems[_PLACE] = ["The model is at work, or other files are being read. Try again later."]
    except (ValueError, OSError) as error:
        session.problems[_PLACE] = [page_message(str(error), files=session.store.names)]
    except Exception as error:  # files come from strangers: the page lives on, whatever they set off
        logger.exception("LoRAs could not be merged")
        session.problems[_PLACE] = [f"They cannot be merged ({type(error).__name__})."]


def _weight_key(name: str) -> str:
    return f"do.merge.weight.{name}"
