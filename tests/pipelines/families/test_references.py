"""Reference images, several and of different sizes: LoRAs act in the cells of the image, elsewhere on request."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flux2 import FLUX2, gate
from lora_compose import Concept, Merge
from transformer_families import (
    CALL,
    CELLS,
    METHODS,
    Places,
    dense_loras,
    latents_of,
    merged,
    pipeline_with_concepts,
    plain_latents,
)

NAVY, ORANGE = Image.new("RGB", (64, 100), "navy"), Image.new("RGB", (80, 64), "orange")
TOKENS_OF_REFERENCES = 4 * 6 + 5 * 4  # cut to whole tokens of 16 pixels
GUIDED: dict[str, Any] = {**CALL, **FLUX2.guided, "image": [NAVY, ORANGE]}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(FLUX2, tmp_path_factory.mktemp("loras"))


def expected_of(pipe: Any, places_of: Any, on_references: float = 0.0) -> Tensor:
    """diffusers' pipeline with dense deltas; on references they have one factor."""

    def placed(unconditional: Any) -> Places:
        found = places_of(FLUX2, unconditional)
        there = found.image.new_full((len(found.image), TOKENS_OF_REFERENCES, 2), on_references)
        return replace(found, image=torch.cat([found.image, there], dim=1))

    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    with dense_loras(replace(FLUX2, gate=gate), pipe.transformer, loras, placed, guided=True):
        return plain_latents(FLUX2, pipe, **GUIDED)


def test_without_concepts_it_is_diffusers_own(pipe):
    assert torch.equal(latents_of(pipe, **GUIDED), plain_latents(FLUX2, pipe, **GUIDED))


@pytest.mark.parametrize("method", METHODS)
def test_loras_act_in_the_cells_of_the_image_alone(pipe, method):
    settings, concepts, places = METHODS[method]
    found = latents_of(pipe, **GUIDED, concepts=concepts, method=settings)
    torch.testing.assert_close(found, expected_of(pipe, places), atol=3e-5, rtol=0)
    alone = latents_of(pipe, **{**GUIDED, "image": None}, concepts=concepts, method=settings)
    assert (found - alone).abs().max() > 0.01


def test_a_concept_may_act_on_references_too(pipe):
    both = [Concept(name=name, references=True) for name in ("cat", "dog")]
    found = latents_of(pipe, **GUIDED, concepts=both, method=Merge())
    everywhere = expected_of(pipe, merged, on_references=1.0)
    torch.testing.assert_close(found, everywhere, atol=3e-5, rtol=0)
    assert (found - expected_of(pipe, merged)).abs().max() > 0.01
    one = latents_of(pipe, **GUIDED, concepts=[both[0], "dog"], method=Merge())
    assert (one - found).abs().max() > 0.01, "which is not added to the weights, since the other stays out"


def test_maps_are_those_of_the_cells_of_the_image(pipe):
    output = pipe(**GUIDED, concepts=["cat", "dog"], method="draft", record_attention=[0], output_type="latent")
    assert output.attention_maps.shape == (1, 1, 2, CELLS, CELLS)
    assert 0 < output.attention_maps.sum(dim=2).max() < 1, "cells attend to references as well"


def test_without_a_size_images_have_that_of_the_first_reference(pipe):
    given = {**GUIDED, "width": None, "height": None, "num_inference_steps": 1}
    found = pipe(**given, concepts=["cat"], method="merge", output_type="latent").images
    assert found.shape[-2:] == (12, 8)


def test_what_is_no_image_is_refused(pipe):
    with pytest.raises(ValueError, match="reference images are PIL images, paths or 8-bit arrays, not tensors"):
        pipe(**{**GUIDED, "image": torch.rand(3, 64, 64)}, concepts=["cat"])
