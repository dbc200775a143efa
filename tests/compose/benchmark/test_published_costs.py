"""Tables of costs in the docs are what the commands print. They count, so nothing depends on the machine."""

from dataclasses import replace

import pytest

from doc_tables import program, table, text_of
from lora_compose.compose.benchmark.architectures import ARCHITECTURES, attention_lora, columns, with_lora
from lora_compose.compose.benchmark.bench import count_cells, peak_cells
from lora_compose.compose.benchmark.counting import count, meta_unet
from lora_compose.compose.benchmark.tables import GIB
from lora_compose.compose.benchmark.timing import GUIDANCE
from lora_compose.pipelines.methods import make_method

COUNTED = [
    (name, int(number), i, cells)
    for methods, numbers, *cells in table("docs/costs.md", "## FLOPs")[3:]
    for i, name in enumerate(methods.split(", "))
    for number in ((1, 8) if " to " in numbers else (numbers,))
]
"""Method, number of concepts, its place among the methods of a row, and the cells of the row."""
SETTING = "branch_batch_size=1"
PEAKS = [
    (name, int(number), cells, {"branch_batch_size": 1} if SETTING in methods else {})
    for methods, numbers, *cells in table("docs/memory.md", "## How much each method needs")[3:]
    for name in methods.removesuffix(f", {SETTING}").split(", ")
    for number in numbers.split(", ")
]
"""Method, number of concepts, the cells of the row, and settings."""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "number", "place", "cells"), COUNTED)
def test_flops_in_the_docs_are_what_the_command_counts(method, number, place, cells):
    *rows, sd, xl = cells
    found = count_cells([(method, number)], 25)
    said = [it.split(", ")[place if ", " in it else 0] for it in (sd, xl)]
    assert [f"{row.cost.flops / row.plain.flops:.3f}" for row in found] == said
    first = found[0].cost  # of SD 1.5, as the command prints them; canvases of regions may be others on SDXL
    counted = (first.rows_forward, first.rows_stopped, first.rows_backward)
    assert [f"{it:g}" if it else "" for it in counted] == rows


@pytest.mark.slow
def test_flops_of_a_plain_image_in_the_docs_are_what_the_command_counts():
    said = table("docs/costs.md", "## FLOPs")[2]
    assert said == ["plain", "0", "50", "", "", "1.000", "1.000"]
    plain = [f"{row.plain.flops / 1e12:.0f} TFLOP" for row in count_cells([("merge", 1)], 25)]
    assert f"({plain[0]} on SD 1.5, {plain[1]} on SDXL)" in text_of("docs/costs.md")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "number", "cells", "settings"), PEAKS)
def test_memory_of_methods_in_the_docs_is_what_the_command_computes(method, number, cells, settings):
    found = [row for row in peak_cells([(method, number)], 25, settings) if row.method is not None]
    shown = []
    for row in found:
        again = row.checkpointed
        more = ["", ""] if again is None else [
            f"{again.peak_bytes / GIB:.1f}", f"{again.flops / row.peak.flops:.2f}"
        ]  # fmt: skip
        shown += [f"{row.peak.peak_bytes / GIB:.1f}", *more]
    assert shown == cells


@pytest.mark.slow
def test_costs_of_doras_in_the_docs_are_what_the_program_counts():
    assert program("dora_costs").rows() == table("docs/lora-files.md", "dora_costs.py`")[2:]


SCHEDULES = {
    "one on and off": lambda i: 1.0 if i else "0:1,0.5:0",
    "one ramp": lambda i: 1.0 if i else "1..0.4",
    "all ramps": lambda _: "1..0.4",
    "constant": lambda _: 1.0,
}
"""Weight of the n-th concept, by column of the table of schedules."""


def schedules():
    """Architecture, method, number of concepts, column and cell of the table of schedules."""
    head, _, *rows = table("docs/concepts.md", "FLOPs with 25 steps, relative to a plain image:")
    name = ""
    for first, *cells in rows:
        name = first if "the same" not in first else name
        number, method = (8 if name.startswith("eight") else 2), name.split(", ")[1]
        for column, said in zip(head[1:], cells, strict=True):
            if said:
                marks = () if (method, column) == ("merge", "one ramp") and "SD 1.5" in first else pytest.mark.slow
                yield pytest.param(first.rpartition(", ")[2], method, number, column, said, marks=marks)


@pytest.mark.parametrize(("architecture", "method", "number", "column", "said"), [*schedules()])
def test_costs_of_schedules_in_the_docs_are_what_is_counted(architecture, method, number, column, said):
    unet = meta_unet(ARCHITECTURES[architecture])
    side = unet.config["sample_size"] * 8
    concepts = [
        replace(one, concept=one.concept.model_copy(update={"weight": SCHEDULES[column](i)}))
        for i, one in enumerate(with_lora(columns(number, side, side), attention_lora(unet)))
    ]
    how = 25, GUIDANCE, (side, side)
    found = count(unet, concepts, make_method(method, {}), *how).flops / count(unet, (), None, *how).flops
    assert f"{found:.3f}" == said
