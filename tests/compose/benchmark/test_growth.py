"""How costs grow: nothing quadratically with the number of concepts or of stored LoRAs."""

from functools import partial
from inspect import signature

import pytest
import torch

from components import seeded
from doc_tables import rows_of
from lora_compose.attention import LoraFactors
from lora_compose.compose.benchmark import architectures, growth, transformers
from lora_compose.compose.benchmark.architectures import SD15, TRANSFORMERS, without_weights
from lora_compose.compose.benchmark.bench import PassRow, pass_cells, passes_table
from lora_compose.compose.benchmark.counting import meta_unet
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.compose.benchmark.growth import _NOUNS as NOUNS
from lora_compose.compose.benchmark.growth import Curve, Point, choose_two, draw, of_call, of_host, of_stored
from lora_compose.compose.benchmark.host import python_calls
from lora_compose.compose.benchmark.tables import GIB
from lora_compose.compose.benchmark.transformers import READING, SHOWN, PassCost, pass_cost
from lora_compose.pipelines.concepts import overload
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text import tokens
from lora_compose.pipelines.text.prompts import about

MOST = 1.05
"""FLOPs and memory of a pass with `regional`, as a multiple of a plain one."""
DEARER = {
    # Each region's text has 80 tokens: the model reads the padding of texts.
    ("FLUX.3", 0): {4: 1.076, 8: 1.149},
    ("FLUX.3", 1): {8: 1.079},
    # Each region's text has the tokens of the reference image too, as in diffusers.
    ("Qwen-Image-Edit-Plus", 1): {4: 1.085, 8: 1.164},
}
"""FLOPs of those models that need more, by model and number of reference images."""
USUAL = ("FLUX.1",)
"""What Z-Image costs, in tables as well, is in `test_hardware.py`, and with `-m slow` what others cost."""


def test_exponents_are_those_of_a_power_with_a_constant():
    points = [Point(n, {"flat": 3.0, "line": 5 + 2.0 * n, "square": 7 + 0.1 * n * n}) for n in (4, 8, 16)]
    assert Curve("n", points).exponents() == pytest.approx({"flat": 0, "line": 1, "square": 2})


def test_rows_flops_and_memory_grow_at_most_linearly_with_concepts_and_images():
    unet = meta_unet({**SD15, "layers_per_block": 1}).half()
    both = of_call(unet, 2, 1, 256)
    concepts = Curve("concepts", [Point(2, both), *(Point(n, of_call(unet, n, 1, 256)) for n in (4, 8))]).exponents()
    assert concepts == pytest.approx({"rows": 0, "TFLOP": 1, "GiB": 1}, abs=0.2)
    images = Curve("images", [Point(1, both), *(Point(n, of_call(unet, 2, n, 256)) for n in (2, 4))]).exponents()
    assert images == pytest.approx({"rows": 1, "TFLOP": 1, "GiB": 1}, abs=0.1)


@pytest.mark.parametrize(("model", "references"), [
    *(pytest.param(name, 0, marks=() if name in USUAL else pytest.mark.slow) for name in SHOWN),
    *(pytest.param(name, 1, marks=pytest.mark.slow) for name in READING),
])  # fmt: skip
def test_a_pass_of_a_real_transformer_with_regional_costs_little_more_and_grows_at_most_linearly(model, references):
    found = {row.concepts: row for row in pass_cells((1, 2, 4, 8), [model], references=references)}
    plain, points = found[1].plain, []
    for number in (1, 2, 4, 8):
        cost = found[number].cost
        flops, memory = cost.flops / plain.flops, cost.peak_bytes / plain.peak_bytes
        dearer = DEARER.get((model, references), {}).get(number)
        assert flops <= MOST if dearer is None else flops == pytest.approx(dearer, abs=1e-3)
        assert memory <= MOST
        points.append(Point(number, {"FLOPs": flops, "memory": memory}))
    assert max(Curve("concepts", points).exponents().values()) < 1.05
    assert_is_published(model, references, found)


def assert_is_published(model, references, found):
    """The rows of the docs about a model, of `docs/costs.md` and `docs/memory.md`, are what was found."""
    plain, most = found[1].plain, found[8].cost
    ratios = [f"{found[number].cost.flops / plain.flops:.3f}" for number in (1, 2, 4, 8)]
    memory = f"{most.peak_bytes / GIB:.1f} GiB, {most.peak_bytes / plain.peak_bytes:.3f}"
    whole = f"{plain.flops / 1e12:.0f} TFLOP"
    if references:
        to_none = f"{plain.flops / found[1].without_references.flops:.3f}"
        assert rows_of("docs/costs.md", "### Reference images")[model] == [whole, to_none, *ratios, memory]
        return
    assert rows_of("docs/costs.md", "## Transformers")[model] == [whole, *ratios, memory]
    blocks = rows_of("docs/memory.md", "## Transformers on a small GPU")
    if model in blocks:  # others fit, or fit nowhere
        assert blocks[model] == [
            f"{found[2].cost.peak_bytes / GIB:.1f} ({plain.peak_bytes / GIB:.1f})", f"{most.peak_bytes / GIB:.1f}",
            f"{found[2].cost.offloaded_bytes / GIB:.2f} ({plain.offloaded_bytes / GIB:.2f})",
            f"{most.offloaded_bytes / GIB:.2f}",
        ]  # fmt: skip


