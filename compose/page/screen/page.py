"""The page's script: Streamlit runs it anew for each session and each change."""

import streamlit as st

from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.concepts import concepts_part
from lora_compose.compose.page.screen.generate import generate_part
from lora_compose.compose.page.screen.guides import guides_part, references_part
from lora_compose.compose.page.screen.keep import restoring
from lora_compose.compose.page.screen.method import settings_part
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

# In the order of a narrow screen, which has them below each other; style.css puts the stage beside the other two.
with st.container(key="parts"):
    bench = st.container(key="bench", gap="xsmall")
    stage = st.container(key="stage")
    more = st.container(key="more", gap="xsmall")
with bench:
    prompt_part(session)
    concepts_part(session)
    generate_part(session)
with more:
    settings_part(session)
    references_part(session)
    start_part(session)
    guides_part(session)
    restoring(session)
with stage:
    stage_part(session)
