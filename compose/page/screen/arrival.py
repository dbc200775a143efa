"""Who looks at the screen: a visit that is going on, or a new one, which begins with the example."""

import atexit

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from lora_compose.compose.page.draft import example
from lora_compose.compose.page.launch import options
from lora_compose.compose.page.leaving import Visits
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import Visit, shelf
from lora_compose.compose.page.store import Store, named


def visit() -> Visit:
    """This visit; a new one begins with the example."""
    before: Visit | None = st.session_state.get("visit")
    if before is None or before.closed:
        draft, session = example(), _session()
        new = Visit(Store(), shelf().open(draft.choice), options(), _session=session)
        _VISITS.add(session, new)
        st.session_state["visit"] = new
        fields.fill(new, draft, {concept.name: named(concept.lora or "") for concept in draft.concepts})
    if before is not None and before.closed:
        st.toast("Your session ended, so your files and images were deleted. This is a new session.")
    return st.session_state["visit"]


def _session() -> str:
    context = get_script_run_ctx()
    return context.session_id if context is not None else ""


def _has_browser(session: str) -> bool:
    """Whether a session is connected; the sessions of tests have no server that could tell."""
    return not runtime.exists() or runtime.get_instance().is_active_session(session)


_VISITS = Visits(_has_browser)
atexit.register(_VISITS.end)
