"""The prompt, with every concept's words in its colour, and what is wrong with them."""

import streamlit as st

from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.page.form import MOST_TEXT
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import PageSession
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.words import as_html, read_prompt, with_phrase
from lora_compose.pipelines.scene.scene import Concept


def prompt_part(session: PageSession) -> None:
    """The prompts, and the words of the concepts in them."""
    session.unready = False
    prompt = st.text_area("Prompt: name each concept by its trigger", key=fields.PROMPT, max_chars=MOST_TEXT, height=68)
    try:
        concepts = [fields.concept_of(row) for row in session.rows]
    except ValueError as error:
        st.warning(markdown(str(error)), icon=":material/warning:")
        return
    reading = read_prompt(prompt, concepts, session.model.tokenizer)
    session.unready = reading.unready
    if concepts and prompt.strip():
        st.html(as_html(prompt, reading))
    for flag in reading.flags:
        st.warning(markdown(flag), icon=":material/warning:")
    _inserting(concepts, reading.missing)


def _inserting(concepts: list[Concept], missing: tuple[int, ...]) -> None:
    """A button for every concept that is not in the prompt."""
    if not missing:
        return
    with st.container(horizontal=True):
        for i in missing:
            others = [concept for concept in concepts if concept is not concepts[i]]
            st.button(f"Insert “{markdown(concepts[i].phrase)}”", key=f"do.insert.{i}", icon=":material/add:",
                      on_click=_insert, args=(concepts[i], others))  # fmt: skip
            st.html(f"<style>.st-key-do-insert-{i} button {{ border-color: {colour(i)}; }}</style>")


def _insert(concept: Concept, others: list[Concept]) -> None:
    st.session_state[fields.PROMPT] = with_phrase(st.session_state[fields.PROMPT], concept, others)
