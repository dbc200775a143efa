"""`freefuse` and `draft` with a bias on transformers, against diffusers with dense deltas and a dense bias."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from all_transformers import FEW, JOINT, TRANSFORMERS
from components import seeded
from lora_compose import Draft, FreeFuse
from lora_compose.attention import backbone_of
from lora_compose.pipelines.methods import draft, freefuse
from lora_compose.pipelines.methods.region_bias import region_bias
from pairs import slow_but
from transformer_families import (
    CALL,
    CELLS,
    TOKENS,
    Family,
    Places,
    dense_loras,
    latents_of,
    plain_latents,
    shared_pipeline,
)


@pytest.fixture(params=JOINT, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return TRANSFORMERS[request.param]


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    return shared_pipeline(family)


@dataclass
class Asked:
    """Regions and words for which a method asked for a bias. Shape: [1, cells, 2] and [1, tokens, 2]."""

    shares: Tensor
    phrases: Tensor


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    found: list[Asked] = []

    def kept(text: Any, shares: Mapping[int, Tensor], phrases: Tensor, *sizes: float, **options: Any) -> Any:
        found.append(Asked(shares[1], phrases))
        return region_bias(text, shares, phrases, *sizes, **options)

    for module in (draft, freefuse):
        monkeypatch.setattr(module, "region_bias", kept)
    return found


@contextmanager
def dense_bias(
    family: Family, pipe: Any, asked: Asked, own: float, other: float, rows: list[bool], *, isolate: bool = False
) -> Iterator[None]:
    """Adds the bias, a matrix of all positions, to the scores of joint attention, while diffusers' pipeline runs.

    Args:
        isolate: Whether cells of different regions do not see each other.
    """
    parts = backbone_of(pipe.transformer).joint.parts  # pyright: ignore[reportOptionalMemberAccess]

    inside = (asked.shares[0] >= 0.5).float()  # of a cell that is half in each, in both
    apart = inside @ inside.T == 0

    def matrix(positions: int) -> Tensor:
        tokens, every = positions - CELLS**2, torch.zeros(positions, positions)
        if not tokens:  # a layer of the image alone
            return every.masked_fill_(apart, -torch.inf)
        text, image = (family.padding_first, tokens) if parts[0] == "text" else (CELLS**2, 0)
        read = min(tokens, asked.phrases.shape[1])
        cells, words = slice(image, image + CELLS**2), slice(text, text + read)
        for here, named in product(range(2), range(2)):
            size = own if here == named else other
            added = size * torch.outer(asked.shares[0, :, here], asked.phrases[0, :read, named])
            every[cells, words] += added
            every[words, cells] += added.T
        if isolate:
            every[cells, cells].masked_fill_(apart, -torch.inf)
        return every

    processors = [layer.processor for layer in pipe.transformer.modules() if hasattr(layer, "processor")]
    module: Any = sys.modules[type(processors[0]).__module__]
    dispatch, matrices = module.dispatch_attention_fn, dict[int, Tensor]()

    def biased(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        apart_alone = isolate and not family.two_networks  # one of two has unconditional rows, without a text
        if key.shape[1] < CELLS**2 or (key.shape[1] == CELLS**2 and not apart_alone):
            return dispatch(query, key, value, attn_mask=attn_mask, **options)
        if key.shape[1] not in matrices:
            matrices[key.shape[1]] = matrix(key.shape[1])
        none = torch.zeros_like(matrices[key.shape[1]])
        mask = torch.stack([none if unconditional else matrices[key.shape[1]] for unconditional in rows])[:, None]
        if attn_mask is not None:
            hides = attn_mask.dtype == torch.bool  # otherwise they are numbers (Chroma)
            mask = mask.masked_fill(~attn_mask, -torch.inf) if hides else mask + attn_mask
        return dispatch(query, key, value, attn_mask=mask, **options)

    module.dispatch_attention_fn = biased
    try:
        yield
    finally:
        module.dispatch_attention_fn = dispatch


WORDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "others": lambda phrases: 1 - phrases.flip(2),
    "phrase": lambda phrases: phrases,
    "image": torch.zeros_like,
}
"""1 at the tokens that each of two LoRAs changes, by the words of both. Shape: [1, tokens, 2]."""


def expected(
    family: Family, pipe: Any, asked: Asked, own: float, other: float, *, words: str, isolate: bool = False
) -> Tensor:
    """Latents of diffusers' pipeline in which each LoRA acts on the cells of its region, of conditional rows alone."""
    rows: list[bool] = []

    def places(unconditional: Sequence[bool]) -> Places:
        rows[:] = unconditional
        live = torch.tensor([float(not uncond) for uncond in unconditional])[:, None, None]
        phrases = torch.zeros(1, TOKENS, 2)
        phrases[:, : asked.phrases.shape[1]] = asked.phrases[:, :TOKENS]
        text = WORDS[words](phrases)
        return Places(live * text, live * asked.shares, torch.zeros(len(rows), 2))

    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    with (
        dense_loras(family, pipe.transformer, loras, places, guided=True),
        dense_bias(family, pipe, asked, own, other, rows, isolate=isolate),
    ):
        return plain_latents(family, pipe, **CALL, **family.guided)