def test_a_table_of_passes_has_ratios_to_a_plain_pass_and_to_one_without_references():
    cost, plain, bare = (PassCost(n * 10**12, n * 2**30, n * 2**29) for n in (11, 10, 5))
    with_one, with_none = (passes_table([PassRow("model", 2, number, cost, plain, bare)]) for number in (1, 0))
    cells = ["model", "2", "11.0", "1.100", "11.0", "1.100", "5.50", "5.00", "2.200", "2.200"]
    assert [next(iter(column.cells)) for column in with_one.columns] == cells
    assert [next(iter(column.cells)) for column in with_none.columns] == cells[:-2]


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=() if name == "Krea 2" else pytest.mark.slow) for name in TRANSFORMERS]
)
def test_of_blocks_that_are_alike_two_are_run_and_count_for_all(model, monkeypatch):
    fewer = {"num_layers": 4, "num_single_layers": 5, "n_layers": 4}
    build, config = TRANSFORMERS[model]
    config = {**config, **{name: number for name, number in fewer.items() if name in signature(build).parameters}}
    monkeypatch.setattr(architectures, "TRANSFORMERS", {model: (build, config)})
    few = without_weights.__wrapped__(model).transformer
    found = pass_cost(few, 2, 8, (32, 32))
    monkeypatch.setattr(transformers, "_alike", lambda model: ())
    every = pass_cost(few, 2, 8, (32, 32))
    assert found.flops == every.flops
    assert found.peak_bytes == pytest.approx(every.peak_bytes, rel=2e-3)
    assert found.peak_bytes - found.offloaded_bytes == every.peak_bytes - every.offloaded_bytes


def test_memory_of_stored_loras_grows_at_most_linearly():
    stored = Curve("stored", list(of_stored((50, 100, 200))))
    assert 0.5 < stored.exponents()["MiB"] < 1.2  # dictionaries grow in jumps
    assert all(point.costs["CPU ms to choose"] > 0 for point in stored.points)


def test_choosing_of_stored_loras_looks_at_each_once():
    points = []
    for number, unused in ((1000, "snow"), (2000, "sand"), (4000, "grass")):
        known = {f"{i}": Concept(name=f"{i}", trigger=f"word{i}", class_word=NOUNS[i % 4]) for i in range(number)}
        assert choose_two(known, "stone").names == ("3", "7")
        points.append(Point(number, {"calls": python_calls(partial(choose_two, known, unused))}))
    assert Curve("stored", points).exponents()["calls"] == pytest.approx(1, abs=0.05)


def test_concepts_that_a_prompt_does_not_name_are_passed_over_before_patterns_are_made(monkeypatch):
    looked_for = []
    monkeypatch.setattr(tokens, "_spans", lambda words, *_: looked_for.append(words) or ())
    for words in ("word1234", "red hat", r"saber \(fate\)", "hatsune_miku"):
        assert tokens.find_words(words, "a word1 in a hat by the sea") == []
    assert looked_for == []
    tokens.find_words("\N{GREEK SMALL LETTER OMEGA}", "\N{GREEK CAPITAL LETTER OMEGA} alone")
    assert looked_for, "letters that are not of ASCII are left to the pattern"


def test_the_joint_change_of_many_concepts_grows_linearly():
    numbers, points = seeded(), []
    one = LoraFactors(torch.randn(8, 64, generator=numbers), torch.randn(64, 8, generator=numbers))
    for concepts in (16, 32, 64):
        with Operations() as operations:
            overload._norm([(one, 1.0)] * concepts)
        points.append(Point(concepts, {"FLOPs": operations.flops}))
    assert Curve("concepts", points).exponents()["FLOPs"] == pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("small_by_default")
def test_python_calls_of_a_whole_call_grow_linearly_with_its_concepts(monkeypatch):
    monkeypatch.setattr(growth, "_UNUSED", "7")  # seconds are not looked at: one timed call
    exponents = Curve("concepts", list(of_host((2, 4, 8)))).exponents()
    assert exponents["Python calls"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("of_one_class", [pytest.param(False, marks=pytest.mark.slow), True])
def test_texts_about_all_concepts_take_calls_that_grow_linearly_with_them(of_one_class):
    points = []
    for number in (4, 8, 16):
        words = [(f"word{i}", "dog" if of_one_class else f"animal{i}") for i in range(number)]
        concepts = [Concept(name=trigger, trigger=trigger, class_word=noun) for trigger, noun in words]
        prompt = " and ".join(f"a {trigger} {noun}" for trigger, noun in words)
        calls = python_calls(lambda concepts=concepts, prompt=prompt: [about(c, prompt, concepts) for c in concepts])
        points.append(Point(number, {"calls": calls}))
    assert Curve("concepts", points).exponents()["calls"] == pytest.approx(1, abs=0.1)


def test_curves_are_drawn(tmp_path):
    curves = [Curve("concepts", [Point(n, {"GiB": 1.0 + n, "rows": 2.0}) for n in (1, 2, 4)])]
    draw(curves, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
