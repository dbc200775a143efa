"""CLoRA against independent references: the authors' algorithm written out on plain models, and other methods.

Meral et al., "CLoRA", arXiv 2403.19776.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from torch import Tensor, nn

from comparisons import far_apart
from components import State, random_lora, save_lora, seeded, small_pipeline, tiny_pipeline, with_library
from composing import ALL_LEVELS
from lora_compose.attention import Lora
from lora_compose.pipelines.denoising.passes import AttentionMaps, MapLoss, MapRequest
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods.clora import Clora
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but
from watched import Watched, once

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


REGIONS = Clora(step_size=0.05, threshold=THETA)
BRANCHES = replace(MASKS_ONLY, step_size=0.05, refine_at=(0.0,), refinements=1)
STEP = Step(1, 4, torch.tensor(1), cfg_scale=7.5)


def loaded(folder: Path, pipe: Any, name: str, trigger: str | None, *, text: bool = False) -> dict[str, Lora]:
    """Loads a concept and returns its factors by model."""
    seed = sum(map(ord, name))
    parts = {"unet": random_lora(pipe.unet, seed, size=0.5)}
    if text:
        parts["text_encoder"] = random_lora(pipe.text_encoder, seed, targets=TEXT)
    file = save_lora(folder / f"{name}.safetensors", **parts)
    pipe.load_concept(file, name, trigger=trigger, class_word=trigger and name)
    return parts


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict[str, Lora]]:
    """Loads a concept and returns its factors by model: `load(pipe, "style", None)`."""
    return partial(loaded, tmp_path)


@pytest.fixture(scope="module")
def with_both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Any]:
    """Pipelines with the concepts "cat" and "dog", from which the others take them."""

    @cache
    def made(whole: bool) -> Any:
        pipe, folder = (small_pipeline if whole else tiny_pipeline)(), tmp_path_factory.mktemp("loras")
        words = (("cat", "sks"), ("dog", "zwx"))
        pipe.loras = [loaded(folder, pipe, name, trigger, text=True) for name, trigger in words]
        return pipe

    return made


@pytest.fixture
def composer(pipe, whole, with_both) -> ComposeStableDiffusionPipeline:
    """A small pipeline with the concepts "cat" and "dog", whose LoRAs change the text encoder as well."""
    pipe.loras = with_both(whole).loras
    return with_library(pipe, with_both(whole).library)


def call(pipe: Any, prompt: str | list[str] = PROMPT, **arguments: Any) -> Any:
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    if isinstance(pipe, ComposeStableDiffusionPipeline):
        given["concepts"] = ["cat", "dog"]
    return pipe(prompt, **given | arguments)


def latents_of(pipe: Any, prompt: str | list[str] = PROMPT, **arguments: Any) -> Tensor:
    return call(pipe, prompt, **arguments).images


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    """Random weights under guidance make latents of any size, so their largest value is the scale."""
    assert (one - other).abs().max() <= tolerance * other.abs().max()


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
                heads: Any = unet.get_submodule(name.removesuffix(".to_q")).heads
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
            outputs, maps = [], []
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


@ALL_LEVELS
def test_official_is_what_the_authors_do(composer, plain_pipe):
    guidance = 3.0
    written = WrittenOut(plain_pipe, composer.loras, guidance=guidance)
    expected = written.denoise(2, step_size=20.0, until=1, refine={0: 1})
    masks = torch.stack(written.claimed)
    assert 0.1 < masks[:, 1:].mean() < 0.9
    assert masks[:, 0].any()
    settings = replace(OFFICIAL, refinements=1)
    found = latents_of(composer, guidance_scale=guidance, method=settings)
    assert_close(found, expected, 2e-3)
    assert far_apart(found, latents_of(composer, guidance_scale=guidance, method=replace(settings, step_size=0)))


# Against other methods, and against itself


@ALL_LEVELS
def test_regions_are_those_of_lora_composer_with_the_same_masks_and_texts(composer, tmp_path):
    settings = Clora(step_size=0, threshold=THETA, exclusive=False, mask_until=0)
    found = call(composer, method=settings, record_attention=True)
    masks = found.masks[0, 0]
    assert (masks[0] & masks[1]).any()
    assert not masks.all()
    assert (found.masks == found.masks[:1]).all()  # they stay as they are after the first step
    concepts = []
    for name, text, mask in zip(("cat", "dog"), (CAT, DOG), masks, strict=True):
        path = tmp_path / f"{name}.png"
        Image.fromarray(mask.repeat_interleave(32, 0).repeat_interleave(32, 1).numpy()).convert("L").save(path)
        concepts.append(Concept(name=name, prompt=text, region=str(path)))
    composed = LoraComposer(isolate=False, step_size=0, apart=0, background="scene")
    assert_close(found.images, latents_of(composer, method=composed, concepts=concepts))
    branches = latents_of(composer, method=replace(MASKS_ONLY, mask_until=0))
    assert far_apart(found.images, branches)


def test_one_subject_is_an_ordinary_lora(composer, plain_pipe):
    prompt = "a sks cat on grass"
    plain_pipe.load_lora_weights(composer.concepts["cat"].lora, adapter_name="cat")
    expected = latents_of(plain_pipe, prompt)
    for settings in (Clora(), OFFICIAL):
        assert_close(latents_of(composer, prompt, method=settings, concepts=["cat"]), expected)


def test_the_order_of_concepts_does_not_count(composer):
    one = latents_of(composer, method=REGIONS)
    assert_close(one, latents_of(composer, method=REGIONS, concepts=["dog", "cat"]), 1e-3)


def test_a_style_of_weight_0_is_no_style(composer, load):
    settings = Clora(step_size=0, threshold=THETA)
    load(composer, "style", None)
    style = Concept(name="style", weight=0.0, role="style")
    without = latents_of(composer, method=settings)
    assert_close(latents_of(composer, method=settings, concepts=["cat", "dog", style]), without)
    with_style = latents_of(
        composer, method=settings, concepts=["cat", "dog", style.model_copy(update={"weight": 1.0})]
    )
    assert far_apart(with_style, without)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        pytest.param(REGIONS, 2, id="regions", marks=pytest.mark.slow),
        pytest.param(BRANCHES, 1, id="branches"),
        pytest.param(OFFICIAL, 2, id="official", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_give_the_same_numbers(composer, settings, size):
    settings = replace(settings, update_until=0.3)
    found = call(composer, method=replace(settings, branch_batch_size=size))
    expected = call(composer, method=settings)
    assert_close(found.images, expected.images, 1e-3)
    assert found.cost.rows_forward == expected.cost.rows_forward
    assert found.cost.rows_backward == expected.cost.rows_backward


@pytest.mark.parametrize("settings", slow_but([REGIONS], [REGIONS, BRANCHES]), ids=["regions", "branches"])
def test_images_of_a_batch_are_those_made_alone(composer, settings):
    prompts = [PROMPT, "a zwx dog, a sks cat"]
    together = latents_of(composer, prompts, method=settings, generator=[seeded(1), seeded(2)])
    alone = [
        latents_of(composer, prompt, method=settings, generator=seeded(k)) for k, prompt in enumerate(prompts, start=1)
    ]
    assert_close(together, torch.cat(alone), 1e-3)


# Costs, schedules, what is returned


def counted(found: Any) -> tuple[float, float, float]:
    return found.cost.rows_forward, found.cost.rows_stopped, found.cost.rows_backward


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # P = 3 branches, T = 4 steps, K = 2 updates, one refinement step of r = 3
        (replace(OFFICIAL, refine_at=(0.25,), refinements=3), (2 * 3 * (4 + 3), 0, 2 * 3 * (2 + 3))),
        (replace(MASKS_ONLY, step_size=0.1, refine_at=(0.25,), refinements=3), (4 * 4, 3 * 5, 3 * 5)),
        (replace(MASKS_ONLY, uncond="each"), (6 * 4, 0, 0)),
        (Clora(step_size=0.1), (2 * 4, 3 * 2, 3 * 2)),
        (Clora(step_size=0), (2 * 4, 3 * 2, 0)),
        (Clora(step_size=0, mask_until=0), (2 * 4, 3, 0)),
        (Clora(step_size=0.1, mask_until=1.0), (2 * 4, 3 * 4, 3 * 2)),
        (replace(OFFICIAL, update_until=3, refine_at=(2, 3), refinements=1), (2 * 3 * (4 + 1), 0, 2 * 3 * (3 + 1))),
    ],
)
def test_rows_are_counted(composer, settings, expected):
    assert counted(call(composer, method=settings, num_inference_steps=4)) == expected


@pytest.mark.parametrize(
    ("settings", "steps", "guidance"), [(REGIONS, 1, 7.5), (REGIONS, 2, 0.0), (BRANCHES, 2, 1.0), (OFFICIAL, 1, 7.5)]
)
def test_few_steps_and_no_guidance_work(composer, settings, steps, guidance):
    found = call(composer, method=settings, num_inference_steps=steps, guidance_scale=guidance)
    assert found.images.isfinite().all()
    halves = 2 if guidance > 1 else 1
    if settings.fuse == "regions":
        assert found.cost.rows_forward == halves * steps


@pytest.mark.parametrize(
    "settings",
    [pytest.param(REGIONS, id="regions"), pytest.param(OFFICIAL, id="official", marks=pytest.mark.slow)],
)
def test_guidance_may_be_switched_off_on_the_way(composer, settings):
    found = latents_of(composer, method=settings, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.0))
    assert found.isfinite().all()
    assert far_apart(found, latents_of(composer, method=settings))


@ALL_LEVELS
@pytest.mark.parametrize("settings", slow_but([REGIONS], [REGIONS, BRANCHES]), ids=["regions", "branches"])
def test_maps_and_masks_of_every_step_come_back_on_the_grid_of_the_canvas(composer, load, settings):
    load(composer, "style", None)
    concepts = ["cat", Concept(name="style", role="style"), "dog"]
    size: dict[str, Any] = {"width": 192, "height": 128}
    found = call(composer, method=settings, concepts=concepts, record_attention=[0, -1], **size)
    assert found.recorded_steps == (0, 1)
    assert found.attention_maps.shape == found.masks.shape == (2, 1, 3, 4, 6)
    assert found.masks[:, :, 1].all()  # a style is everywhere
    assert found.masks[:, :, [0, 2]].any()
    plain = call(composer, method=settings, concepts=concepts, **size)
    assert torch.equal(plain.images, found.images)


def started(composer: Any, settings: Clora, **arguments: Any) -> Any:
    """The process of a call."""
    method = Watched(settings)
    call(composer, method=method, num_inference_steps=1, **arguments)
    return method.process


@ALL_LEVELS
def test_the_map_of_a_cell_stays_where_the_cell_is(composer):
    """Rows are rows and columns are columns, on a canvas that is not square."""
    process = started(composer, replace(MASKS_ONLY, threshold=0.0), width=192, height=128)
    cells = torch.arange(24.0)[None, :, None]  # counted along the rows of 4 x 6 cells
    found = process._by_branch(AttentionMaps(cells.expand(3, 24, process.words.token_weights.shape[2])))
    assert torch.equal(found[0, 0, 0], torch.arange(24.0).view(4, 6))


@ALL_LEVELS
def test_maps_of_both_halves_are_averaged_as_the_authors_do(composer):
    process = started(composer, OFFICIAL)
    tokens = process._all_rows(STEP).tokens
    assert torch.equal(tokens[:3], tokens[3:])
    maps = torch.rand(6, 16, tokens.shape[2], generator=seeded())
    expected = ((maps[:3] + maps[3:]) / 2).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(process._by_branch(AttentionMaps(maps))[:, 0], expected)


def masks_of(masks: list[list[int]]) -> Tensor:
    """Masks of two subjects on a grid of 2 x 2."""
    return torch.tensor(masks).bool().view(1, 2, 2, 2)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([[1, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0]]),
        ([[1, 1, 0, 0], [0, 1, 1, 1]], [[0, 0, 0, 0], [1, 0.5, 0, 0], [0, 0.5, 1, 1]]),
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_every_cell_is_shared_out_and_cells_that_no_concept_claims_are_the_base_models(composer, masks, expected):
    shares = replace(started(composer, MASKS_ONLY), masks=masks_of(masks))._shares(STEP)
    assert shares.shape == (3, 1, 1, 16, 16)
    assert torch.equal(shares[:, 0, 0, ::8, ::8].flatten(1), torch.tensor(expected))
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(1, 1, 16, 16))


@pytest.mark.parametrize("exclusive", [False, True])
def test_cells_that_several_claim_are_shared_or_go_to_the_highest(composer, exclusive):
    process = started(composer, replace(MASKS_ONLY, threshold=0.4, exclusive=exclusive))
    cat, dog = torch.tensor([[10.0, 8, 5, 0]]), torch.tensor([[0.1, 0.9, 1.0, 0.2]])
    mine = process.words.makes_mask[0]
    maps = torch.stack(
        [torch.where(m[:, None, None], x, torch.rand(1, 4)) for m, x in zip(mine, (cat, dog), strict=True)]
    )
    found = process._subject_masks(maps[None])[0, :, 0].int().tolist()
    # As parts of their own maximum, 0.8 against 0.9 in the second cell, 0.5 against 1 in the third.
    assert found == ([[1, 0, 0, 0], [0, 1, 1, 0]] if exclusive else [[1, 1, 1, 0], [0, 1, 1, 0]])


def test_before_mask_from_all_branches_are_averaged(composer):
    early = replace(MASKS_ONLY, mask_from=1.0)
    found = latents_of(composer, method=early)
    one, other = (latents_of(composer, method=replace(early, threshold=theta)) for theta in (0.0, 0.9))
    assert torch.equal(one, other)  # masks do not count
    assert far_apart(found, latents_of(composer, method=MASKS_ONLY))


def test_words_that_make_the_mask_can_be_named(composer):
    named = replace(MASKS_ONLY, mask_words={"cat": ["sks", "cat"], "dog": ["zwx", "dog"]})
    triggers = replace(MASKS_ONLY, mask_words={"cat": ["sks"], "dog": ["zwx"]})
    both, one, unnamed = (latents_of(composer, method=settings) for settings in (named, triggers, MASKS_ONLY))
    assert torch.equal(both, unnamed)
    assert far_apart(one, unnamed)
    words = started(composer, replace(MASKS_ONLY, mask_words={"cat": ["grass"]})).words
    (column,) = words.makes_mask[0, 0].nonzero()[:, 0].tolist()
    assert words.token_weights[1, :, column].nonzero().tolist() == [[8]]  # a1 sks2 cat3 and4 a5 dog6 on7 grass8
    assert words.groups[0].unflatten(0, (3, -1))[1, column] == -1  # it belongs to no group


# Gradients


@ALL_LEVELS
def test_the_gradient_is_the_slope_of_the_loss(composer):
    def look(process: Any, latents: Tensor, step: Step) -> None:
        denoiser, request = process.session.denoiser, MapRequest(process.words.token_weights)

        def loss(latents: Tensor) -> Tensor:
            return process.loss(denoiser.maps(latents, step, process.branches, request))

        found = denoiser.gradient(latents, step, process.branches, MapLoss(request, process.loss))
        slope = found.direction.square().sum()
        nudge = 1e-2 / found.direction.norm()
        ahead, behind = (loss(latents + side * nudge * found.direction) for side in (1, -1))
        assert ((ahead - behind) / (2 * nudge)).item() == pytest.approx(slope.item(), rel=0.05)

    method = Watched(Clora(step_size=0), once(look))
    call(composer, method=method, num_inference_steps=1)
    assert method.processes


def test_nothing_is_left_behind_and_the_same_call_gives_the_same_bits(composer):
    before = State(composer)
    one, other = latents_of(composer, method=OFFICIAL), latents_of(composer, method=OFFICIAL)
    assert torch.equal(one, other)
    assert not one.requires_grad
    before.assert_unchanged()


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuse": "mean"}, "fuse must be one of regions, branches"),
        ({"step_size": -1}, "step_size must not be negative"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"morphology": ("shrink",)}, "morphology may be dilate, erode, open, close, not shrink"),
        ({"refine_at": (-1,)}, "refine_at must be points of the steps"),
        ({"branch_batch_size": 0}, "branch_batch_size must be at least 1"),
        ({"whole": True}, 'are for fuse="branches"'),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Clora(**changes)


@pytest.mark.parametrize(
    ("prompt", "concepts", "changes", "message"),
    [
        ("a sks and a zwx dog", ["cat", "dog"], {}, "write 'sks cat' in the prompt"),
        (
            PROMPT,
            [Concept(name="cat", prompt="a cat and a dog"), "dog"],
            {},
            "the trigger 'sks' of concept 'cat' is not in",
        ),
        (PROMPT, ["cat", "dog"], {"words": {"bird": ["bird"]}}, r"words names \['bird'\]; the subjects are cat, dog"),
        (PROMPT, ["cat", "dog"], {"words": {"cat": "cat"}}, "must be a list of words"),
        (PROMPT, ["cat", "dog"], {"words": {"cat": ["dog"]}}, r"the same word of .* names cat and dog"),
        (PROMPT, ["cat", "dog"], {"mask_words": {"cat": ["bird"]}}, "none of the words"),
    ],
)
def test_scenes_that_cannot_be_told_apart_are_refused(composer, prompt, concepts, changes, message):
    with pytest.raises(ValueError, match=message):
        latents_of(composer, prompt, concepts=concepts, method=Clora(**changes))


def test_regions_are_ignored_with_a_warning(composer, caplog):
    boxed = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
    boxes, none = (latents_of(composer, method=Clora(), concepts=given) for given in (boxed, ["cat", "dog"]))
    assert torch.equal(boxes, none)
    assert "method='lora-composer' uses regions" in caplog.text


def test_the_negative_prompt_of_a_concept_is_read_in_its_mask(composer, caplog):
    cat = Concept(name="cat", negative_prompt="a dog at night")
    for settings in (Clora(step_size=0, threshold=THETA), replace(MASKS_ONLY, uncond="each")):
        own, shared = (latents_of(composer, method=settings, concepts=[first, "dog"]) for first in (cat, "cat"))
        assert far_apart(own, shared)
    assert not caplog.text
    own, shared = (latents_of(composer, method=MASKS_ONLY, concepts=[first, "dog"]) for first in (cat, "cat"))
    assert torch.equal(own, shared)
    assert "clora reads own negative prompts only where" in caplog.text


def test_embeddings_are_refused(composer):
    embeds = torch.zeros(1, 32, 24)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "concepts": ["cat", "dog"]}
    with pytest.raises(ValueError, match="clora makes a text for each branch"):
        composer(**given, num_inference_steps=1, method="clora")


def test_refinement_outside_the_updates_is_mentioned_and_left_out(composer, caplog):
    late = replace(BRANCHES, refine_at=(0.75,), refinements=3)
    assert call(composer, method=late).cost.rows_backward == 3  # branches, in the first of two steps
    assert "refine_at" in caplog.text
