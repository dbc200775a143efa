"""The page's script: Streamlit runs it anew for each session and each change."""

import streamlit as st

from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.concepts import concepts_part
from lora_compose.compose.page.screen.generate import generate_part
from lora_compose.compose.page.screen.guides import guides_part, references_part
from lora_compose.compose.page.screen.keep import restoring
from lora_compose.compose.page.screen.prompt import prompt_part
from lora_compose.compose.page.screen.session import page_session
from lora_compose.compose.page.screen.stage import stage_part
from lora_compose.compose.page.screen.start import start_part
from lora_compose.compose.page.screen.top import icon, style, top_part

st.set_page_config("lora-compose", icon(), layout="wide")
style()
session = page_session()
fields.keep(session)
top_part(session)

bench, stage = st.columns([1, 1], gap="medium")
with bench, st.container(key="bench", gap="xsmall"):
    prompt_part(session)
    concepts_part(session)
    generate_part(session)
    references_part(session)
    start_part(session)
    guides_part(session)
    restoring(session)
with stage, st.container(key="stage"):
    stage_part(session)