@pytest.mark.parametrize("family", slow_but((*FEW, "flux3"), JOINT), indirect=True)
def test_freefuse_is_diffusers_with_dense_deltas_masks_and_bias(family, pipe, asked):
    method = FreeFuse(length=1, own_bias=2, other_bias=-3, rows="cond_only")
    found = latents_of(pipe, concepts=["cat", "dog"], method=method, **family.guided)
    (regions,) = asked
    assert (regions.shares.sum(dim=2) == 1).all(), "every cell belongs to one subject"
    assert regions.shares.sum(dim=1).min() >= CELLS**2 / 5, "and each subject has about as many"
    wanted = expected(family, pipe, regions, 2, -3, words="others")
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", slow_but(["flux", "qwen-image", "z-image"], JOINT), indirect=True)
def test_draft_is_diffusers_with_dense_deltas_masks_and_bias(family, pipe, asked):
    found = latents_of(pipe, concepts=["cat", "dog"], method=Draft(length=1, isolate=1, bias_steps=1), **family.guided)
    (regions,) = asked
    wanted = expected(family, pipe, regions, 1, -1, words="others", isolate=True)
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
@pytest.mark.parametrize(
    ("words", "isolate"), [("others", 1), pytest.param("phrase", 0, marks=pytest.mark.slow), ("image", 1)]
)
def test_what_a_lora_changes_of_the_text_and_who_sees_whom_are_closed_each_alone(family, pipe, asked, words, isolate):
    method = Draft(length=1, reading="scene", bias=1.5, bias_steps=1, token_mask=words, isolate=isolate)
    found = latents_of(pipe, concepts=["cat", "dog"], method=method, **family.guided)
    wanted = expected(family, pipe, asked[0], 1.5, -1.5, words=words, isolate=bool(isolate))
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=0)
    default = latents_of(pipe, concepts=["cat", "dog"], method=replace(method, token_mask="tara"), **family.guided)
    assert (found - default).abs().max() > 1e-3


@pytest.mark.parametrize("family", slow_but(["z-image"], JOINT), indirect=True)
def test_the_images_of_a_batch_have_masks_of_their_own(family, pipe):
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    call: dict[str, Any] = {"concepts": ["cat", "dog"], "method": "freefuse", **family.guided}
    found = latents_of(pipe, **call, latents=noise, num_images_per_prompt=2)
    for image in range(2):
        alone = latents_of(pipe, **call, latents=noise[image : image + 1])
        torch.testing.assert_close(found[image : image + 1], alone, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", slow_but(["flux"], JOINT), indirect=True)
def test_maps_are_recorded_with_the_bias(family, pipe):
    maps = {
        bias: latents_and_maps(pipe, family, Draft(length=1, reading="scene", bias=bias))[0, 0] for bias in (0.0, 3.0)
    }
    assert (maps[3.0] - maps[0.0]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_regions_are_apart_and_drawn_to_their_words_at_first_only(family, pipe):
    """As a call that is so in all steps up to there, and as one that never is from there."""

    def latents(method: Draft, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        after: list[Tensor] = []

        def seen(_pipe: Any, index: int, _t: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
            after.append(given["latents"])
            return {"latents": start} if start is not None and index == 0 else {}

        call: dict[str, Any] = {**CALL, **family.unguided, "num_inference_steps": 3, "generator": seeded(3)}
        pipe(**call, concepts=["cat", "dog"], method=method, num_images_per_prompt=2, callback_on_step_end=seen)
        return after[0], after[-1]

    method = Draft(length=1, isolate=0.3, bias_steps=0.3)
    first, last = latents(method)
    assert torch.equal(first, latents(replace(method, isolate=1, bias_steps=1))[0])
    assert torch.equal(last, latents(replace(method, isolate=0, bias=0), first)[1])


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_a_kernel_for_narrow_heads_does_not_get_the_channels_of_the_bias(family, pipe, monkeypatch):
    module: Any = sys.modules[type(pipe.transformer.transformer_blocks[0].attn.processor).__module__]
    dispatch, widths = module.dispatch_attention_fn, dict[str, set[int]]()

    def seen(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        widths.setdefault(getattr(options["backend"], "value", options["backend"]), set()).add(query.shape[-1])
        return dispatch(query, *arguments, **options)

    monkeypatch.setattr(module, "dispatch_attention_fn", seen)
    pipe.transformer.set_attention_backend("_native_math")
    try:
        pipe(**CALL, **family.unguided, concepts=["cat", "dog"], method=Draft(length=1))
    finally:
        pipe.transformer.reset_attention_backend()
    narrow = pipe.transformer.config.attention_head_dim
    assert widths == {"_native_math": {narrow}, "native": {narrow + 8}}


def latents_and_maps(pipe: Any, family: Family, method: Any) -> Tensor:
    return pipe(
        **{**CALL, "generator": seeded(3), "output_type": "latent"}, concepts=["cat", "dog"], method=method,
        record_attention=[0], **family.unguided,
    ).attention_maps  # fmt: skip
