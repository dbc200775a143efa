"""A composition in a model of ComfyUI, for as long as it samples with it.

ComfyUI calls us when a sampling begins (SAMPLER_SAMPLE), when a pass begins (APPLY_MODEL), and around changes that it
makes in the middle of a sampling (ON_EJECT_MODEL, ON_INJECT_MODEL). LoRAs act on the `forward` of layers, so keys of
the state dict stay, and are taken out at the end of the sampling, also after an exception.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.patcher_extension as core  # pyright: ignore[reportMissingImports]
import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from lora_compose.attention import NORM_APART, Grid, Installation, KeptBanks, Recorder, grid_at, installed_layers
from lora_compose.attention.forward_state import LayerInputs
from lora_compose.attention.swapped_forward import SwappedForward
from lora_compose.compose.comfyui.composition import Acting, Composition, Conditioning, Draft, Found, Places, over
from lora_compose.compose.comfyui.families import family_of
from lora_compose.compose.comfyui.memory import Brought, CountedBank, Factors, bytes_of
from lora_compose.compose.comfyui.steering import EachTextFromItsStart, SteeredAttention
from lora_compose.compose.comfyui.tokens import tokens_of
from lora_compose.pipelines.scene.canvas import steps_in
from lora_compose.pipelines.scene.division import LENGTH

KEY = "lora_compose"
"""Our name among callbacks and wrappers, and of the mark in conditionings."""
OF_TEXT = ("pooled_output", "attention_mask", "t5xxl_ids", "t5xxl_weights")
"""What encoders give beside a text."""


def compose(patcher: Any, composition: Composition) -> Any:
    """A clone of a model (`ModelPatcher`) in which a composition acts wherever ComfyUI samples with it.

    Raises:
        ValueError: If the model has one already.
    """
    if patcher.get_attachment(KEY) is not None:
        raise ValueError(
            "this model has concepts already; connect that of your checkpoint, and all concepts as one chain"
        )
    factors = Factors(patcher.offload_device)
    size = bytes_of(composition.loras, _dtype(patcher.model))
    counted = comfy.model_patcher.ModelPatcher(factors, patcher.load_device, patcher.offload_device, size)
    clone, host = patcher.clone(), Host(composition, factors)
    clone.set_attachments(KEY, host)
    clone.set_additional_models(KEY, [counted])
    clone.add_callback_with_key(core.CallbacksMP.ON_EJECT_MODEL, KEY, host.eject)
    clone.add_callback_with_key(core.CallbacksMP.ON_INJECT_MODEL, KEY, host.inject)
    clone.add_wrapper_with_key(core.WrappersMP.SAMPLER_SAMPLE, KEY, host.sample)
    clone.add_wrapper_with_key(core.WrappersMP.APPLY_MODEL, KEY, host.apply_model)
    return clone


def draft_alone(patcher: Any, sample: Callable[[], Any]) -> Found:
    """What `draft` finds in a sampling, which ends after the drafted steps.

    Clones of a model share its `Host`: no other sampling with one of them may overlap.

    Args:
        patcher: A model of Compose.
        sample: Samples with it.

    Raises:
        ValueError: If nothing is drafted with the model.
    """
    host = patcher.get_attachment(KEY)
    if host is None or host.composition.draft is None:
        raise ValueError(
            "nothing is drafted with this model; connect that of Compose, with method draft and a subject without box "
            "and mask"
        )
    before, host.found, host.only_draft = host.found, None, True
    try:
        sample()
        found = host.found
    finally:
        host.found, host.only_draft = before, False
    if found is None:
        raise ValueError("there are no steps to draft; set steps to 1 or more")
    return found


def _dtype(model: Any) -> torch.dtype:
    return model.manual_cast_dtype or model.get_dtype()


def marked(conditioning: Conditioning, composition: Composition) -> list[list[Any]]:
    """A conditioning of ComfyUI as one of a composition, whose concepts act on its rows."""
    return [[text, {**options, KEY: composition.mark}] for text, options in conditioning]


class Host:
    """What ComfyUI calls.

    Args:
        composition: What acts where.
        factors: Its factors, which ComfyUI moves.

    Attributes:
        found: What the last draft has found.
        only_draft: Whether a sampling ends after its draft.
    """

    def __init__(self, composition: Composition, factors: Factors) -> None:
        self.composition, self.factors = composition, factors
        self.found: Found | None = None
        self.only_draft = False
        self._sampling: Sampling | None = None

    def sample(
        self, executor: Any, guider: Any, sigmas: Tensor, extra: dict[str, Any], callback: Any, noise: Tensor,
        latents: Tensor | None = None, mask: Tensor | None = None, *further: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Around a whole sampling (SAMPLER_SAMPLE): LoRAs are in the model inside. Its arguments are the sampler's."""
        plan, conditionings = self.composition, guider.conds
        ours = self._marked(conditionings)
        device = guider.model_patcher.load_device
        sampling = self._sampling = Sampling(guider.inner_model, plan, self.factors, ours, noise, sigmas, device)
        given = {"latent_image": latents, "denoise_mask": mask, "seed": extra.get("seed")}
        regions = [plan.regions]
        try:
            sampling.put()
            if plan.draft is not None and sampling.steps:
                guider.conds = sampling.reading(conditionings, [plan.draft.conditioning], given)
                first = sigmas[: 1 + max(1, math.ceil(steps_in(LENGTH, sampling.steps)))]
                start = {**extra}, None, noise.clone(), latents, mask
                maps = sampling.maps(plan.draft, partial(executor, guider, first, *start, *further, **options))
                regions = [plan.draft.divide(one, plan.regions, sampling.grid) for one in maps]
                self.found = Found.of(plan.draft, maps, regions, sampling.grid)
            if self.only_draft:
                return noise
            guider.conds = sampling.reading(conditionings, plan.texts, given)
            sampling.passes = Passes(plan, Places.of(regions, sampling.family, sampling.grid))
            return executor(guider, sigmas, extra, callback, noise, latents, mask, *further, **options)
        finally:
            guider.conds, self._sampling = conditionings, None
            sampling.take()

    def _marked(self, conditionings: Mapping[str, Any]) -> frozenset[Any]:
        """The conditionings that concepts act on."""
        every = [one for several in conditionings.values() for one in several or ()]
        marks = {one["uuid"]: one.get(KEY) for one in every}
        ours = frozenset(uuid for uuid, mark in marks.items() if mark == self.composition.mark)
        if not ours:
            raise ValueError("connect the CONDITIONING of the same Compose to the sampler, as the positive one")
        for one in every:
            if one["uuid"] in ours and self.composition.tokens not in (None, tokens_of(one["cross_attn"], one)):
                raise ValueError(
                    f"the conditioning has {tokens_of(one['cross_attn'], one)} tokens, the text of the concepts has "
                    f"{self.composition.tokens}: connect the CONDITIONING of Compose without joining it to other texts"
                )
        if {*marks.values()} - {None, self.composition.mark}:
            raise ValueError("conditionings of several Compose nodes cannot be sampled together; chain the concepts")
        return ours

    def eject(self, patcher: Any) -> None:
        """Removes the LoRAs after ComfyUI has ejected its own (ON_EJECT_MODEL)."""
        if self._sampling is not None and patcher.model is self._sampling.model:
            self._sampling.take()

    def inject(self, patcher: Any) -> None:
        """Installs the LoRAs again after ComfyUI has injected its own (ON_INJECT_MODEL)."""
        if self._sampling is not None and patcher.model is self._sampling.model:
            self._sampling.put()

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


