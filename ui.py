"""The page: several concept LoRAs and a prompt, in a browser. Started by `lora-compose ui`."""

import streamlit as st

from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.arrival import visit
from lora_compose.compose.page.screen.concepts import concepts_part
from lora_compose.compose.page.screen.keep import restoring
from lora_compose.compose.page.screen.layout import layout_part
from lora_compose.compose.page.screen.method import method_part
from lora_compose.compose.page.screen.model import model_part
from lora_compose.compose.page.screen.prompt import prompt_part
from lora_compose.compose.page.screen.stage import stage_part
from lora_compose.compose.page.screen.style import heading, style

st.set_page_config("lora-compose", ":material/brush:", layout="wide")
style()
heading()
here = visit()
fields.keep()

stage, bench = st.columns([5, 6], gap="large")
with bench, st.container(key="bench"):
    concepts_part(here)
    prompt_part(here)
    layout_part(here)
    method_part(here)
    model_part(here)
    restoring(here)
with stage, st.container(key="stage"):
    stage_part(here)
