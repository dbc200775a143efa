"""The button, what is said before it is pressed, the work in hand, and the image."""

from pathlib import Path

import streamlit as st
from PIL import Image

from lora_compose.compose.check.report import Report
from lora_compose.compose.page import export
from lora_compose.compose.page.draft import Draft, check_canvas
from lora_compose.compose.page.labels import full_name, label_of
from lora_compose.compose.page.messages import spoken
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.canvas import canvas, position_part
from lora_compose.compose.page.screen.compare import compare_view
from lora_compose.compose.page.screen.cost import cost_help, cost_words, picture_cost, seconds_words
from lora_compose.compose.page.screen.evaluate import evaluate_view
from lora_compose.compose.page.screen.gallery import gallery_view
from lora_compose.compose.page.screen.keep import keep_buttons
from lora_compose.compose.page.screen.start import painting, start_image
from lora_compose.compose.page.screen.state import MOST_WAITING, QUEUE, Visit
from lora_compose.compose.page.screen.understand import understand_view
from lora_compose.compose.page.text import markdown
from lora_compose.compose.page.work import Job, Picture
from lora_compose.pipelines.concepts.strength import weight_text

_EVERY = 0.4  # seconds between two looks at the work
_VIEW = "set.view"
_TOGETHER = "do.together"


def stage_part(here: Visit) -> None:
    """The button, and the right view under it."""
    _pressing(here)
    st.session_state.setdefault(_VIEW, "Image")
    view = st.segmented_control("View", list(_VIEWS), key=_VIEW, label_visibility="collapsed", width="stretch")
    if view in (None, "Image"):
        position_part(here)
    st.fragment(_working, run_every=_EVERY if here.working or here.waiting else None)(here, view in (None, "Image"))
    _VIEWS[view or "Image"](here)


def read_draft(here: Visit) -> tuple[Draft | None, list[str]]:
    """What the fields say, or what is wrong with them."""
    try:
        draft = fields.draft(here)
        draft.runs()
        check_canvas(draft.size, here.slot.size)
    except ValueError as error:
        return None, str(error).splitlines()
    return draft, []


def _pressing(here: Visit) -> None:
    draft, problems = read_draft(here)
    report = here.outlook(draft) if draft is not None else None
    if draft is not None and report is not None:
        problems += _problems(here, draft, report)
    number = len(draft.seeds) if draft is not None else 1
    label = "Generate 1 image" if number == 1 else f"Generate {number} images"
    st.button(label, type="primary", icon=":material/brush:", key="do.make", width="stretch", on_click=_start,
              args=(here,), disabled=bool(problems) or len(here.waiting) >= MOST_WAITING)  # fmt: skip
    for problem in problems:
        st.error(markdown(problem), icon=":material/error:")
    if draft is not None and not problems:
        _say_outlook(here, draft, report)


def _problems(here: Visit, draft: Draft, report: Report) -> list[str]:
    """What keeps an image from being made, each thing said in one place only."""
    if report.problems and here.unready:
        return ["The prompt is not ready; see what is said there."]
    return [spoken(problem, draft.method, here.store.names) for problem in report.problems]


def _say_outlook(here: Visit, draft: Draft, report: Report | None) -> None:
    if report is None and here.working:
        st.caption("Press again for more: images wait for those in hand.")
        return
    if report is None:
        st.caption("The model is busy with another session. The cost appears when it is free; an image waits "
                   "for its turn.")  # fmt: skip
        return
    facts = dict(report.facts)
    if report.cost is not None:
        each = " for each image" if len(draft.seeds) > 1 else ""
        st.caption(f"{cost_words(here, report.cost)}{each}.", help=cost_help(report.cost, draft.steps))
    if draft.method is None and "method" in facts:
        name, _, why = facts["method"].partition(", ")
        st.caption(markdown(f"Method: {full_name(name)}, {why}." if why else f"Method: {full_name(name)}."))
    if draft.boxed and draft.method and label_of(draft.method).decides != "boxes":
        st.caption(f":material/info: “{label_of(draft.method).name}” does not use the boxes.")
    for note in report.notes:
        if "ignores" not in note:  # that boxes are not used is said above
            st.caption(f":material/info: {markdown(spoken(note, draft.method, here.store.names))}")


def _start(here: Visit) -> None:
    draft, _ = read_draft(here)
    if draft is None:
        return  # what is wrong is said beside the button
    runs, report = draft.runs(), here.outlook(draft)
    flops = report.cost.flops if report is not None and report.cost is not None else None
    here.begin(runs, [flops] * len(runs), comparing=False, record_attention=st.session_state[fields.ATTENTION])
    st.session_state[_VIEW] = "Image"
    st.session_state[fields.BRUSH] = False  # the image is looked at


def _working(here: Visit, on_canvas: bool) -> None:
    """The work in hand, and the canvas, on which it is seen; looked at again and again while it lasts."""
    new = here.collect()
    job, working = here.job, here.working
    if job is not None and working:
        _progress(here, job)
    if on_canvas:
        preview = job.preview if job is not None and working and not job.comparing else None
        _on_canvas(here, preview)
    ended, here.was_working = here.was_working and not working, working
    if new or ended:
        st.rerun()  # the whole page, with the new images
    for error in [*here.troubles.get(QUEUE, []), *([job.error] if job is not None and job.state == "failed" else [])]:
        st.error(markdown(spoken(error, files=here.store.names)), icon=":material/error:")
    if job is not None and job.state == "stopped":
        st.info("Stopped. Your settings are unchanged.", icon=":material/stop_circle:")


