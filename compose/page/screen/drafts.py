"""Drafts of several noises without their images, of which one is chosen to be made."""

import streamlit as st

from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.generate import drafts_of, read_form, start
from lora_compose.compose.page.screen.state import PageSession


def drafts_part(session: PageSession) -> None:
    """The divisions by the noises that were tried, as long as the fields are those that they are of."""
    form, _ = read_form(session) if session.divisions else (None, [])
    drafts = drafts_of(session, form) if form is not None else []
    if not drafts:
        return
    st.caption("Where each LoRA would act with each seed, brighter where the model puts a subject. Make one of them:")
    for column, draft in zip(st.columns(len(drafts), wrap=False), drafts, strict=True):
        seed = draft.run.seed
        column.image(draft.image, width="stretch", alt=f"The division with seed {seed}")
        column.button(f"Seed {seed}", key=f"do.noise.{seed}", on_click=_make, args=(session, seed), width="stretch")


def _make(session: PageSession, seed: int) -> None:
    st.session_state[fields.SEEDS] = str(seed)
    start(session)
