"""A composition in a model of ComfyUI, for as long as it samples with it.

ComfyUI calls us when a sampling begins (SAMPLER_SAMPLE), when a pass begins (APPLY_MODEL), and around changes that it
makes in the middle of a sampling (ON_EJECT_MODEL, ON_INJECT_MODEL). LoRAs act on the `forward` of layers, so keys of
the state dict stay, and are taken out at the end of the sampling, also after an exception.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.patcher_extension as core  # pyright: ignore[reportMissingImports]
import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from lora_compose.attention import NORM_APART, Grid, Installation, Recorder, grid_at, installed_bank
from lora_compose.attention.forward_state import LayerInputs
from lora_compose.attention.swapped_forward import SwappedForward
from lora_compose.compose.comfyui.composition import (
    Acting,
    ComposedConcepts,
    Conditioning,
    Found,
    Passes,
    RegionsByImage,
    on_grids,
    over,
)
from lora_compose.compose.comfyui.families import family_of
from lora_compose.compose.comfyui.memory import Brought, MovableFactors, OnKnownGrid
from lora_compose.compose.comfyui.steering import EachTextFromItsStart, SteeredAttention
from lora_compose.compose.comfyui.tokens import tokens_of
from lora_compose.pipelines.scene.canvas import steps_in
from lora_compose.pipelines.scene.division import LENGTH, LENGTH_JOINT

KEY = "lora_compose"
"""Our name among callbacks and wrappers, and of the mark in conditionings."""
OF_TEXT = ("pooled_output", "attention_mask", "t5xxl_ids", "t5xxl_weights")
"""What encoders give beside a text."""


def compose(patcher: Any, composition: ComposedConcepts) -> Any:
    """A clone of a `ModelPatcher` in which a composition acts in all sampling; ValueError if one acts already."""
    if patcher.get_attachment(KEY) is not None:
        raise ValueError(
            "this model has concepts already; connect that of your checkpoint, and all concepts as one chain"
        )
    factors = MovableFactors(composition.loras, patcher.offload_device)
    size = factors.bytes_in(_dtype(patcher.model))
    counted = comfy.model_patcher.ModelPatcher(factors, patcher.load_device, patcher.offload_device, size)
    clone, hooks = patcher.clone(), SamplingHooks(composition, factors)
    clone.set_attachments(KEY, hooks)
    clone.set_additional_models(KEY, [counted])
    clone.add_callback_with_key(core.CallbacksMP.ON_EJECT_MODEL, KEY, hooks.eject)
    clone.add_callback_with_key(core.CallbacksMP.ON_INJECT_MODEL, KEY, hooks.inject)
    clone.add_wrapper_with_key(core.WrappersMP.SAMPLER_SAMPLE, KEY, hooks.sample)
    clone.add_wrapper_with_key(core.WrappersMP.APPLY_MODEL, KEY, hooks.apply_model)
    return clone


def draft_alone(patcher: Any, sample: Callable[[], Any]) -> Found:
    """What `draft` finds in a sampling, which ends after the drafted steps. ValueError if nothing is drafted.

    Clones of a model share its `SamplingHooks`: no other sampling with one of them may overlap.
    """
    hooks = patcher.get_attachment(KEY)
    if hooks is None or hooks.composition.draft is None:
        raise ValueError(
            "nothing is drafted with this model; connect that of Compose, with method draft and a subject without box "
            "and mask"
        )
    hooks.previews = previews = []
    try:
        sample()
    finally:
        hooks.previews = None
    if not previews:
        raise ValueError("there are no steps to draft; set steps to 1 or more")
    return previews[-1]


def _dtype(model: Any) -> torch.dtype:
    return model.manual_cast_dtype or model.get_dtype()


def marked(conditioning: Conditioning, composition: ComposedConcepts) -> list[list[Any]]:
    """A conditioning of ComfyUI as one of a composition, whose concepts act on its rows."""
    return [[text, {**options, KEY: composition.mark}] for text, options in conditioning]


def _is(conditioning: Mapping[str, Any], given: Conditioning) -> bool:
    """Whether a conditioning, as samplers have it, has the text that is given, also as a whole (pooled)."""
    ((text, options),) = given
    pairs = (conditioning["cross_attn"], text), (conditioning.get("pooled_output"), options.get("pooled_output"))
    return all(a is b or (a is not None and b is not None and torch.equal(a, b.to(a))) for a, b in pairs)


class SamplingHooks:
    """The callbacks that ComfyUI calls around a sampling and around each of its passes.

    Args:
        composition: What acts where.
        factors: Its factors, which ComfyUI moves.

    Attributes:
        previews: What drafts have found, of samplings that end after them; None if samplings go on to images.
    """

    def __init__(self, composition: ComposedConcepts, factors: MovableFactors) -> None:
        self.composition, self.factors = composition, factors
        self.previews: list[Found] | None = None
        self._sampling: ActiveSampling | None = None

    def sample(
        self, executor: Any, guider: Any, sigmas: Tensor, extra: dict[str, Any], callback: Any, noise: Tensor,
        latents: Tensor | None = None, mask: Tensor | None = None, *further: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Around a whole sampling (SAMPLER_SAMPLE): LoRAs are in the model inside. Its arguments are the sampler's."""
        composition, conditionings = self.composition, guider.conds
        given = {"latent_image": latents, "denoise_mask": mask, "seed": extra.get("seed")}
        ours = self._ours(conditionings)
        sampling = self._sampling = ActiveSampling(guider, composition, self.factors, ours, noise, sigmas, given)
        images = [composition.regions]
        try:
            sampling.install()
            if composition.draft is not None and sampling.steps:
                guider.conds = sampling.start(composition.drafted(composition.draft), images)
                length = LENGTH_JOINT if sampling.joint else LENGTH
                first = sigmas[: 1 + max(1, math.ceil(steps_in(length, sampling.steps)))]
                start = {**extra}, None, noise.clone(), latents, mask
                maps = sampling.maps(partial(executor, guider, first, *start, *further, **options))
                images = [composition.draft.divide(image, composition.regions, sampling.grid) for image in maps]
                if self.previews is not None:
                    cells = torch.stack([on_grids(regions, sampling.grid) for regions in images])
                    self.previews.append(Found(maps, cells))
            if self.previews is not None:
                return noise  # `draft_alone` asks for what was found, not for an image
            guider.conds = sampling.start(replace(composition, draft=None), images)
            return executor(guider, sigmas, extra, callback, noise, latents, mask, *further, **options)
        finally:
            guider.conds, self._sampling = conditionings, None
            sampling.remove()

    def _ours(self, conditionings: Mapping[str, Any]) -> Collection[Any]:
        """The conditionings that concepts act on, by their identifiers."""
        every = [conditioning for several in conditionings.values() for conditioning in several or ()]
        mine = [conditioning for conditioning in every if conditioning.get(KEY) == self.composition.mark]
        if not mine:
            raise ValueError("connect the CONDITIONING of the same Compose to the sampler, as the positive one")
        for tokens in [tokens_of(conditioning["cross_attn"], conditioning) for conditioning in mine]:
            if self.composition.tokens not in (None, tokens):
                raise ValueError(
                    f"the conditioning has {tokens} tokens, the text of the concepts has {self.composition.tokens}: "
                    "connect the CONDITIONING of Compose without joining it to other texts"
                )
        if (whole := self.composition.whole) is not None and not all(_is(conditioning, whole) for conditioning in mine):
            raise ValueError(
                "another node has changed the conditioning of Compose, where regions read texts of their own: connect "
                "it as it is, and make a negative one of a text of its own; or set texts to shared"
            )
        if any(conditioning.get(KEY) not in (None, self.composition.mark) for conditioning in every):
            raise ValueError("conditionings of several Compose nodes cannot be sampled together; chain the concepts")
        return {conditioning["uuid"] for conditioning in mine}

    def eject(self, patcher: Any) -> None:
        """Removes the LoRAs after ComfyUI has ejected its own (ON_EJECT_MODEL)."""
        if self._sampling is not None and patcher.model is self._sampling.model:
            self._sampling.remove()

    def inject(self, patcher: Any) -> None:
        """Installs the LoRAs again after ComfyUI has injected its own (ON_INJECT_MODEL)."""
        if self._sampling is not None and patcher.model is self._sampling.model:
            self._sampling.install()

    def apply_model(
        self, executor: Any, x: Tensor, t: Tensor, concat: Any = None, text: Any = None, control: Any = None,
        options: Any = None, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """Around a pass (APPLY_MODEL): says on which rows and cells the concepts act."""
        sampling = self._sampling
        if sampling is None or executor.class_obj is not sampling.model:
            raise ValueError("concepts act in one copy of a model alone, while it is sampled; not on several GPUs")
        if inputs.get("ref_latents") is not None:
            raise ValueError("reference images cannot be combined with concepts yet; leave ReferenceLatent out")
        if sampling.steered and {"attn1", "attn2"} & options.get("patches_replace", {}).keys():
            raise ValueError("another node replaces attention; it cannot be combined with a draft or texts of regions")
        return sampling.run(
            options["uuids"], x, t, text, partial(executor, x, t, concat, text, control, options, **inputs)
        )


class ActiveSampling:
    """A composition in a model during one sampling.

    Args:
        guider: ComfyUI's, whose model samples.
        composition: What acts where.
        ours: The conditionings that concepts act on.
        noise: Shape: [images, channels, (frames,) height, width].
        sigmas: The noise level before each step, and after the last one.
        given: Start latents, mask and seed, which a model may make a part of its conditioning of.

    Attributes:
        model: ComfyUI's `BaseModel`.
        steered: Whether attention is steered.
        grid: Height and width of the latents.
        steps: How many steps it has.
        joint: Whether text and image are one sequence; then maps are those of the last drafted step alone.
    """

    _passes: Passes  # from `start` on

    def __init__(
        self, guider: Any, composition: ComposedConcepts, factors: MovableFactors, ours: Collection[Any], noise: Tensor,
        sigmas: Tensor, given: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.model = guider.inner_model
        drawn = composition.phrases is not None
        self.steered = composition.draft is not None or drawn or bool(composition.texts) or composition.isolate > 0
        self.grid: Grid = (noise.shape[-2], noise.shape[-1])
        self._composition, self._factors, self._ours = composition, factors, ours
        self._noise, self._given = noise, given
        self._conditionings, self._device = guider.conds, guider.model_patcher.load_device
        self._levels, self.steps = sigmas.tolist(), max(0, len(sigmas) - 1)
        self._family = family_of(self.model.diffusion_model)
        self.joint = self._family.joint is not None
        self._inputs: dict[tuple[Any, ...], LayerInputs] = {}
        self._maps: dict[int, list[Tensor]] = {}
        self._stack = ExitStack()
        self._installation: Installation | None = None

    def install(self) -> None:
        """Installs the LoRAs."""
        model, dtype, family = self.model.diffusion_model, _dtype(self.model), self._family
        bank = self._factors.bank_for(model, family.sites, dtype)
        layers = installed_bank(model, bank, device=self._device, dtype=dtype, around=Brought)
        self._installation = self._stack.enter_context(layers)
        if self.steered:
            for name, site in family.attention.items():
                self._swap(name, partial(SteeredAttention, name, site, bank.state))
            if family.positions is not None:
                self._swap(family.positions, partial(EachTextFromItsStart, bank.state))
        if family.joint is None:
            self._installation.normalise_by_region(OnKnownGrid)

    def _swap(self, name: str, around: Callable[..., Any]) -> None:
        """Puts on a module what is made of its `forward`."""
        module = self.model.diffusion_model.get_submodule(name)
        swap = SwappedForward(module, around(module.forward))
        self._stack.callback(swap.take_off)
        swap.put_on()

    def remove(self) -> None:
        """Removes the LoRAs; may be called twice."""
        self._installation = None
        self._stack.close()

    def start(self, composition: ComposedConcepts, images: RegionsByImage) -> Mapping[str, Any]:
        """Lets a composition act in the next passes.

        Returns:
            Conditionings of which ours read its texts, one after the other; each as the model reads one alone.
        """
        lengths: list[int] = []

        def encoded(kind: str, conditioning: dict[str, Any], text: Conditioning) -> Any:
            ((tensor, others),) = text
            other = {**conditioning, "cross_attn": tensor, **{name: others.get(name) for name in OF_TEXT}}
            encode, function = comfy.samplers.encode_model_conds, self.model.extra_conds
            return encode(function, [other], self._noise, self._device, kind, **self._given)[0]

        def reading(kind: str, conditioning: dict[str, Any]) -> dict[str, Any]:
            if not composition.texts or conditioning["uuid"] not in self._ours:
                return conditioning
            first, *more = [encoded(kind, conditioning, text) for text in composition.texts]
            if not more:
                return first
            every = [other["model_conds"]["c_crossattn"] for other in (first, *more)]
            lengths[:] = [other.cond.shape[1] for other in every]
            joined = type(every[0])(torch.cat([other.cond for other in every], dim=1))
            return {**conditioning, "model_conds": {**conditioning["model_conds"], "c_crossattn": joined}}

        read = {
            kind: [reading(kind, conditioning) for conditioning in several or ()]
            for kind, several in self._conditionings.items()
        }
        self._inputs.clear()
        self._passes = Passes.of(composition, self._family, self.grid, images, lengths)
        return read

    def maps(self, sample: Callable[[], Any]) -> Tensor:
        """Attention to each concept in a few steps without subjects. Shape: [images, concepts, height, width].

        Args:
            sample: Runs these steps; the sampler starts again from the same noise afterwards.
        """
        if self._composition.texts and not self.joint and len(self._noise) > 1:
            raise ValueError(
                "where regions read texts of their own, images are drafted one by one; set batch_size to 1"
            )
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            sample()
        if not self._maps:
            raise ValueError("the conditioning of Compose is not used in the first steps, where draft needs it")
        every = [maps for step, maps in self._maps.items() if not self.joint or step == max(self._maps)]
        return torch.stack([image for maps in every for image in maps]).sum(dim=0)

    def run(self, uuids: Sequence[Any], x: Tensor, t: Tensor, text: Tensor, execute: Callable[[], Tensor]) -> Tensor:
        """Runs a pass.

        `uuids` are its conditionings in the order of its rows, `x` the latents [rows, channels, (frames,) height,
        width], `t` the noise level of each row, `text` its text [rows, tokens, channels].
        """
        if self._installation is None:
            raise RuntimeError("ComfyUI runs the model while its changes are taken out; please report this")
        grid, tokens = (x.shape[-2], x.shape[-1]), text.shape[1]
        if grid != self.grid and (self.steered or not all(self._passes.everywhere)):
            raise ValueError("a conditioning with an area of its own cannot be combined with regions of concepts")
        ours = torch.tensor([uuid in self._ours for uuid in uuids]).repeat_interleave(len(x) // len(uuids))
        step, composition = self._step(float(t.max())), self._passes.composition
        isolated = step < steps_in(composition.isolate, self.steps)
        acting = Acting(self._passes, ours, grid, tokens, composition.weights_at(step, self.steps), isolated)
        inputs = self._inputs_of(self._installation, acting, by_region=step < steps_in(NORM_APART, self.steps))
        draft = composition.draft
        if draft is None or not ours.any():
            self._installation.use(inputs)
            return execute()
        words = over(draft.words, tokens, self._family).to(self._device)
        recorder = Recorder(self._family.maps, words[None])
        self._installation.use(inputs, recorder)
        out = execute()
        # The images of each conditioning follow one another.
        maps = recorder.mean().cpu()[ours].unflatten(0, (-1, len(self._noise))).mean(dim=0)
        on_grid = maps.transpose(1, 2).unflatten(2, grid_at(grid, self._family.map_level))
        self._maps.setdefault(step, []).append(on_grid)
        return out

    def _step(self, level: float) -> int:
        """The step of a pass at a noise level; passes between two steps are of the one before."""
        return max(0, sum(begins >= level for begins in self._levels) - 1)

    def _inputs_of(self, installation: Installation, acting: Acting, *, by_region: bool) -> LayerInputs:
        """The inputs of the layers, made once for all passes in which the same acts."""
        key = (*acting.ours.tolist(), acting.grid, acting.tokens, by_region, acting.isolated, acting.weights)
        if key not in self._inputs:
            for other in [other for other in self._inputs if other[-1] != acting.weights]:
                del self._inputs[other]  # those of all steps would be many
            regions, joint = acting.regions(self._device)
            self._inputs[key] = installation.inputs(
                acting.gates, regions=regions, joint_regions=joint, lengths=[acting.tokens] * len(acting.ours),
                text_bias=acting.bias, norm_regions=acting.norm_regions if by_region else None,
            )  # fmt: skip
        return self._inputs[key]
