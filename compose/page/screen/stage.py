"""The button, the notes above it, the running work, and the image."""

from pathlib import Path

import streamlit as st
from PIL import Image

from lora_compose.compose.check.report import Report
from lora_compose.compose.page import export
from lora_compose.compose.page.form import Form, check_canvas
from lora_compose.compose.page.labels import full_name, label_of
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.canvas import canvas, position_part
from lora_compose.compose.page.screen.compare import compare_view
from lora_compose.compose.page.screen.cost import cost_help, cost_words, result_cost, seconds_words
from lora_compose.compose.page.screen.evaluate import evaluate_view
from lora_compose.compose.page.screen.gallery import gallery_view
from lora_compose.compose.page.screen.keep import keep_buttons
from lora_compose.compose.page.screen.start import painting, start_image
from lora_compose.compose.page.screen.state import MOST_WAITING, QUEUE, PageSession
from lora_compose.compose.page.screen.understand import understand_view
from lora_compose.compose.page.text import markdown, page_message
from lora_compose.compose.page.work import Job, Result
from lora_compose.pipelines.methods import name_of
from lora_compose.pipelines.scene.strength import weight_text

_EVERY = 0.4  # seconds between two refreshes of the work
_VIEW = "set.view"
_TOGETHER = "do.together"


def stage_part(session: PageSession) -> None:
    """The button, and the right view under it."""
    _pressing(session)
    st.session_state.setdefault(_VIEW, "Image")
    view = st.segmented_control("View", list(_VIEWS), key=_VIEW, label_visibility="collapsed", width="stretch")
    if view in (None, "Image"):
        position_part(session)
    st.fragment(_working, run_every=_EVERY if session.working or session.waiting else None)(
        session, view in (None, "Image")
    )
    _VIEWS[view or "Image"](session)


def read_form(session: PageSession) -> tuple[Form | None, list[str]]:
    """The form from the fields, or what is wrong with them."""
    try:
        form = fields.form(session)
        form.runs()
        check_canvas(form.size, session.model.size)
    except ValueError as error:
        return None, str(error).splitlines()
    return form, []


def _pressing(session: PageSession) -> None:
    form, problems = read_form(session)
    report = session.outlook(form) if form is not None else None
    if form is not None and report is not None:
        problems += _problems(session, form, report)
    number = len(form.seeds) if form is not None else 1
    label = "Generate 1 image" if number == 1 else f"Generate {number} images"
    st.button(label, type="primary", icon=":material/brush:", key="do.make", width="stretch", on_click=_start,
              args=(session,), disabled=bool(problems) or len(session.waiting) >= MOST_WAITING)  # fmt: skip
    for problem in problems:
        st.error(markdown(problem), icon=":material/error:")
    if form is not None and not problems:
        _show_outlook(session, form, report)


def _problems(session: PageSession, form: Form, report: Report) -> list[str]:
    """Problems that prevent an image, each shown in one place only."""
    if report.problems and session.unready:
        return ["The prompt is not ready; see the notes there."]
    return [page_message(problem, form.method, session.store.names) for problem in report.problems]


def _show_outlook(session: PageSession, form: Form, report: Report | None) -> None:
    if report is None and session.working:
        st.caption("Press again for more: images wait for those in hand.")
        return
    if report is None:
        st.caption("The model is busy with another session. The cost appears when it is free; an image waits "
                   "for its turn.")  # fmt: skip
        return
    if report.cost is not None:
        each = " for each image" if len(form.seeds) > 1 else ""
        st.caption(f"{cost_words(session, report.cost)}{each}.", help=cost_help(report.cost, form.steps))
    if form.method is None and report.choice is not None:
        method, why = name_of(report.choice.method)[0], report.choice.reason
        st.caption(markdown(f"Method: {full_name(method)}, because {why}."))
    if form.boxed and form.method and label_of(form.method).decides != "boxes":
        st.caption(f":material/info: “{label_of(form.method).name}” does not use the boxes.")
    for note in report.notes:
        if "ignores" not in note:  # unused boxes are noted above
            st.caption(f":material/info: {markdown(page_message(note, form.method, session.store.names))}")


def _start(session: PageSession) -> None:
    form, _ = read_form(session)
    if form is None:
        return  # problems are shown at the button
    runs, report = form.runs(), session.outlook(form)
    flops = report.cost.flops if report is not None and report.cost is not None else None
    session.begin(runs, [flops] * len(runs), comparing=False, record_attention=st.session_state[fields.ATTENTION])
    st.session_state[_VIEW] = "Image"
    st.session_state[fields.BRUSH] = False  # the image is looked at


