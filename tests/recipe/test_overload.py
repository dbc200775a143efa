"""LoRAs are merged so that their joint change is what was asked for, and the table counts what was found."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from components import random_lora, tiny_pipeline
from recipe.overload import groups, merged, subjects, table, weight_for
from reference import dense


def test_each_subject_is_first_once_with_those_that_follow() -> None:
    assert groups(["a", "b", "c"], 1) == [["a"], ["b"], ["c"]]
    assert groups(["a", "b", "c"], 2) == [["a", "b"], ["b", "c"], ["c", "a"]]


@pytest.mark.parametrize("names", [["cat"], ["cat", "dog"], ["cat", "dog", "kitten"]])
def test_the_change_of_the_weights_is_a_multiple_of_the_largest_alone(
    names: list[str], write_lora: Callable[..., Path]
) -> None:
    pipe = tiny_pipeline()
    cat = random_lora(pipe.unet, 1)
    for name, lora in {"cat": cat, "dog": random_lora(pipe.unet, 2, size=0.5), "kitten": cat}.items():
        pipe.load_concept(write_lora(name, unet=lora), name, trigger=name)
    loaded = pipe.resolve_concepts(names)
    loras = [one.lora for one in loaded]
    before = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    with merged(pipe.unet, loras, weight_for(loaded, 1.7)), torch.no_grad():
        change = sum(float((weight - before[name]).square().sum()) for name, weight in pipe.unet.named_parameters())
    largest = max(sum(float(dense(one).square().sum()) for one in lora.values()) for lora in loras)
    assert (change / largest) ** 0.5 == pytest.approx(1.7, rel=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.named_parameters())


def test_subjects_are_those_that_the_detector_knows_without_token_masks(write_lora: Callable[..., Path]) -> None:
    pipe = tiny_pipeline()
    for i, (name, noun, method) in enumerate(
        (("cat", "cat", "dreambooth"), ("ink", "style", "dreambooth"), ("cat-tara", "cat", "tara"))
    ):
        path = write_lora(name, unet=random_lora(pipe.unet, i), metadata={"method": method})
        pipe.load_concept(path, name, trigger=f"sks{i}", class_word=noun)
    assert subjects(pipe, ["cat", "cat-tara", "ink"], ["cat", "dog"]) == ["cat"]


def test_the_table_has_a_row_for_each_joint_change() -> None:
    lines = list(table({(1, 1.0): [(1, 0.8), (2, 0.6)], (1, 2.0): [(0, 0.0), (1, 0.5)]}))
    assert lines == [
        "| joint change | 1 LoRA: one subject | 1 LoRA: likeness |",
        "|---|---|---|",
        "| 1 | 50% | 0.70 |",
        "| 2 | 50% | 0.25 |",
    ]