@dataclass(frozen=True, eq=False)
class Passes:
    """What acts in the passes of a sampling, or of its draft.

    Attributes:
        draft: The draft whose maps the passes record.
        maps: Those, of each pass. Shape: [images, subjects, height, width] each.
    """

    plan: Composition
    places: Places
    draft: Draft | None = None
    maps: list[Tensor] = field(default_factory=list)
    inputs: dict[tuple[Any, ...], LayerInputs] = field(default_factory=dict)


class Sampling:
    """A composition in a model during one sampling.

    Args:
        model: ComfyUI's `BaseModel`.
        plan: What acts where.
        factors: Its factors.
        ours: The conditionings that concepts act on.
        noise: Shape: [images, channels, (frames,) height, width].
        sigmas: The noise level before each step, and after the last one.
        device: Where the model runs.

    Attributes:
        steered: Whether attention is steered.
        grid: Height and width of the latents.
        family: What is known of the model.
        passes: What acts in the next passes.
    """

    def __init__(
        self, model: Any, plan: Composition, factors: Factors, ours: frozenset[Any], noise: Tensor, sigmas: Tensor,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.model = model
        self.steered = plan.draft is not None or plan.phrases is not None or bool(plan.texts)
        self.grid: Grid = (noise.shape[-2], noise.shape[-1])
        self._plan, self._factors, self._ours, self._noise, self._device = plan, factors, ours, noise, device
        self._levels: list[float] = sigmas.tolist()
        self.family = family_of(model.diffusion_model)
        self.passes = Passes(plan, Places.of([plan.regions], self.family, self.grid))
        self._kept = KeptBanks(CountedBank(factors), tuple((i,) for i in range(len(plan.loras))))
        self._stack = ExitStack()
        self._installation: Installation | None = None
        self._lengths: Sequence[int] = []

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return max(0, len(self._levels) - 1)

    def put(self) -> None:
        """Puts the LoRAs in."""
        model, dtype, family, loras = self.model.diffusion_model, _dtype(self.model), self.family, self._plan.loras
        self._factors.make(loras, family.sites, model, dtype)
        layers = installed_layers(
            model, loras, family.sites, device=self._device, dtype=dtype, kept=self._kept, how="forward"
        )
        self._installation = self._stack.enter_context(layers)
        for name, layer in self._installation.bank.items():
            model.get_submodule(name).forward.layer = Brought(layer)
        if self.steered:
            state = self._installation.state
            for name, site in family.attention.items():
                self._swap(name, partial(SteeredAttention, name, site, state))
            if family.positions is not None:
                self._swap(family.positions, partial(EachTextFromItsStart, state))
        if family.joint is None:
            self._installation.normalise_by_region()

    def _swap(self, name: str, around: Callable[..., Any]) -> None:
        """Puts on a module what is made of its `forward`."""
        module = self.model.diffusion_model.get_submodule(name)
        swap = SwappedForward(module, around(module.forward))
        self._stack.callback(swap.take_off)
        swap.put_on()

    def take(self) -> None:
        """Takes them out; may be called twice."""
        self._installation = None
        self._stack.close()

    def reading(
        self, conditionings: Mapping[str, Any], texts: Sequence[Conditioning], given: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Conditionings of which ours read other texts, one after the other; each as the model reads one alone.

        Args:
            given: What a model may make a part of its conditioning of.
        """
        self._lengths = []
        if not texts:
            return conditionings

        def encoded(kind: str, one: dict[str, Any], text: Conditioning) -> Any:
            ((tensor, others),) = text
            other = {**one, "cross_attn": tensor, **{name: others.get(name) for name in OF_TEXT}}
            function = self.model.extra_conds
            return comfy.samplers.encode_model_conds(function, [other], self._noise, self._device, kind, **given)[0]

        def told(kind: str, one: dict[str, Any]) -> dict[str, Any]:
            if one["uuid"] not in self._ours:
                return one
            first, *more = [encoded(kind, one, text) for text in texts]
            if not more:
                return first
            every = [other["model_conds"]["c_crossattn"] for other in (first, *more)]
            self._lengths = [other.cond.shape[1] for other in every]
            joined = type(every[0])(torch.cat([other.cond for other in every], dim=1))
            return {**one, "model_conds": {**one["model_conds"], "c_crossattn": joined}}

        return {kind: [told(kind, one) for one in several or ()] for kind, several in conditionings.items()}

    def maps(self, draft: Draft, sample: Callable[[], Any]) -> Tensor:
        """Attention to each subject in a few steps without subjects. Shape: [images, subjects, height, width].

        Args:
            sample: Runs these steps; the sampler starts again from the same noise afterwards.
        """
        if self._plan.texts and len(self._noise) > 1:
            raise ValueError(
                "where regions read texts of their own, images are drafted one by one; set batch_size to 1"
            )
        self.passes = drafted = Passes(self._plan.drafted(draft), self.passes.places, draft)
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            sample()
        if not drafted.maps:
            raise ValueError("the conditioning of Compose is not used in the first steps, where draft needs it")
        return torch.stack(drafted.maps).sum(dim=0)

    def run(self, uuids: Sequence[Any], x: Tensor, t: Tensor, text: Tensor, execute: Callable[[], Tensor]) -> Tensor:
        """Runs a pass.

        Args:
            uuids: The conditionings that it predicts for, in the order of its rows.
            x: The latents of the pass. Shape: [rows, channels, (frames,) height, width].
            t: The noise level of each row.
            text: Its text. Shape: [rows, tokens, channels].
        """
        if self._installation is None:
            raise RuntimeError("ComfyUI runs the model while its changes are taken out; please report this")
        now, grid, tokens = self.passes, (x.shape[-2], x.shape[-1]), text.shape[1]
        if grid != self.grid and (self.steered or any(region is not None for region in now.plan.regions)):
            raise ValueError("a conditioning with an area of its own cannot be combined with regions of concepts")
        ours = torch.tensor([uuid in self._ours for uuid in uuids]).repeat_interleave(len(x) // len(uuids))
        step = self._step(float(t.max()))
        by_region = self.family.joint is None and step < steps_in(NORM_APART, self.steps)
        weights = now.plan.step_weights(step, self.steps)
        key = (*ours.tolist(), grid, tokens, by_region, weights)
        if key not in now.inputs:
            acting = Acting(now.plan, self.family, now.places, self._lengths, ours, grid, tokens, weights)
            regions, joint = acting.regions(self._device)
            for other in [other for other in now.inputs if other[-1] != weights]:  # those of all steps would be many
                del now.inputs[other]
            now.inputs[key] = self._installation.inputs(
                acting.gates, regions=regions, joint_regions=joint, lengths=[tokens] * len(x), text_bias=acting.bias,
                norm_regions=acting.norm_regions if by_region else None,
            )  # fmt: skip
        recorders = []
        if now.draft is not None and ours.any():
            words = over(now.draft.words, tokens, self.family).to(self._device)
            recorders.append(Recorder(self.family.maps, words[None]))
        self._installation.use(now.inputs[key], *recorders)
        out = execute()
        for recorder in recorders:  # the images of each conditioning follow one another
            maps = recorder.mean().cpu()[ours].unflatten(0, (-1, len(self._noise))).mean(dim=0)
            now.maps.append(maps.transpose(1, 2).unflatten(2, grid_at(grid, self.family.map_level)))
        return out

    def _step(self, level: float) -> int:
        """The step of a pass at a noise level; passes between two steps are of the one before."""
        return max(0, sum(begins >= level for begins in self._levels) - 1)
