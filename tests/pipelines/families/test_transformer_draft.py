"""`draft` on transformers: what the base model's maps say, and the image of `regional` with the regions found."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor

from all_transformers import FEW, JOINT, TRANSFORMERS
from components import seeded
from flux import FLUX
from krea2 import KREA2
from lora_compose import Concept, Draft, Regional
from lora_compose.pipelines.methods.drafted import reordered
from lora_compose.pipelines.scene.division import divided
from pairs import in_pairs, slow_but
from transformer_families import CELLS, TOKENS, Family, shared_pipeline
from z_image import Z_IMAGE

NOISE = torch.randn(1, 4, 16, 16, generator=seeded(1))
CALL: dict[str, Any] = {
    "prompt": "a sks cat and a zwx dog on grass", "width": 128, "height": 128, "num_inference_steps": 2,
    "max_sequence_length": TOKENS, "output_type": "latent",
}  # fmt: skip


@pytest.fixture(params=JOINT, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return TRANSFORMERS[request.param]


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    return shared_pipeline(family)


@pytest.fixture
def division(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Maps and masks of each image."""
    found: list[tuple[Tensor, Tensor]] = []

    def kept(maps: Tensor, *arguments: Any) -> Tensor:
        masks = divided(maps, *arguments)
        found.append((maps, masks))
        return masks

    monkeypatch.setattr("lora_compose.pipelines.methods.draft.divided", kept)
    return found


def regions(masks: Tensor) -> list[Concept]:
    """Concepts with masks of the latent grid as regions."""
    images: Any = [np.kron(mask.numpy(), np.ones((8, 8))).astype(np.float32) for mask in masks]
    return [Concept(name=name, region=mask) for name, mask in zip(("cat", "dog"), images, strict=True)]


READINGS = [("scene", True), ("regions", False), ("scene", False), ("regions", True)]


@pytest.mark.parametrize(("family", "reading", "guided"), in_pairs(FEW, READINGS), indirect=["family"])
def test_it_is_the_image_of_regional_with_the_regions_found(family, pipe, division, reading, guided):
    guidance = family.guided if guided else family.unguided
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    method = Draft(length=1, reading=reading, bias=0, isolate=0, token_mask="tara")
    found = pipe(
        **CALL, **guidance, concepts=["cat", "dog"], method=method, latents=noise, num_images_per_prompt=2
    ).images
    assert len(division) == 2, "each image is divided by its own maps"
    for image, (maps, masks) in enumerate(division):
        assert maps.shape == (2, CELLS, CELLS)
        assert (masks.sum(dim=0) == 1).all()
        expected = pipe(
            **CALL, **guidance, concepts=regions(masks), latents=noise[image : image + 1],
            method=Regional(texts="shared" if reading == "scene" else "regions", isolate=0, token_mask="tara"),
        ).images  # fmt: skip
        torch.testing.assert_close(found[image : image + 1], expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", slow_but(["qwen-image"], JOINT), indirect=True)
def test_two_of_one_class_read_one_text_unless_one_has_a_prompt_of_its_own(family, pipe):
    def image(method: Draft, **fields: Any) -> Tensor:
        both = [Concept(name="cat", class_word="cat", **fields), Concept(name="dog", class_word="cat")]
        call = CALL | {"prompt": "a sks cat and a zwx cat on grass", "generator": seeded(3)}
        return pipe(**call, **family.unguided, concepts=both, method=method).images

    one = Draft(reading="scene", bias=1, isolate=0.5, token_mask="others")
    assert torch.equal(image(Draft()), image(one))
    asleep: Any = {"prompt": "a sks cat that sleeps"}
    assert torch.equal(image(Draft(), **asleep), image(replace(one, reading="regions"), **asleep))


@pytest.mark.parametrize(("steps", "rows"), [(4, "4 + 1 stopped"), (6, "6 + 1 stopped"), (8, "9 + 1 stopped")])
def test_of_few_steps_one_or_two_are_drafted_and_the_last_stops_early(family, pipe, steps, rows):
    given = {**CALL, **family.unguided, "num_inference_steps": steps, "concepts": ["cat", "dog"]}
    plan = pipe.plan(**given, method="draft")
    assert (plan.guided, plan.cost.words) == (False, rows)


@pytest.mark.parametrize("family", slow_but(["qwen-image"], JOINT), indirect=True)
@pytest.mark.parametrize("renewing", ["euler", "lcm"])
def test_where_steps_replace_the_noise_the_image_continues_from_the_draft(
    family, pipe, monkeypatch, division, renewing
):
    kind = {"euler": FlowMatchEulerDiscreteScheduler, "lcm": FlowMatchLCMScheduler}[renewing]
    renews = {"stochastic_sampling": True} if renewing == "euler" else {}
    monkeypatch.setattr(pipe, "scheduler", kind.from_config(pipe.scheduler.config, **renews))

    def latents(**given: Any) -> tuple[list[Tensor], Any]:
        after: list[Tensor] = []

        def keep(_pipe: Any, _step: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            after.append(values["latents"].clone())
            return {}

        call = CALL | family.unguided | {"num_inference_steps": 4, "generator": seeded(3)} | given
        return after, pipe(**call, callback_on_step_end=keep)

    method = Draft(length=3)
    bystander = Concept(name="plain cat", role="bystander", class_word="cat")  # has no LoRA
    plain, _ = latents(prompt="a cat and a dog on grass", concepts=[bystander], method="merge")
    found, output = latents(concepts=["cat", "dog"], method=method)
    for step in range(2):
        torch.testing.assert_close(found[step], plain[step])
    assert not torch.allclose(found[2], plain[2]), "LoRAs act from here on"
    assert output.cost.words == "4 + 1 stopped"
    again, output = latents(concepts=["cat", "dog"], method=replace(method, restart="always"))
    assert output.cost.words == "6 + 1 stopped"
    assert not torch.allclose(again[0], plain[0])
    assert torch.equal(division[0][0], division[1][0]), "the draft is the same"
    planned = CALL | family.unguided | {"num_inference_steps": 4, "concepts": ["cat", "dog"]}
    assert pipe.plan(**planned, method=method).cost.words == "4 + 1 stopped"

    noises = [NOISE, reordered(NOISE, 1)]
    each = [latents(concepts=["cat", "dog"], method=method, latents=noise)[0][-1] for noise in noises]
    several = replace(method, drafts=2, spacing=9)
    best, output = latents(concepts=["cat", "dog"], method=several, latents=NOISE)
    assert output.cost.words == "6 + 2 stopped"
    assert any(torch.allclose(best[-1], one) for one in each), "it continues from the draft that is taken"


def test_a_guidance_scale_of_1_is_none_except_where_it_counts_from_0(family, pipe):
    layers = {name: one for name, one in family.unguided.items() if name == "text_encoder_out_layers"}
    scales = (0.0, 1.0) if family in (KREA2, Z_IMAGE) else (1.0, 1.1)
    plans = [
        pipe.plan(**CALL, **layers, **pipe.guided(scale, None), concepts=["cat"], method="merge") for scale in scales
    ]
    assert [plan.guided for plan in plans] == [False, family is not FLUX]  # whose guidance is an input
