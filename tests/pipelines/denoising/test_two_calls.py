"""Guidance in two calls of the model gives what one batch gives, as for a family with a network for each half."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from all_transformers import TRANSFORMERS
from components import seeded
from golden import PIPELINES, PROMPT, boxed
from lora_compose import Concept
from lora_compose.attention import backbone_of
from transformer_families import TOKENS


@pytest.mark.parametrize(("family", "method"), [
    ("sd", "regional"), pytest.param("sd", "clora", marks=pytest.mark.slow), ("sd", "composite"),
    ("flux", "regional"),
])  # fmt: skip
def test_two_calls_for_guidance_give_what_one_batch_gives(family, method, monkeypatch):
    pipe = PIPELINES[family]()
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "height": 128, "width": 128}
    guided = {"max_sequence_length": TOKENS, **TRANSFORMERS["flux"].guided} if family == "flux" else {}
    fields = boxed() if method == "regional" else {"cat": {}, "dog": {}}
    given |= {**guided, "method": method, "num_images_per_prompt": 2, "output_type": "latent"}
    given["concepts"] = [Concept(name=name, **more) for name, more in fields.items()]
    sizes: list[int] = []
    watch = pipe.model.register_forward_pre_hook(
        lambda model, args, kwargs: sizes.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        expected = pipe(**given, generator=seeded(3))
        in_one_batch = list(sizes)
        sizes.clear()
        monkeypatch.setattr(type(backbone_of(pipe.model)), "unconditional_apart", True)
        found = pipe(**given, generator=seeded(3))
    finally:
        watch.remove()
    assert len(sizes) > len(in_one_batch)
    assert sum(sizes) == sum(in_one_batch)
    assert replace(found.cost, preparation_seconds=expected.cost.preparation_seconds) == expected.cost
    torch.testing.assert_close(found.images, expected.images, atol=3e-5, rtol=0)
