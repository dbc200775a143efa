"""How costs grow: nothing quadratically with the number of concepts or of stored LoRAs."""

import pytest
import torch

from components import seeded
from lora_compose.attention import LoraFactors
from lora_compose.compose.benchmark.architectures import SD15
from lora_compose.compose.benchmark.counting import meta_unet
from lora_compose.compose.benchmark.curves import Curve, Point
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.compose.benchmark.growth import of_call, of_stored
from lora_compose.compose.benchmark.growth_plots import draw
from lora_compose.pipelines.concepts import overload


def test_exponents_are_those_of_a_power_with_a_constant():
    points = [Point(n, {"flat": 3.0, "line": 5 + 2.0 * n, "square": 7 + 0.1 * n * n}) for n in (4, 8, 16)]
    assert Curve("n", points).exponents() == pytest.approx({"flat": 0, "line": 1, "square": 2})


def test_rows_flops_and_memory_grow_at_most_linearly_with_concepts_and_images():
    unet = meta_unet(SD15).half()
    concepts = Curve("concepts", [Point(n, of_call(unet, n, 1, 256)) for n in (4, 8, 16)]).exponents()
    assert concepts == pytest.approx({"rows": 0, "TFLOP": 1, "GiB": 1}, abs=0.2)
    images = Curve("images", [Point(n, of_call(unet, 2, n, 256)) for n in (2, 4, 8)]).exponents()
    assert images == pytest.approx({"rows": 1, "TFLOP": 1, "GiB": 1}, abs=0.1)


def test_memory_of_stored_loras_grows_at_most_linearly():
    growth = Curve("stored", list(of_stored((50, 100, 200)))).exponents()["MiB"]
    assert 0.5 < growth < 1.2  # dictionaries grow in jumps


def test_the_joint_change_of_many_concepts_grows_linearly():
    numbers, points = seeded(), []
    one = LoraFactors(torch.randn(8, 64, generator=numbers), torch.randn(64, 8, generator=numbers))
    for concepts in (16, 32, 64):
        with Operations() as operations:
            overload._norm([(one, 1.0)] * concepts)
        points.append(Point(concepts, {"FLOPs": operations.flops}))
    assert Curve("concepts", points).exponents()["FLOPs"] == pytest.approx(1, abs=0.1)


def test_curves_are_drawn(tmp_path):
    curves = [Curve("concepts", [Point(n, {"GiB": 1.0 + n, "rows": 2.0}) for n in (1, 2, 4)])]
    draw(curves, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
