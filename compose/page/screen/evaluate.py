"""Evaluations: reports to open, and the quick suite to start."""

import streamlit as st

from lora_compose.compose.page.quick import Quick, reports
from lora_compose.compose.page.screen.state import PageSession, quick
from lora_compose.compose.page.text import markdown

_EVERY = 1.0  # seconds between two refreshes
_PACKAGES = ("scipy", "pandas", "matplotlib")


def evaluate_view(session: PageSession) -> None:
    """The quick suite, and the reports in the folder of evaluations."""
    suite = quick()
    running = suite.state == "running"
    st.fragment(_suite, run_every=_EVERY if running else None)(suite)
    found = reports(session.options.evaluations)
    if not found:
        st.caption(f"No reports yet in {markdown(str(session.options.evaluations))}.")
        return
    path = st.selectbox("Report", found, format_func=lambda path: path.parent.name, key="do.report")
    page = path.read_bytes()
    st.download_button("Download the report", page, f"{path.parent.name}.html", "text/html", icon=":material/download:",
                       on_click="ignore")  # fmt: skip
    st.iframe(page.decode("utf-8"), height=900, alt="The report")


def _suite(suite: Quick) -> None:
    st.caption("The quick suite generates six scenes of the playground with five methods, scores them, and "
               "writes a report. It takes some minutes, and resumes where it was stopped.")  # fmt: skip
    if suite.state == "running":
        with st.container(horizontal=True, vertical_alignment="center", wrap=False):
            st.progress(suite.share, text=f"{suite.share:.0%} of the batches are done")
            st.button("Stop", key="do.suite.stop", on_click=suite.stop, icon=":material/stop:")
        st.session_state["do.suite.ran"] = True
        return
    if st.session_state.pop("do.suite.ran", False):
        st.rerun()  # the whole page, with the new report
    st.button("Start the quick suite", key="do.suite", on_click=suite.start, icon=":material/play_arrow:")
    if suite.state == "failed":
        st.error(markdown(suite.output) or "It failed without a message.", icon=":material/error:")