def _on_canvas(here: Visit, preview: Image.Image | None) -> None:
    """What is looked at: the image in the making, the one to paint a mask over, the one that was made, or the start."""
    picture = here.picture
    if preview is not None:
        canvas(here, preview, "Preview of the image")
    elif here.start is not None and (painting(here) or picture is None):
        canvas(here, start_image(here.start), "The image to start from")
    elif picture is not None:
        canvas(here, picture.made.image, picture.run.scene.prompt)
    else:
        canvas(here, None, "")


def _progress(here: Visit, job: Job) -> None:
    with st.container(horizontal=True, vertical_alignment="center", wrap=False, key="progress"):
        st.progress(job.share, text=progress_words(job))
        st.button("Stop", key="do.stop", on_click=job.stop, icon=":material/stop:", disabled=job.stopping)
    if here.waiting:
        number = sum(len(waiting.runs) for waiting in here.waiting)
        with st.container(horizontal=True, vertical_alignment="center", key="waiting"):
            st.caption(f"{number} more {'image waits' if number == 1 else 'images wait'}.", width="content")
            st.button("Clear the queue", key="do.clear", on_click=here.waiting.clear, type="tertiary")


def progress_words(job: Job) -> str:
    """What is being done, in words."""
    if job.stopping:
        return "Stopping after this step"
    if job.state == "waiting":
        others = "one call of another session" if job.ahead == 1 else f"{job.ahead} calls of other sessions"
        return f"Waiting for the model: {others} ahead" if job.ahead else "Waiting for the model"
    done, of = job.steps
    which = f"Image {len(job.pictures) + 1} of {len(job.runs)}, step" if len(job.runs) > 1 else "Step"
    left = "" if job.seconds_left is None else f", {seconds_words(job.seconds_left)} left"
    return f"{which} {done} of {of}{left}"


def _picture_view(here: Visit) -> None:
    picture = here.picture
    if picture is None or (here.job is not None and here.working and not here.job.comparing):
        return
    _siblings(here, picture)
    _about(picture)
    keep_buttons(here, picture)
    _exports(here, picture)


def _siblings(here: Visit, picture: Picture) -> None:
    """Which of the images that were made together is looked at."""
    together = {found.key: found for found in (here.job.pictures if here.job is not None else [])}
    if picture.key not in together or len(together) < 2:
        return
    methods, seeds = ({getattr(found.run, of) for found in together.values()} for of in ("method", "seed"))

    def label(key: str) -> str:
        run = together[key].run
        if len(methods) > 1:
            return f"{label_of(run.method or '').name}, {run.seed}"
        return f"Seed {run.seed}" if len(seeds) > 1 else f"Weight {weight_text(run.scene.concepts[0].weight)}"

    st.session_state[_TOGETHER] = picture.key
    st.segmented_control("Images of this run", list(together), key=_TOGETHER, format_func=label, on_change=_switch,
                         args=(here,), label_visibility="collapsed")  # fmt: skip


def _switch(here: Visit) -> None:
    here.shown = st.session_state[_TOGETHER] or here.shown


def _about(picture: Picture) -> None:
    run = picture.run
    parts = [label_of(run.method).name if run.method else "no concepts", f"seed {run.seed}", f"{run.steps} steps"]
    parts += [f"guidance {run.guidance_scale:g}", f"{picture.seconds:.1f} s"]
    st.caption(markdown(" · ".join(parts)), help=picture_cost(picture))


def _exports(here: Visit, picture: Picture) -> None:
    with st.expander("Export: scene file, Python, command line", icon=":material/code:"):
        run = export.portable(picture.run, {lora.source: lora.shown for lora in here.store.uploads} | here.store.images)
        scene = export.scene_file(run.scene)
        scene_tab, python_tab, command_tab = st.tabs(["Scene file", "Python", "Command line"])
        with scene_tab:
            st.code(scene, language="yaml")
            st.download_button("Save scene.yaml", scene, "scene.yaml", "application/yaml", icon=":material/download:",
                               on_click="ignore")  # fmt: skip
        savers = here.slot.choice.memory_for(run.model, run.device)
        own = here.slot.scheduler if run.model == here.slot.choice.model else None
        python_tab.code(export.python(run, savers, own), language="python")
        command_tab.code(export.command(run, savers), language="bash")
        command_tab.caption("It reads scene.yaml, from the first tab.")
        if run != picture.run:
            st.caption("Uploaded files keep your names; put them beside the scene file.")
        for name in ("image", "mask_image"):
            path, shown = getattr(picture.run.scene, name), getattr(run.scene, name)
            if path in here.store.images and Path(path).exists():
                st.download_button(f"Save {shown}", Path(path).read_bytes(), shown, "image/png",
                                   icon=":material/download:", on_click="ignore", key=f"do.save.{name}")  # fmt: skip


_VIEWS = {
    "Image": _picture_view,
    "Compare": compare_view,
    "Understand": understand_view,
    "Gallery": gallery_view,
    "Evaluate": evaluate_view,
}
