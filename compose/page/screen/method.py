"""How the concepts are composed, and how the image is sampled."""

import streamlit as st

from lora_compose.compose.generate.schedulers import scheduler_names
from lora_compose.compose.page.controls import Control, controls, sentence
from lora_compose.compose.page.form import MOST_STEPS, MOST_TEXT
from lora_compose.compose.page.labels import choice_label, full_name, methods
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.text import markdown

_AUTOMATIC = (
    "By boxes if every subject has one; without boxes by subjects, if triggers and class words are in the prompt; "
    "otherwise added up. The reason is shown below “Generate”."
)


def method_part(session: PageSession) -> None:
    """The method with its settings, and the sampling."""
    with st.container(key="sampling"):
        left, right = st.columns([2, 3])
        method = fields.AUTOMATIC
        if session.rows:
            names = {fields.AUTOMATIC: fields.AUTOMATIC.capitalize()} | {name: full_name(name) for name in methods()}
            method = left.selectbox("Method", list(names), key=fields.METHOD, format_func=names.__getitem__)
        steps, guidance, seeds = right.columns(3, wrap=False)
        steps.number_input("Steps", 1, MOST_STEPS, key=fields.STEPS)
        guidance.number_input("Guidance", key=fields.GUIDANCE, step=0.5, format="%.2f", help=(
            "How closely the image follows the prompt: 5 to 8 for most models. 1 or less turns it off and halves the "
            "cost."
        ))  # fmt: skip
        seeds.text_input("Seeds", key=fields.SEEDS, help="One image per seed: “0, 1, 2” or “5-8”.")
    if session.rows:
        st.caption(markdown(_AUTOMATIC if method == fields.AUTOMATIC else sentence(method)))
    if method != fields.AUTOMATIC and controls(method):
        _settings(method)
    with st.expander("Negative prompt, scheduler", icon=":material/settings:"):
        st.text_input("Negative prompt: what to avoid", key=fields.NEGATIVE, max_chars=MOST_TEXT)
        st.selectbox("Scheduler", [fields.AUTOMATIC, *scheduler_names()], key=fields.SCHEDULER)
        st.toggle("Keep attention maps, for “Understand”", key=fields.ATTENTION)


def _settings(method: str) -> None:
    with st.expander("Settings of this method", icon=":material/tune:"):
        halves = st.columns(2)
        for i, control in enumerate(controls(method)):
            with halves[i % 2]:
                _control(method, control)
        st.button("Reset to defaults", key="do.defaults", on_click=_reset, args=(method,))


def _control(method: str, control: Control) -> None:
    label, key, text = control.label, fields.of_setting(method, control.name), markdown(control.help)
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