def _working(session: PageSession, on_canvas: bool) -> None:
    """The running work and the canvas with its preview, refreshed until it ends."""
    new = session.collect()
    job, working = session.job, session.working
    if job is not None and working:
        _progress(session, job)
    if on_canvas:
        preview = job.preview if job is not None and working and not job.comparing else None
        _on_canvas(session, preview)
    ended, session.was_working = session.was_working and not working, working
    if new or ended:
        st.rerun()  # the whole page, with the new images
    for error in [
        *session.problems.get(QUEUE, []),
        *([job.error] if job is not None and job.state == "failed" else []),
    ]:
        st.error(markdown(page_message(error, files=session.store.names)), icon=":material/error:")
    if job is not None and job.state == "stopped":
        st.info("Stopped. Your settings are unchanged.", icon=":material/stop_circle:")


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


def _progress(session: PageSession, job: Job) -> None:
    with st.container(horizontal=True, vertical_alignment="center", wrap=False, key="progress"):
        st.progress(job.share, text=progress_words(job))
        st.button("Stop", key="do.stop", on_click=job.stop, icon=":material/stop:", disabled=job.stopping)
    if session.waiting:
        number = sum(len(waiting.runs) for waiting in session.waiting)
        with st.container(horizontal=True, vertical_alignment="center", key="waiting"):
            st.caption(f"{number} more {'image waits' if number == 1 else 'images wait'}.", width="content")
            st.button("Clear the queue", key="do.clear", on_click=session.waiting.clear, type="tertiary")


def progress_words(job: Job) -> str:
    """A sentence about the running work."""
    if job.stopping:
        return "Stopping after this step"
    if job.state == "waiting":
        others = "one call of another session" if job.ahead == 1 else f"{job.ahead} calls of other sessions"
        return f"Waiting for the model: {others} ahead" if job.ahead else "Waiting for the model"
    done, of = job.steps
    which = f"Image {len(job.results) + 1} of {len(job.runs)}, step" if len(job.runs) > 1 else "Step"
    left = "" if job.seconds_left is None else f", {seconds_words(job.seconds_left)} left"
    return f"{which} {done} of {of}{left}"


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
    together = {found.key: found for found in (session.job.results if session.job is not None else [])}
    if result.key not in together or len(together) < 2:
        return
    methods, seeds = ({getattr(found.run, of) for found in together.values()} for of in ("method", "seed"))

    def label(key: str) -> str:
        run = together[key].run
        if len(methods) > 1:
            return f"{label_of(run.method or '').name}, {run.seed}"
        return f"Seed {run.seed}" if len(seeds) > 1 else f"Weight {weight_text(run.scene.concepts[0].weight)}"

    st.session_state[_TOGETHER] = result.key
    st.segmented_control("Images of this run", list(together), key=_TOGETHER, format_func=label, on_change=_switch,
                         args=(session,), label_visibility="collapsed")  # fmt: skip


def _switch(session: PageSession) -> None:
    session.shown = st.session_state[_TOGETHER] or session.shown


def _about(result: Result) -> None:
    run = result.run
    parts = [label_of(run.method).name if run.method else "no concepts", f"seed {run.seed}", f"{run.steps} steps"]
    parts += [f"guidance {run.guidance_scale:g}", f"{result.seconds:.1f} s"]
    st.caption(markdown(" · ".join(parts)), help=result_cost(result))


def _exports(session: PageSession, result: Result) -> None:
    with st.expander("Export: scene file, Python, command line", icon=":material/code:"):
        run = export.portable(
            result.run, {lora.source: lora.shown for lora in session.store.uploads} | session.store.images
        )
        scene = export.scene_file(run.scene)
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
        for name in ("image", "mask_image"):
            path, shown = getattr(result.run.scene, name), getattr(run.scene, name)
            if path in session.store.images and Path(path).exists():
                st.download_button(f"Save {shown}", Path(path).read_bytes(), shown, "image/png",
                                   icon=":material/download:", on_click="ignore", key=f"do.save.{name}")  # fmt: skip


_VIEWS = {
    "Image": _result_view,
    "Compare": compare_view,
    "Understand": understand_view,
    "Gallery": gallery_view,
    "Evaluate": evaluate_view,
}
