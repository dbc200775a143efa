"""The session of the browser: the running one, the one before a reload, or a new one, which begins with the example."""

import atexit
import secrets
from weakref import WeakValueDictionary

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from lora_compose.compose.page.form import example
from lora_compose.compose.page.launch import options
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.model import open_first
from lora_compose.compose.page.screen.state import MODELS, PageSession
from lora_compose.compose.page.sessions import Sessions
from lora_compose.compose.page.store import Store, named
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.pipelines.scene.sources import files_of


def page_session() -> PageSession:
    """The user's session; a new one begins with the example."""
    before: PageSession | None = st.session_state.get("session") or _reloaded()
    if before is None or before.closed:
        form, session_id = example(), _session_id()
        new = PageSession(Store(), MODELS.open(form.choice), options(), session_id=session_id)
        _SESSIONS.add(session_id, new)
        key = secrets.token_urlsafe(16)
        _BY_KEY[key] = st.session_state["session"] = new
        st.query_params[_KEY] = key
        fields.fill(new, form, {concept.name: named(files_of(concept.lora)[0]) for concept in form.concepts})
        if new.options.model != PLAYGROUND:
            open_first(new)
    if before is not None and before.closed:
        st.toast("Your session ended, so your files and images were deleted. This is a new session.")
    return st.session_state["session"]


def _reloaded() -> PageSession | None:
    """The session that this address had before the page was loaded again, with its fields; None if it has ended."""
    known = _BY_KEY.get(st.query_params.get(_KEY, ""))
    if known is None or known.closed or not _SESSIONS.move(known, _session_id()):
        return None
    known.goes_on_in(_session_id())
    st.session_state.update(known.fields)
    st.session_state["session"] = known
    return known


def _session_id() -> str:
    context = get_script_run_ctx()
    return context.session_id if context is not None else ""


def _has_browser(session_id: str) -> bool:
    """Whether a session is connected; the sessions of tests have no server."""
    return not runtime.exists() or runtime.get_instance().is_active_session(session_id)


_KEY = "session"
"""The name in the address under which a reloaded page finds its session: a secret of the user's browser."""
_BY_KEY: "WeakValueDictionary[str, PageSession]" = WeakValueDictionary()
_SESSIONS = Sessions(_has_browser)
atexit.register(_SESSIONS.end)
