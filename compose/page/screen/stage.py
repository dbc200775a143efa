"""The result: the canvas, what is known of the image on it, and the other views."""

from pathlib import Path

import streamlit as st
from PIL import Image

from lora_compose.compose.page import export
from lora_compose.compose.page.form import constant_weight
from lora_compose.compose.page.labels import label_of
from lora_compose.compose.page.screen.canvas import canvas, position_part
from lora_compose.compose.page.screen.compare import compare_view
from lora_compose.compose.page.screen.cost import result_cost
from lora_compose.compose.page.screen.gallery import gallery_view
from lora_compose.compose.page.screen.generate import EVERY, drafts_part
from lora_compose.compose.page.screen.keep import keep_buttons
from lora_compose.compose.page.screen.merging import merging_view
from lora_compose.compose.page.screen.start import painting, start_image
from lora_compose.compose.page.screen.state import VIEW, PageSession
from lora_compose.compose.page.screen.understand import understand_view
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.work import Result
from lora_compose.pipelines.scene.strength import weight_text

_TOGETHER = "do.together"


def stage_part(session: PageSession) -> None:
    """The views of the result, and the one that is chosen."""
    st.session_state.setdefault(VIEW, "Image")
    view = st.segmented_control("View", list(_VIEWS), key=VIEW, label_visibility="collapsed", width="stretch")
    if view in (None, "Image"):
        drafts_part(session)
        position_part(session)
        st.fragment(_live, run_every=EVERY if session.working or session.waiting else None)(session)
    _VIEWS[view or "Image"](session)


def _live(session: PageSession) -> None:
    """The canvas with the preview of the running work."""
    job = session.job
    preview = job.preview if job is not None and session.working and not job.comparing else None
    _on_canvas(session, preview)


def _on_canvas(session: PageSession, preview: Image.Image | None) -> None:
    """The image on the canvas: the preview, the one to paint a mask over, the finished one, or the start image."""
    result = session.result
    if preview is not None:
        canvas(session, preview, "Preview of the image")
    elif session.start is not None and (painting(session) or result is None):
        canvas(session, start_image(session.start), "The image to start from")
    elif result is not None:
        canvas(session, result.made.image, result.run.scene.prompt)
    else:
        canvas(session, None, "")


def _result_view(session: PageSession) -> None:
    result = session.result
    if result is None or (session.job is not None and session.working and not session.job.comparing):
        return
    _siblings(session, result)
    _about(result)
    keep_buttons(session, result)
    _exports(session, result)


def _siblings(session: PageSession, result: Result) -> None:
    """The choice among images that were made together."""
    together = {made.key: made for made in (session.job.results if session.job is not None else [])}
    if result.key not in together or len(together) < 2:
        return
    methods, seeds = ({getattr(made.run, of) for made in together.values()} for of in ("method", "seed"))

    def label(key: str) -> str:
        run = together[key].run
        if len(methods) > 1:
            return f"{label_of(run.method or '').name}, {run.seed}"
        if len(seeds) > 1:
            return f"Seed {run.seed}"
        varied = (weight for concept in run.scene.concepts if (weight := constant_weight(concept)) is not None)
        return f"Weight {weight_text(next(varied))}"

    st.session_state[_TOGETHER] = result.key
    st.segmented_control("Images of this run", list(together), key=_TOGETHER, format_func=label, on_change=_switch,
                         args=(session,), label_visibility="collapsed")  # fmt: skip


def _switch(session: PageSession) -> None:
    session.shown = st.session_state[_TOGETHER] or session.shown


def _about(result: Result) -> None:
    run = result.run
    steps = "1 step" if run.steps == 1 else f"{run.steps} steps"
    parts = [label_of(run.method).name if run.method else "no concepts", f"seed {run.seed}", steps]
    parts += [f"guidance {run.guidance_scale:g}", f"{result.seconds:.1f} s"]
    st.caption(markdown(" · ".join(parts)), help=result_cost(result))


def _exports(session: PageSession, result: Result) -> None:
    with st.expander("Export: scene file, Python, command line", icon=":material/code:"):
        uploaded = {lora.source: lora.shown for lora in session.store.uploads} | session.store.images
        run = export.portable(result.run, uploaded)
        scene = export.scene_file(run.scene, {*uploaded.values()})
        scene_tab, python_tab, command_tab = st.tabs(["Scene file", "Python", "Command line"])
        with scene_tab:
            st.code(scene, language="yaml")
            st.download_button("Save scene.yaml", scene, "scene.yaml", "application/yaml", icon=":material/download:",
                               on_click="ignore")  # fmt: skip
        savers = session.model.choice.memory_for(run.model, run.device)
        own = session.model.scheduler if run.model == session.model.choice.model else None
        python_tab.code(export.python(run, savers, own), language="python")
        command_tab.code(export.command(run, savers), language="bash")
        command_tab.caption("It reads scene.yaml, from the first tab.")
        if run != result.run:
            st.caption("Uploaded files keep your names; put them beside the scene file.")
        for name, path in result.run.scene.image_files.items():
            shown = run.scene.image_files[name]
            if path in session.store.images and Path(path).exists():
                st.download_button(f"Save {shown}", Path(path).read_bytes(), shown, "image/png",
                                   icon=":material/download:", on_click="ignore", key=f"do.save.{name}")  # fmt: skip


_VIEWS = {
    "Image": _result_view,
    "Compare": compare_view,
    "Understand": understand_view,
    "Gallery": gallery_view,
    "Merge": merging_view,
}
