"""A scene and its seeds with several methods, side by side, with their costs and likeness."""

import streamlit as st

from lora_compose.compose.page.controls import sentence
from lora_compose.compose.page.labels import full_name, label_of, methods
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.cost import cost_words, result_cost
from lora_compose.compose.page.screen.state import JUDGE, MOST_WAITING, PageSession
from lora_compose.compose.page.screen.uploads import show_problems
from lora_compose.compose.page.text import markdown, page_message
from lora_compose.compose.page.work import Result

_CHOSEN = "set.compared"
_PLACE = "compare"
_MOST = 24  # images at once


def compare_view(session: PageSession) -> None:
    """The choice of methods, their costs, and their images."""
    if not session.rows:
        st.info("Add concepts first.", icon=":material/view_column:")
        return
    st.session_state.setdefault(_CHOSEN, _able())
    chosen = st.multiselect("Methods", methods(), key=_CHOSEN, format_func=full_name)
    _costs(session, chosen)
    st.button("Generate all, for every seed", key="do.compare", icon=":material/view_column:", width="stretch",
              disabled=not chosen or len(session.waiting) >= MOST_WAITING, on_click=_start,
              args=(session, chosen))  # fmt: skip
    show_problems(session, _PLACE)
    _table(session)


def _able() -> list[str]:
    """What is compared at first: those of the three common methods that the scene's boxes, or their lack, allow."""
    return [name for name in ("merge", "draft", "regional") if fields.boxed() or label_of(name).decides != "boxes"]


def _costs(session: PageSession, methods: list[str]) -> None:
    """Before anything is generated: what each method does, needs and costs in this scene."""
    try:
        form = fields.form(session)
        reports = [session.outlook(form.with_method(method)) for method in methods]
    except ValueError:
        return  # shown at the button above
    rows = []
    for method, report in zip(methods, reports, strict=True):
        if report is None:
            cost = "shown when the model is free"
        elif report.problems:
            cost = f":material/block: {markdown(page_message(report.problems[0], method))}"
        else:
            cost = markdown(cost_words(session, report.cost)) if report.cost is not None else "not known"
        rows.append(f"| **{markdown(label_of(method).name)}** | {markdown(sentence(method))} | {cost} |")
    if rows:
        st.markdown("\n".join(["| method | what it does | cost, or what is missing |", "|---|---|---|", *rows]))


def _start(session: PageSession, methods: list[str]) -> None:
    session.problems[_PLACE] = []
    try:
        form = fields.form(session)
        reports = {method: session.outlook(form.with_method(method)) for method in methods}
        able = {method: report for method, report in reports.items() if report is None or not report.problems}
        runs = [run for method in able for run in form.with_method(method).runs()]
        if not runs:
            raise ValueError("None of these methods can compose this scene; the table shows what is missing.")
        if len(runs) > _MOST:
            raise ValueError(f"{len(runs)} images are too many at once; choose fewer methods or seeds, up to {_MOST}.")
    except ValueError as error:
        session.problems[_PLACE] = str(error).splitlines()
        return
    runs.sort(key=lambda run: form.seeds.index(run.seed))  # row by row
    costs = [report.cost if (report := able[run.method or ""]) is not None else None for run in runs]
    flops = [cost.flops if cost is not None else None for cost in costs]
    session.begin(runs, flops, comparing=True, record_attention=st.session_state[fields.ATTENTION])


def _table(session: PageSession) -> None:
    results = {(result.run.seed, result.run.method): result for result in session.compared}
    if not results:
        return
    methods = list(dict.fromkeys(method for _, method in results))
    for seed in dict.fromkeys(seed for seed, _ in results):
        st.markdown(f"**Seed {seed}**")
        for column, method in zip(st.columns(len(methods)), methods, strict=True):
            with column:
                if result := results.get((seed, method)):
                    _cell(session, result)
    if JUDGE.judges(session.compared[0].run):
        st.caption("Likeness, up to 1: of the detected object to the reference images of its concept, and the "
                   "highest to those of another concept.")  # fmt: skip
    else:
        st.caption("Likeness is measured where there are reference images of what every LoRA shows: on the playground.")


def _cell(session: PageSession, result: Result) -> None:
    st.image(result.jpeg, width="stretch", alt=full_name(result.run.method or ""))
    lines = [f"**{markdown(label_of(result.run.method or '').name)}**"]
    lines.append(f"{result.seconds:.1f} s")
    if JUDGE.judges(result.run):
        lines += [f"{markdown(name)}: {likeness.words}" for name, likeness in session.likeness(result).items()]
    st.caption("  \n".join(lines), help=result_cost(result))
    st.button("View image", key=f"do.compared.{result.key}", on_click=session.look_at, args=(result,), width="stretch")
