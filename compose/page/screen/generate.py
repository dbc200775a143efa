"""The method, the predicted cost, the button, drafts to choose from, and the progress of running work."""

from dataclasses import replace

import streamlit as st

from lora_compose.compose.check.report import Report
from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.page.form import Form, check_canvas
from lora_compose.compose.page.labels import label_of
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.cost import cost_help, cost_words, seconds_words
from lora_compose.compose.page.screen.method import method_part, sampling_part
from lora_compose.compose.page.screen.state import MOST_WAITING, QUEUE, VIEW, PageSession
from lora_compose.compose.page.text import markdown, markup, page_message
from lora_compose.compose.page.work import Division, DraftJob, Job
from lora_compose.pipelines.methods import Draft, name_of
from lora_compose.pipelines.scene.division import LENGTH, LENGTH_JOINT
from lora_compose.pipelines.scene.scene import Run

NOISES = 4
"""Drafts at once."""
EVERY = 0.4
"""Seconds between two refreshes of the running work."""


def generate_part(session: PageSession) -> None:
    """The method, the button, and the work that it has started."""
    form, problems = read_form(session)
    report = session.outlook(form) if form is not None else None
    if form is not None and report is not None:
        problems += _problems(session, form, report)
    with st.container(key="sampling", gap="xsmall"):
        method_part(session, report)
        left, right = st.columns([3, 2], vertical_alignment="bottom")
        with left:
            sampling_part()
        with right:
            _button(session, form, problems)
        for problem in problems:
            st.error(markdown(problem), icon=":material/error:")
        st.fragment(_working, run_every=EVERY if session.working or session.waiting else None)(session)
        if form is not None and not problems:
            _show_outlook(session, form, report)
            _trying(session, form, report)


def read_form(session: PageSession) -> tuple[Form | None, list[str]]:
    """The form from the fields, or what is wrong with them."""
    try:
        form = fields.form(session)
        form.runs()
        check_canvas(form.size, session.model.size)
    except ValueError as error:
        return None, str(error).splitlines()
    return form, []


def start(session: PageSession) -> None:
    """Starts what is set, unless something is wrong with it, which is shown at the button."""
    form, _ = read_form(session)
    if form is None:
        return
    runs, report = form.runs(), session.outlook(form)
    flops = report.cost.flops if report is not None and report.cost is not None else None
    session.begin(runs, [flops] * len(runs), comparing=False, record_attention=st.session_state[fields.ATTENTION])
    st.session_state[VIEW] = "Image"
    st.session_state[fields.BRUSH] = False  # the image is looked at


def drafts_of(session: PageSession, form: Form) -> list[Division]:
    """The session's divisions for a form, whatever its seeds."""
    wanted = _without_seed(form.runs()[0])
    return [draft for draft in session.divisions if _without_seed(draft.run) == wanted]


def drafts_part(session: PageSession) -> None:
    """The drafted divisions of several seeds; nothing once the form has changed."""
    form, _ = read_form(session) if session.divisions else (None, [])
    drafts = drafts_of(session, form) if form is not None else []
    if not drafts:
        return
    subjects = {i: concept.name for i, concept in enumerate(drafts[0].run.scene.concepts) if not concept.is_style}
    st.caption("The part of each subject with each seed, brighter where the model puts it. A LoRA acts in the part of "
               "its subject. Make one of them:")  # fmt: skip
    names = (f'<span class="lc-trigger" style="--concept:{colour(i)}">{markup(name)}</span>'
             for i, name in subjects.items())  # fmt: skip
    st.html(f'<p class="lc-prompt">{" ".join(names)}</p>')
    for column, draft in zip(st.columns(len(drafts), wrap=False), drafts, strict=True):
        seed = draft.run.seed
        column.image(draft.image, width="stretch", alt=f"The parts of {', '.join(subjects.values())} with seed {seed}")
        column.button(f"Seed {seed}", key=f"do.noise.{seed}", on_click=_choose, args=(session, seed), width="stretch",
                      disabled=len(session.waiting) >= MOST_WAITING)  # fmt: skip


def _choose(session: PageSession, seed: int) -> None:
    st.session_state[fields.SEEDS] = str(seed)
    start(session)


def _without_seed(run: Run) -> Run:
    return run.model_copy(update={"seed": 0})


def _trying(session: PageSession, form: Form, report: Report | None) -> None:
    """A button for the drafts of four noises, if the method finds subjects by drafts."""
    method = report.choice.method if report is not None and report.choice is not None else None
    if not isinstance(method, Draft):
        return
    subjects = [concept for concept in form.runs()[0].scene.concepts if not concept.is_style]
    if len(subjects) < 2 or (method.keep_regions and all(concept.region is not None for concept in subjects)):
        return
    before = drafts_of(session, form)
    first = min(before[-1].run.seed + 1 if before else form.seeds[0], 2**63 - NOISES)
    runs = replace(form, seeds=tuple(range(first, first + NOISES))).runs()
    st.button("Try four more noises" if before else "Try four noises first", key="do.noises", type="tertiary",
              icon=":material/casino:", on_click=_try, args=(session, runs),
              disabled=len(session.waiting) >= MOST_WAITING, help=(
        "With some noises a subject is missing. This shows where each LoRA would act with four seeds, beside the "
        f"image, for {_price(method.length)} each. Choose one of them to make its image."
    ))  # fmt: skip


def _price(length: float | None) -> str:
    """The drafted part of the steps in words."""
    if length is None:
        return f"{LENGTH:.0%} to {LENGTH_JOINT:.0%} of the steps"
    return f"{length:.0%} of the steps" if length <= 1 else f"{length:g} steps"


def _try(session: PageSession, runs: list[Run]) -> None:
    session.try_noises(runs)
    st.session_state[VIEW] = "Image"


def _button(session: PageSession, form: Form | None, problems: list[str]) -> None:
    number = len(form.seeds) if form is not None else 1
    label = "Generate 1 image" if number == 1 else f"Generate {number} images"
    st.button(label, type="primary", icon=":material/brush:", key="do.make", width="stretch", on_click=start,
              args=(session,), disabled=bool(problems) or len(session.waiting) >= MOST_WAITING)  # fmt: skip


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
    _tell_of_bystanders(form, report)
    if form.boxed and form.method:
        label = label_of(form.method)
        if label.decides != "boxes" and not label.keeps_boxes:
            st.caption(f":material/info: “{label.name}” does not use the boxes.")
    for note in report.notes:
        if "ignores" not in note:  # unused boxes are noted above
            st.caption(f":material/info: {markdown(page_message(note, form.method, session.store.names))}")


def _tell_of_bystanders(form: Form, report: Report) -> None:
    """Says so where the method has no places that LoRAs could keep off."""
    names = [concept.name for concept in form.concepts if concept.is_bystander]
    if not names or report.choice is None:
        return
    label = label_of(name_of(report.choice.method)[0])
    if not label.knows_places:
        st.caption(f":material/info: “{label.name}” knows no places: it does not keep LoRAs off "
                   f"{markdown(', '.join(names))}.")  # fmt: skip


def _working(session: PageSession) -> None:
    """The running work, refreshed until it ends."""
    new = session.collect()
    job, working = session.job, session.working
    if job is not None and working:
        _progress(session, job)
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
    if isinstance(job, DraftJob):
        return f"Draft {min(job.made + 1, len(job.runs))} of {len(job.runs)}"
    which = f"Image {len(job.results) + 1} of {len(job.runs)}, step" if len(job.runs) > 1 else "Step"
    left = "" if job.seconds_left is None else f", {seconds_words(job.seconds_left)} left"
    return f"{which} {done} of {of}{left}"
