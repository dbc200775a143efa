"""CLoRA against independent references: the authors' algorithm written out on plain models, and other methods.

Meral et al., "CLoRA", arXiv 2403.19776.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from attention import Lora
from components import ATTENTION, EVERYTHING, random_lora, seeded, small_pipeline
from pipelines.engine import Engine, Prediction
from pipelines.methods.clora import Clora, Contrasting
from pipelines.methods.lora_composer import LoraComposer
from pipelines.scene import Concept
from pipelines.stable_diffusion import ComposeStableDiffusionPipeline

PROMPT = "a sks cat and a zwx dog on grass"
BASE, CAT, DOG = "a cat and a dog on grass", "a sks cat and a dog on grass", "a cat and a zwx dog on grass"
# Positions counted by hand; 0 is the start token.
GROUPS = {"cat": [(0, 2), (1, 2), (1, 3), (2, 2)], "dog": [(0, 5), (1, 6), (2, 5), (2, 6)]}
"""By concept, (branch, token) of its maps."""
MASKS = [[], [2, 3], [5, 6]]
"""By branch, the tokens that make its mask."""
TEXT = ("q_proj", "v_proj", "fc1")
# On random weights maps are nearly the same everywhere.
THETA = 0.95
MASKS_ONLY = Clora(fuse="branches", step_size=0, threshold=THETA, exclusive=False, mask_until=1.0)
OFFICIAL = replace(Clora.official(), threshold=THETA, refinements=2)


@dataclass(frozen=True)
class Seen(Clora):
    """CLoRA whose processes can be looked at after the call."""

    processes: list[Contrasting] = field(default_factory=list)

    def start(self, engine: Engine) -> Any:
        self.processes.append(super().start(engine))
        return self.processes[-1]


def seen(settings: Clora) -> Seen:
    return Seen(**{name: getattr(settings, name) for name in Clora.__dataclass_fields__})


@pytest.fixture
def load(write_lora) -> Callable[..., dict[str, Lora]]:
    """Loads a concept and returns its factors by model: `load(pipe, "cat", "sks", text=True)`."""

    def load(pipe: Any, name: str, trigger: str | None, *, text: bool = False, **options: Any) -> dict[str, Lora]:
        seed = sum(map(ord, name))
        parts = {"unet": random_lora(pipe.unet, seed, **({"size": 0.5} | options))}
        if text:
            parts["text_encoder"] = random_lora(pipe.text_encoder, seed, targets=TEXT)
        pipe.load_concept(write_lora(name, **parts), name, trigger=trigger, class_word=trigger and name)
        return parts

    return load


@pytest.fixture
def composer(pipe, load) -> ComposeStableDiffusionPipeline:
    """A small pipeline with the concepts "cat" and "dog", whose LoRAs change the text encoder as well."""
    pipe.loras = [load(pipe, "cat", "sks", text=True), load(pipe, "dog", "zwx", text=True)]
    return pipe


def latents_of(pipe: Any, prompt: str | list[str] = PROMPT, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": 4, "output_type": "latent", "generator": seeded()}
    if isinstance(pipe, ComposeStableDiffusionPipeline):
        given["concepts"] = ["cat", "dog"]
    return pipe(prompt, **given | arguments).images


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def far_apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# The authors' algorithm, written out


def merged(model: nn.Module, lora: Lora | None) -> nn.Module:
    """A copy of a model with a LoRA in its weights."""
    model = copy.deepcopy(model).requires_grad_(False)
    for name, factors in (lora or {}).items():
        model.get_submodule(name).get_parameter("weight").data += factors.delta()
    return model


class WrittenOut:
    """CLoRA step by step with one plain UNet for every branch, hooks on its queries and keys, and loops.

    `stale`: after an update, what was predicted before it is used, and maps are of both halves of guidance.
    """

    def __init__(self, plain: Any, loras: Sequence[dict[str, Lora]], *, guidance: float = 7.5) -> None:
        self.pipe, self.guidance = plain, guidance
        self.unets = [merged(plain.unet, lora) for lora in (None, *(lora["unet"] for lora in loras))]
        self.texts = []
        encoder = plain.text_encoder
        for text, lora in zip((BASE, CAT, DOG), ({}, *loras), strict=True):
            plain.text_encoder = merged(encoder, lora.get("text_encoder"))
            cond, uncond = plain.encode_prompt(text, "cpu", 1, True)
            self.texts.append(torch.cat([uncond, cond]))
        plain.text_encoder = encoder

    def branch(self, n: int, latents: Tensor, t: Tensor, *, uncond: bool = True) -> tuple[Tensor, Tensor]:
        """Prediction and maps of a branch. Shapes: [2, channels, height, width] and [4, 4, tokens]."""
        unet, text = self.unets[n], self.texts[n] if uncond else self.texts[n][1:]
        taken: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: taken.__setitem__(name, out))
            for name, module in unet.named_modules()
            if name.endswith(("attn2.to_q", "attn2.to_k"))
        ]
        rows = self.pipe.scheduler.scale_model_input(torch.cat([latents] * len(text)), t)
        output = unet(rows, t, text, return_dict=False)[0]
        for hook in hooks:
            hook.remove()
        maps = []
        for name, query in taken.items():
            if name.endswith("to_q") and query.shape[1] == 16:  # the grid of a thirty-second of 128 pixels
                heads = unet.get_submodule(name.removesuffix(".to_q")).heads
                q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, taken[name[:-1] + "k"]))
                maps.append((q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1))
        assert len(maps) == 5  # two layers down, three up
        return output, torch.stack(maps).mean(dim=(0, 1, 2)).unflatten(0, (4, 4))

    def loss(self, maps: Sequence[Tensor], temperature: float = 0.5) -> Tensor:
        rows, labels = [], []
        for label, group in enumerate(GROUPS.values()):
            for branch, token in group:
                row = maps[branch][:, :, token].flatten()
                rows.append((row - row.min()) / (row.max() - row.min()))
                labels.append(label)
        terms = []
        for a in range(len(rows)):
            score = [torch.cosine_similarity(rows[a], row, dim=0) / temperature for row in rows]
            others = sum(score[n].exp() for n in range(len(rows)) if labels[n] != labels[a])
            for b in range(len(rows)):
                if b != a and labels[b] == labels[a]:
                    terms.append(-(score[b].exp() / (score[b].exp() + others)).log())
        return torch.stack(terms).mean()

    def masks(self, maps: Sequence[Tensor], theta: float) -> Tensor:
        """Shape: [branches, 1, height, width] on the latents' grid."""
        masks = torch.zeros(3, 4, 4)
        for branch, tokens in enumerate(MASKS):
            for token in tokens:
                map_ = maps[branch][:, :, token]
                masks[branch][map_ > theta * map_.max()] = 1
        masks[0][masks.sum(dim=0) == 0] = 1
        return masks.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None]

    def passes(self, latents: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        both = [self.branch(n, latents, t) for n in range(3)]
        return [output for output, _ in both], [maps for _, maps in both]

    def denoise(
        self, steps: int, *, step_size: float, until: int, refine: dict[int, int], theta: float = THETA
    ) -> Tensor:
        """Final latents, as the authors' loop makes them."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 4, 16, 16, generator=seeded()) * scheduler.init_noise_sigma
        self.claimed = []
        for i, t in enumerate(scheduler.timesteps):
            for _ in range(1 + refine.get(i, 0)):
                latents = latents.detach().requires_grad_()
                outputs, maps = self.passes(latents, t)
                if i >= until:
                    break
                (gradient,) = torch.autograd.grad(self.loss(maps), latents)
                latents = latents.detach() - step_size * gradient
            with torch.no_grad():
                masks = self.masks(maps, theta)
                self.claimed.append(masks)
                fused = sum(m * output for m, output in zip(masks, outputs, strict=True)) / masks.sum(dim=0)
                uncond, cond = fused[:1], fused[1:]
                guided = uncond + self.guidance * (cond - uncond)
                latents = scheduler.step(guided, t, latents.detach(), return_dict=False)[0]
        return latents


@pytest.mark.parametrize("guidance", [7.5, 3.0])
def test_official_is_what_the_authors_do(composer, plain_pipe, guidance):
    written = WrittenOut(plain_pipe, composer.loras, guidance=guidance)
    expected = written.denoise(5, step_size=20.0, until=3, refine={0: 2, 1: 2, 2: 2})
    masks = torch.stack(written.claimed)
    assert 0.1 < masks[:, 1:].mean() < 0.9
    assert masks[:, 0].any()
    found = latents_of(composer, num_inference_steps=5, guidance_scale=guidance, method=OFFICIAL)
    assert_close(found, expected, 2e-3)
    without = latents_of(
        composer, num_inference_steps=5, guidance_scale=guidance, method=replace(OFFICIAL, step_size=0)
    )
    assert far_apart(found, without)


def test_without_updates_it_is_the_mean_of_the_branches_under_their_masks(composer, plain_pipe):
    written = WrittenOut(plain_pipe, composer.loras)
    expected = written.denoise(4, step_size=0.0, until=0, refine={})
    assert_close(latents_of(composer, method=replace(OFFICIAL, step_size=0)), expected, 5e-4)


def first(pipe: Any, settings: Clora, **arguments: Any) -> tuple[Contrasting, Tensor, Tensor]:
    """The process of a call, its first latents and timestep; the concepts are not installed any more."""
    watched, taken = seen(settings), {}

    def look(pipe: Any, step: int, t: Tensor, tensors: dict) -> dict:
        taken.setdefault("t", t)
        return {}

    latents_of(pipe, method=watched, callback_on_step_end=look, **arguments)
    start = torch.randn(1, 4, 16, 16, generator=seeded()) * pipe.scheduler.init_noise_sigma
    return watched.processes[0], start, taken["t"]
