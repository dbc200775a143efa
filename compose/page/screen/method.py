"""How the concepts are composed, and how the image is sampled."""

import streamlit as st

from lora_compose.compose.check.report import Report
from lora_compose.compose.generate.schedulers import scheduler_names
from lora_compose.compose.page.controls import Control, controls, sentence
from lora_compose.compose.page.form import MOST_STEPS, MOST_TEXT
from lora_compose.compose.page.labels import SHOWN_METHODS, choice_label, full_name, label_of, methods
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.text import markdown
from lora_compose.pipelines.methods import name_of

_ADVANCED = "do.method.advanced"


def method_part(session: PageSession, report: Report | None) -> None:
    """The method with its settings; there is no report while the form is not ready, or the model is in use."""
    if not session.rows:
        return
    shown = [fields.AUTOMATIC, *SHOWN_METHODS]
    chosen = st.session_state[fields.METHOD]
    st.segmented_control("Method", [*shown, *([chosen] if chosen not in shown else [])], key=fields.METHOD,
                         required=True, label_visibility="collapsed", on_change=fields.with_boxes,
                         format_func=lambda name: "Automatic" if name == fields.AUTOMATIC else label_of(name).name,
                         )  # fmt: skip
    st.caption(_automatic_words(report) if chosen == fields.AUTOMATIC else markdown(sentence(chosen)))


def sampling_part() -> None:
    """Steps, guidance and seeds."""
    steps, guidance, seeds = st.columns(3, wrap=False)
    steps.number_input("Steps", 1, MOST_STEPS, key=fields.STEPS)
    guidance.number_input("Guidance", key=fields.GUIDANCE, step=0.5, format="%.2f", help=(
        "How closely the image follows the prompt: 5 to 8 for most models. 1 or less turns it off and halves the "
        "cost; in some families only 0 does."
    ))  # fmt: skip
    seeds.text_input("Seeds", key=fields.SEEDS, help="One image per seed: “0, 1, 2” or “5-8”.")


def settings_part(session: PageSession) -> None:
    """The other methods, the settings of the chosen one, and what is rarely changed."""
    method = st.session_state[fields.METHOD] if session.rows else fields.AUTOMATIC
    if session.rows:
        _other_methods(method)
    if method != fields.AUTOMATIC and controls(method):
        _settings(method)
    with st.expander("Negative prompt, scheduler", icon=":material/settings:"):
        st.text_input("Negative prompt: what to avoid", key=fields.NEGATIVE, max_chars=MOST_TEXT)
        st.selectbox("Scheduler", [fields.AUTOMATIC, *scheduler_names()], key=fields.SCHEDULER)
        st.toggle("Keep attention maps, for “Understand”", key=fields.ATTENTION)


def _other_methods(chosen: str) -> None:
    others = [name for name in methods() if name not in SHOWN_METHODS]
    with st.expander("Advanced: other methods", icon=":material/experiment:"):
        st.session_state[_ADVANCED] = chosen if chosen in others else None
        st.radio("Other methods", others, key=_ADVANCED, format_func=full_name, on_change=_take,
                 captions=[sentence(name) for name in others], label_visibility="collapsed")  # fmt: skip


def _automatic_words(report: Report | None) -> str:
    """What is chosen for the prompt and the concepts as they are, and why."""
    if report is None or report.choice is None:
        return "Chosen by the boxes and the prompt; which one and why is said here once these are ready."
    label = label_of(name_of(report.choice.method)[0])
    paper = f" ({label.paper})" if label.paper else ""
    return f"Takes {markdown(f'“{label.name}”{paper}, because {report.choice.reason}.')}"


def _take() -> None:
    st.session_state[fields.METHOD] = st.session_state[_ADVANCED]
    fields.with_boxes()


def _settings(method: str) -> None:
    with st.expander("Settings of this method", icon=":material/tune:"):
        halves = st.columns(2)
        for i, control in enumerate(controls(method)):
            with halves[i % 2]:
                _control(method, control)
        st.button("Reset to defaults", key="do.defaults", on_click=_reset, args=(method,))


def _control(method: str, control: Control) -> None:
    label, key, text = control.label, fields.of_setting(method, control.name), markdown(control.help)
    # Only now: Streamlit goes through the whole state for every field, and the methods have many settings.
    st.session_state.setdefault(key, control.shown(control.default))
    if control.kind == "choice":
        st.segmented_control(label, list(control.choices), key=key, help=text, required=True,
                             format_func=lambda value: choice_label(control.name, value))  # fmt: skip
    elif control.kind == "switch":
        st.toggle(label, key=key, help=text)
    elif control.kind == "whole":
        st.number_input(label, key=key, step=1, help=text)
    elif control.kind == "number":
        st.number_input(label, key=key, step=0.05, format="%.3g", help=text)
    else:
        st.text_input(label, key=key, help=text)


def _reset(method: str) -> None:
    for control in controls(method):
        st.session_state[fields.of_setting(method, control.name)] = control.shown(control.default)
