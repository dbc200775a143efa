"""Roles of rows: what a row is does not depend on where it lies."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from components import FAMILIES, seeded
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.denoising.passes import Prediction
from lora_compose.pipelines.denoising.process import acting_rows
from lora_compose.pipelines.methods import Clora, Settings, Tara, clora
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.rows import Rows
from lora_compose.pipelines.text.conditioning import Conditioning, join_branches
from lora_compose.pipelines.text.encoder import Prompts
from pairs import slow_but
from three_concepts import denoise, load, loras_of

OFFICIAL = replace(Clora.official(), refine_at=())
FORWARD = Rows.of(2, 1)
BACKWARD = FORWARD.select([2, 3, 0, 1])


def test_rows_at_equal_distances_are_a_slice_and_others_indices():
    rows = Rows.of(2, 2, 2)
    assert (rows.unconditional, rows.conditional) == (slice(0, 4), slice(4, 8))
    assert rows.where(lambda row: row.image == 1) == slice(1, 8, 2)
    assert rows.where(lambda row: row.branch == 0) == [0, 1, 4, 5]
    assert rows.select([4, 5, 0, 1, 6, 7]).unconditional == slice(2, 4)
    assert rows.select(rows.conditional).unconditional == slice(0, 0)


@pytest.mark.parametrize(
    "order",
    [[1, 0, 2, 3], [0, 1, 3, 2], [1, 0, 3, 2], [0, 2, 1, 3], [0, 1, 2], [0, 1, 2, 3, 3], [0, 1, 0, 1]],
    ids=["other images", "other images behind", "not as the latents", "by image", "lacking", "twice", "branch twice"],
)
def test_rows_in_which_images_would_be_guided_by_others_are_refused(order):
    with pytest.raises(ValueError, match=r"branch by branch, each with the images \[0, 1\] in this order"):
        FORWARD.select(order)


def test_guidance_is_the_same_in_any_order_of_the_rows():
    uncond, cond = (torch.randn(2, 4, 6, 8, generator=seeded(seed)) for seed in (0, 1))
    step = Step(0, 1, torch.tensor(1), cfg_scale=4.0)
    one, other = (
        ClassifierFree(4.0).combine(Prediction(torch.cat(parts), rows), step)
        for parts, rows in (((uncond, cond), FORWARD), ((cond, uncond), BACKWARD))
    )
    assert torch.equal(one, other)
    assert torch.equal(one, uncond + 4.0 * (cond - uncond))


def test_loras_act_on_conditional_rows_wherever_they_lie():
    embeds, mask = torch.zeros(4, 3, 2), torch.zeros(4, 3, 1)
    for roles, acting in ((FORWARD, [0, 0, 1, 1]), (BACKWARD, [1, 1, 0, 0])):
        text = Conditioning(embeds, mask, mask, roles)
        assert acting_rows(text, "cond_only").flatten().tolist() == acting
        assert acting_rows(text, "all").flatten().tolist() == [1, 1, 1, 1]


def conditional_first(text: Conditioning) -> Conditioning:
    unconditional = [not row.conditional for row in text.roles.each]
    return text.select(sorted(range(text.rows), key=unconditional.__getitem__))


@pytest.mark.parametrize("family", ["sd"])
@pytest.mark.parametrize(
    "method",
    slow_but([Tara(cfg_mask="broadcast"), "draft"], [Tara(cfg_mask="broadcast"), OFFICIAL, "draft"]),
    ids=["tara", "clora:official", "draft"],
)
def test_images_do_not_depend_on_the_order_of_the_rows(family, method, write_lora, monkeypatch):
    """Conditional rows first, as other programs have them, give what unconditional rows first give."""
    pipe: Any = FAMILIES[family]()
    load(pipe, write_lora, ["cat", "dog"], loras_of(pipe, ["cat", "dog"]))
    call = {"concepts": ["cat", "dog"], "method": method, "num_images_per_prompt": 2, "num_inference_steps": 2}
    expected = denoise(pipe, **call).images
    encode = Prompts.encode

    def turned(self: Prompts, *args: Any, **options: Any) -> Conditioning:
        return conditional_first(encode(self, *args, **options))

    monkeypatch.setattr(Prompts, "encode", turned)
    torch.testing.assert_close(denoise(pipe, **call).images, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("method", [OFFICIAL, Clora(fuse="branches", refine_at=())], ids=["each", "shared"])
def test_branches_of_clora_do_not_depend_on_the_order_of_the_rows(method: Settings, write_lora, monkeypatch):
    pipe: Any = FAMILIES["sd"]()
    load(pipe, write_lora, ["cat", "dog"], loras_of(pipe, ["cat", "dog"]))
    call = {"concepts": ["cat", "dog"], "method": method, "num_images_per_prompt": 2, "num_inference_steps": 2}
    expected = denoise(pipe, **call).images
    monkeypatch.setattr(
        clora, "join_branches", lambda *texts, **unconds: conditional_first(join_branches(*texts, **unconds))
    )
    torch.testing.assert_close(denoise(pipe, **call).images, expected, atol=3e-5, rtol=0)
