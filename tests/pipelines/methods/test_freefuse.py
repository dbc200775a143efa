"""FreeFuse against slow references: its formulas with loops, and a whole call with plain diffusers and dense deltas."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor

from comparisons import assert_close, far_apart
from components import EVERYTHING, random_lora, sdxl_unet, seeded, text_loras
from composing import ALL_LEVELS
from lora_compose.attention import RegionAttention, TextBias, backbone_of
from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.process import constant_gates, one_text
from lora_compose.pipelines.methods import FreeFuse, Merge, Settings, choose_method, make_method
from lora_compose.pipelines.methods.freefuse import Fusing, balanced, block_read, similarity
from lora_compose.pipelines.scene.scene import Concept
from reference import FullGates, add_reference

PROMPT = "a sks cat and a zwx dog on grass"
PHRASES, NOUNS = ((2, 3), (6, 7)), ((3,), (7,))  # positions counted by hand; 0 is the start token
SIDES = (16, 8, 4, 2)


def call(pipe: Any, concepts: Sequence[Any] = ("cat", "dog"), prompt: Any = PROMPT, **arguments: Any) -> Any:
    given: dict[str, Any] = {
        "num_inference_steps": 2, "output_type": "latent", "generator": seeded(), "method": "freefuse",
    }  # fmt: skip
    return pipe(prompt, concepts=list(concepts), **given | arguments)


@pytest.fixture
def load(write_lora) -> Callable[..., Any]:
    """Gives a small pipeline the concepts "cat", "dog" and "bear", and "ink", which has no trigger."""

    def load(pipe: Any, texts: bool = True) -> Any:
        for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"), ("bear", "xlo"), ("ink", None))):
            parts = {"unet": random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.1)}
            parts |= text_loras(pipe, seed, size=0.1) if texts else {}
            pipe.load_concept(write_lora(name, **parts), name, trigger=trigger, class_word=trigger and name)
        return pipe

    return load


def published(maps: np.ndarray) -> np.ndarray:
    """The balanced argmax of maps that add up to 1, with the published numbers. Shape: [subjects, height, width]."""
    subjects, height, width = maps.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), 1.3 * np.linspace(-1, 1, width), indexing="ij")
    bias, scores = np.zeros(subjects), maps.copy()
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    running = (maps - low) / (high - low + 1e-8)
    for turn in range(15):
        biased = scores - bias[:, None, None]
        low, high = biased.min(axis=0), biased.max(axis=0)
        running = 0.8 * (biased - low) / (high - low + 1e-8) + 0.2 * running
        counts = [(biased.argmax(axis=0) == i).sum() for i in range(subjects)]
        bias += np.sign(np.array(counts) - height * width / subjects) * 0.01 * (maps.max() - maps.min()) * 0.95**turn
        for i in range(subjects):
            mass = running[i].sum()
            cy, cx = (running[i] * y).sum() / mass, (running[i] * x).sum() / mass
            around = np.pad(running[i], 1)
            votes = sum(
                around[1 + down : 1 + down + height, 1 + across : 1 + across + width] / 8
                for down in (-1, 0, 1) for across in (-1, 0, 1) if down or across
            )  # fmt: skip
            scores[i] = maps[i] - bias[i] + 3e-5 * votes - 3e-5 * ((y - cy) ** 2 + (x - cx) ** 2)
    return scores.argmax(axis=0)


@pytest.mark.parametrize(("subjects", "height", "width"), [(2, 32, 32), (3, 16, 64)])
def test_masks_are_those_of_the_published_algorithm(subjects, height, width):
    noise = torch.randn(3, subjects, height // 4, width // 4, generator=seeded(), dtype=torch.float64)
    maps = F.interpolate(noise, (height, width), mode="bilinear").flatten(2).mul(0.3).softmax(dim=2)
    maps = maps.unflatten(2, (height, width))
    found = balanced(1024 * maps.float())
    expected = np.stack([published(image.numpy()) for image in maps])
    assert (found.argmax(dim=1).numpy() == expected).all()
    assert (found.sum(dim=1) == 1).all()
    assert (expected != maps.argmax(dim=1).numpy()).any()


def similar(attention: Tensor, features: Tensor, share: float) -> Tensor:
    """Mean inner product with the cells that stand for a subject, of one image. Shape: [subjects, cells]."""
    cells, subjects = attention.shape
    rows = []
    for i in range(subjects):
        contrast = [
            subjects * attention[p, i] - sum(attention[p, j] for j in range(subjects) if j != i) for p in range(cells)
        ]
        best = sorted(range(cells), key=lambda p: -float(contrast[p]))[: max(1, int(share * cells))]
        rows.append(torch.stack([sum(features[p] @ features[q] for p in best) / len(best) for q in range(cells)]))  # pyright: ignore[reportArgumentType]
    return torch.stack(rows)


@pytest.mark.parametrize(("share", "temperature"), [(0.2, 40.0), (0.01, None)])
def test_similarities_are_those_of_the_formulas(share, temperature):
    attention = torch.rand(2, 15, 3, generator=seeded(1)).softmax(dim=2)
    features = torch.randn(2, 15, 4, generator=seeded(2)) * 5
    found = similarity(attention, features, share, temperature)
    for image in range(2):
        expected = similar(attention[image], features[image], share)
        scale = temperature or expected.var(dim=1, correction=0).mean().sqrt()
        assert_close(found[image], 15 * (expected / scale).softmax(dim=1))


@ALL_LEVELS
def test_the_block_of_sdxl_is_the_published_one(pipe):
    block = "up_blocks.0.attentions.0.transformer_blocks.3"
    assert block_read(backbone_of(sdxl_unet())) == (f"{block}.attn2", f"{block}.attn1")
    last = "up_blocks.1.attentions.2.transformer_blocks.0"
    assert block_read(backbone_of(pipe.unet)) == (f"{last}.attn2", f"{last}.attn1")


@dataclass(frozen=True)
class Biased:
    """Attention of plain diffusers with a bias. Shape: {cells: [rows, cells, tokens]}."""

    bias: dict[int, Tensor]

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:  # fmt: skip
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))  # pyright: ignore[reportOptionalCall]
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(2, 3) * attn.scale
        if encoder_hidden_states is not None:
            scores = scores + self.bias[hidden_states.shape[1]][:, None]
        project: Any = attn.to_out
        return project[0]((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def masks_of_plain_diffusers(pipe: Any, words: Any, temperature: float) -> Tensor:
    """Two guided steps, then the masks. Shape: [2, 4, 4]."""
    unet, block = pipe.unet, "up_blocks.1.attentions.2.transformer_blocks.0"
    pipe.scheduler.set_timesteps(2)
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    generator = seeded()
    latents = torch.randn(1, 4, 16, 16, generator=generator) * pipe.scheduler.init_noise_sigma
    taken: dict[str, Tensor] = {}
    for t in pipe.scheduler.timesteps:
        hooks = [
            unet.get_submodule(f"{block}.{name}").register_forward_hook(
                lambda _, __, out, name=name: taken.__setitem__(name, out[-1])
            )
            for name in ("attn2.to_q", "attn2.to_k", "attn1.to_out.0")
        ]
        rows = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
        with torch.no_grad():
            output = unet(rows, t, torch.cat([uncond, cond]), return_dict=False)[0]
        for hook in hooks:
            hook.remove()
        guided = output[:1] + 4.0 * (output[1:] - output[:1])
        latents = pipe.scheduler.step(guided, t, latents, generator=generator, return_dict=False)[0]
    heads: Any = unet.get_submodule(f"{block}.attn2").heads
    q, k = (taken[f"attn2.{side}"].unflatten(1, (heads, -1)).transpose(0, 1) for side in ("to_q", "to_k"))
    attention = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(dim=-1).mean(dim=0)
    attention = torch.stack([attention[:, list(positions)].mean(dim=1) for positions in words], dim=1)
    alike = similar(attention, taken["attn1.to_out.0"], 0.1) / temperature
    return balanced(16 * alike.softmax(dim=1).unflatten(1, (4, 4))[None])[0]


@ALL_LEVELS
@pytest.mark.parametrize(
    ("settings", "words", "scheduler"),
    [
        pytest.param(FreeFuse(temperature=0.1), NOUNS, EulerAncestralDiscreteScheduler, marks=pytest.mark.slow),
        (FreeFuse(temperature=0.1, words="phrase", own_bias=2, other_bias=-3, rows="cond_only"), PHRASES, None),
    ],
)
def test_a_call_is_that_of_plain_diffusers_with_dense_deltas_masks_and_bias(
    pipe, plain_pipe, load, settings, words, scheduler
):
    load(pipe, texts=False)
    if scheduler is not None:
        pipe.scheduler, plain_pipe.scheduler = (scheduler.from_config(p.scheduler.config) for p in (pipe, plain_pipe))
    found = call(pipe, method=replace(settings, length=2), guidance_scale=4.0)
    masks = masks_of_plain_diffusers(plain_pipe, words, 0.1)
    tokens = pipe.tokenizer.model_max_length
    acting = torch.tensor([1.0 if settings.rows == "all" else 0.0, 1.0])[:, None]
    image, bias = {}, {}
    for side in SIDES:
        share = F.interpolate(masks[None], (side, side), mode="bilinear")[0]
        image[side, side] = acting[:, None, None] * share.movedim(0, -1)
        bias[side * side] = torch.zeros(2, side * side, tokens)
        for row in range(2):
            for one in range(2):
                for other, positions in enumerate(PHRASES):
                    size = settings.own_bias if one == other else settings.other_bias
                    bias[side * side][row, :, list(positions)] += acting[row] * size * share[one].flatten()[:, None]
    gates = FullGates(acting[:, None].expand(2, tokens, 2), image, acting.expand(2, 2))
    loras = [loaded.lora for loaded in pipe.resolve_concepts(["cat", "dog"])]
    plain_pipe.unet.set_attn_processor(Biased(bias))
    add_reference(plain_pipe.unet, loras, gates)
    expected = plain_pipe(
        PROMPT, num_inference_steps=2, guidance_scale=4.0, generator=seeded(), output_type="latent"
    ).images
    assert masks.sum(dim=(1, 2)).min() > 0
    assert_close(found.images, expected)
    assert (found.cost.rows_forward, found.cost.rows_stopped) == (2 * 1 + 2 * 2, 1)


def test_a_single_subject_is_merged_nothing_is_left_and_it_is_never_chosen(pipe, load):
    load(pipe)
    chosen = choose_method(pipe.resolve_concepts(["cat", "dog"]), [PROMPT])
    assert not isinstance(chosen.method, FreeFuse)
    alone = [call(pipe, ["cat"], "a sks cat", method=method).images for method in (FreeFuse(), Merge())]
    assert torch.equal(*alone)
    before = call(pipe, method="merge").images
    torch.manual_seed(3)
    state = torch.get_rng_state()
    call(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(call(pipe, method="merge").images, before)


def test_images_and_concept_sets_equal_those_of_separate_calls(pipe, load):
    load(pipe)
    noise = torch.randn(4, 4, 16, 16, generator=seeded(3))
    other = "a xlo bear and a sks cat in snow"
    together = call(
        pipe, [["cat", "dog"], ["bear", "cat"]], [PROMPT, other], num_images_per_prompt=2, latents=noise,
        record_attention=True,
    )  # fmt: skip
    assert together.masks.shape[1:3] == (4, 3)
    for image, names, prompt in ((1, ["cat", "dog"], PROMPT), (2, ["bear", "cat"], other)):
        alone = call(pipe, names, prompt, latents=noise[image : image + 1])
        assert_close(together.images[image : image + 1], alone.images)


def test_a_style_acts_everywhere_and_micro_batches_change_nothing(pipe, load, monkeypatch):
    load(pipe)
    style = Concept(name="ink", role="style")
    found = call(pipe, ["cat", "dog", style]).images
    assert far_apart(found, call(pipe).images)
    masked = Fusing._masked
    monkeypatch.setattr(Fusing, "_masked", lambda self, masks: replace(masked(self, masks), branch_batch_size=1))
    assert_close(call(pipe, ["cat", "dog", style]).images, found)


@dataclass(frozen=True)
class Both(Settings):
    """A method whose pass has region attention and a bias."""

    def start(self, session: Any) -> Any:
        gates, text = constant_gates(session, session.concepts.weights_of([])), one_text(session)
        bias = TextBias({}, text.phrase_mask)
        spec = Pass(text, gates, RegionAttention({}, inject=False, isolate=False), text_bias=bias)
        return session.denoiser.prepare(spec)


def test_what_does_not_fit_is_refused(pipe, load):
    load(pipe)
    with pytest.raises(ValueError, match="has none of ink: ink has no trigger: give it one"):
        call(pipe, ["cat", "ink"])
    with pytest.raises(ValueError, match="a pass has it or region attention"):
        call(pipe, method=Both())
    for settings, message in (
        ({"rows": "some"}, "rows must be one of cond_only, all"),
        ({"length": 0}, "length must be positive"),
        ({"share": 0}, "share must be above 0"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"own_bias": math.inf}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make_method("freefuse", settings)
