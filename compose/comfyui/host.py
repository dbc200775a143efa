"""A composition in a model of ComfyUI, for as long as it samples with it.

ComfyUI calls us when a sampling begins (SAMPLER_SAMPLE), when a pass begins (APPLY_MODEL), and around changes that it
makes in the middle of a sampling (ON_EJECT_MODEL, ON_INJECT_MODEL). LoRAs act on the `forward` of layers, so keys of
the state dict stay, and are taken out at the end of the sampling, also after an exception.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.patcher_extension as core  # pyright: ignore[reportMissingImports]
import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from lora_compose.attention import (
    Grid,
    Installation,
    JointRegions,
    KeptBanks,
    Recorder,
    RegionAttention,
    grid_at,
    installed_layers,
)
from lora_compose.attention.forward_state import LayerInputs
from lora_compose.attention.swapped_forward import SwappedForward
from lora_compose.compose.comfyui.composition import Composition, Draft, filled
from lora_compose.compose.comfyui.families import family_of
from lora_compose.compose.comfyui.memory import Brought, CountedBank, Factors, bytes_of
from lora_compose.compose.comfyui.steering import EachTextFromItsStart, SteeredAttention, Steering
from lora_compose.compose.comfyui.tokens import tokens_of

KEY = "lora_compose"
"""Our name among callbacks and wrappers, and of the mark in conditionings."""
LENGTH = 0.12
"""The part of the steps that is drafted, at least one step, as in our pipelines."""


OF_TEXT = ("pooled_output", "attention_mask", "t5xxl_ids", "t5xxl_weights")
"""What encoders give beside a text."""


def compose(patcher: Any, composition: Composition) -> Any:
    """A clone of a model (`ModelPatcher`) in which a composition acts wherever ComfyUI samples with it.

    Raises:
        ValueError: If the model has one already, or is of a family that is not supported.
    """
    if patcher.wrappers.get(core.WrappersMP.APPLY_MODEL, {}).get(KEY):
        raise ValueError("this model has concepts already; chain all concepts, and connect them to one Compose")
    family_of(patcher.model.diffusion_model)
    factors = Factors(patcher.offload_device)
    size = bytes_of(composition.loras, _dtype(patcher.model))
    counted = comfy.model_patcher.ModelPatcher(factors, patcher.load_device, patcher.offload_device, size)
    clone, host = patcher.clone(), Host(composition, factors)
    clone.set_additional_models(KEY, [counted])
    clone.add_callback_with_key(core.CallbacksMP.ON_EJECT_MODEL, KEY, host.eject)
    clone.add_callback_with_key(core.CallbacksMP.ON_INJECT_MODEL, KEY, host.inject)
    clone.add_wrapper_with_key(core.WrappersMP.SAMPLER_SAMPLE, KEY, host.sample)
    clone.add_wrapper_with_key(core.WrappersMP.APPLY_MODEL, KEY, host.apply_model)
    return clone


def _dtype(model: Any) -> torch.dtype:
    return model.manual_cast_dtype or model.get_dtype()


def marked(conditioning: Sequence[Sequence[Any]], composition: Composition) -> list[list[Any]]:
    """A conditioning of ComfyUI as one of a composition, whose concepts act on its rows."""
    return [[text, {**options, KEY: composition.mark}] for text, options in conditioning]


class Host:
    """What ComfyUI calls.

    Args:
        composition: What acts where.
        factors: Its factors, which ComfyUI moves.
    """

    def __init__(self, composition: Composition, factors: Factors) -> None:
        self.composition, self._factors = composition, factors
        self._sampling: Sampling | None = None

    def sample(self, executor: Any, guider: Any, *arguments: Any, **options: Any) -> Tensor:
        """Around a whole sampling (SAMPLER_SAMPLE): LoRAs are in the model inside."""
        conditionings = [one for several in guider.conds.values() for one in several or ()]
        marks = {one["uuid"]: one.get(KEY) for one in conditionings}
        ours = frozenset(uuid for uuid, mark in marks.items() if mark == self.composition.mark)
        if not ours:
            raise ValueError("connect the CONDITIONING of the same Compose to the sampler, as the positive one")
        words = len(self.composition.words)
        for one in conditionings:
            if one["uuid"] in ours and words not in (1, tokens := tokens_of(one["cross_attn"], one)):
                raise ValueError(
                    f"the conditioning has {tokens} tokens, the text of the concepts has {words}: connect the "
                    "CONDITIONING of Compose without joining it to other texts"
                )
        if {*marks.values()} - {None, self.composition.mark}:
            raise ValueError("conditionings of several Compose nodes cannot be sampled together; chain the concepts")
        noise = arguments[3]  # after the noise levels, more arguments and a callback
        device = guider.model_patcher.load_device
        grid = tuple(noise.shape[-2:])
        self._sampling = Sampling(guider.inner_model, self.composition, self._factors, ours, grid, device)
        try:
            self._sampling.put()
            if self.composition.draft is not None and len(arguments[0]) > 1:  # noise levels; one is no step
                self._sampling.draft(self.composition.draft, executor, guider, *arguments, **options)
            return executor(guider, *arguments, **options)
        finally:
            self._sampling.take()
            self._sampling = None

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
        uuids = options["uuids"]
        sampling.use([uuid in sampling.ours for uuid in uuids for _ in range(len(x) // len(uuids))], x, text)
        out = executor(x, t, concat, text, control, options, **inputs)
        sampling.record()
        return out


class Sampling:
    """A composition in a model during one sampling.

    Args:
        model: ComfyUI's `BaseModel`.
        composition: What acts where.
        factors: Its factors.
        ours: The conditionings that concepts act on.
        grid: Height and width of the latents.
        device: Where the model runs.

    Attributes:
        steered: Whether attention is steered.
        regions: Those of all concepts by image, once a draft has found them.
    """

    def __init__(
        self, model: Any, composition: Composition, factors: Factors, ours: frozenset[Any], grid: Grid,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.model, self.ours, self._factors = model, ours, factors
        self.steered = composition.draft is not None or composition.lengths is not None
        self.regions: Sequence[Any] = ()
        self._family = family_of(model.diffusion_model)
        fill = {"tokens": self._family.least_tokens, "behind": self._family.zeros_behind}
        self._plan, self._device, self._fill = composition.filled(**fill), device, fill
        self._kept = KeptBanks(CountedBank(factors), tuple((i,) for i in range(len(composition.loras))))
        self._stack = ExitStack()
        self._installation: Installation | None = None
        self._steering: Steering | None = None
        self._grid, self._images = grid, 1
        self._recorder: Recorder | None = None
        self._maps: list[Tensor] = []
        self._inputs: dict[tuple[Any, ...], LayerInputs] = {}

    def put(self) -> None:
        """Puts the LoRAs in."""
        model, dtype = self.model.diffusion_model, _dtype(self.model)
        self._factors.make(self._plan.loras, self._family.sites, model, dtype)
        layers = installed_layers(
            model,
            self._plan.loras,
            self._family.sites,
            device=self._device,
            dtype=dtype,
            kept=self._kept,
            how="forward",
        )
        self._installation = self._stack.enter_context(layers)
        for name, layer in self._installation.bank.items():
            model.get_submodule(name).forward.layer = Brought(layer)
        if self.steered:
            self._steering = Steering(self._installation.state, self._plan, self._family.joint is not None)
            for name, site in self._family.attention.items():
                self._swap(name, partial(SteeredAttention, name, site, self._steering))
            if self._family.positions is not None:
                self._swap(self._family.positions, partial(EachTextFromItsStart, self._steering))

    def _swap(self, name: str, made: Callable[..., Any]) -> None:
        """Puts what is made of the `forward` of a module on it."""
        swap = SwappedForward(self.model.diffusion_model.get_submodule(name), self.model.diffusion_model)
        swap.layer = made(swap.original)
        self._stack.callback(swap.take_off)
        swap.put_on()

    def take(self) -> None:
        """Takes them out; may be called twice."""
        self._installation = self._steering = None
        self._stack.close()

    def draft(
        self, draft: Draft, executor: Any, guider: Any, sigmas: Tensor, extra: dict[str, Any], _: Any, noise: Tensor,
        latents: Tensor | None = None, mask: Tensor | None = None, *further: Any, **options: Any,
    ) -> None:  # fmt: skip
        """Finds the regions in a few steps without subjects; the sampler starts again from the same noise afterwards.

        Args:
            executor: Runs the sampler; the rest are its arguments.
        """
        whole, conditionings, steps = self._plan, guider.conds, len(sigmas) - 1
        self._images = len(noise)
        if whole.lengths is not None and self._images > 1:
            raise ValueError(
                "where regions read texts of their own, images are drafted one by one; set batch_size to 1"
            )
        ((text, others),) = draft.conditioning

        def plain(kind: str, one: dict[str, Any]) -> dict[str, Any]:
            if one["uuid"] not in self.ours:
                return one
            other = {**one, "cross_attn": text, **{name: others.get(name) for name in OF_TEXT}}
            given = {"latent_image": latents, "denoise_mask": mask, "seed": extra.get("seed")}
            return comfy.samplers.encode_model_conds(
                self.model.extra_conds, [other], noise, self._device, kind, **given
            )[0]

        styles = torch.tensor([float(i not in draft.subjects) for i in range(len(whole.loras))])
        self._use_plan(
            replace(whole, weights=whole.weights * styles, lengths=None, words=torch.ones_like(styles)[None])
        )
        self._recorder = Recorder(self._family.maps, filled(draft.words, **self._fill).to(self._device)[None])
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            guider.conds = {kind: [plain(kind, one) for one in every or ()] for kind, every in conditionings.items()}
            with torch.random.fork_rng(devices):
                first = sigmas[: 1 + max(1, math.ceil(round(LENGTH * steps, 6)))]
                executor(guider, first, {**extra}, None, noise.clone(), latents, mask, *further, **options)
        finally:
            guider.conds, self._recorder = conditionings, None
        if not self._maps:
            raise ValueError("the conditioning of Compose is not used in the first steps, where draft needs it")
        self._use_plan(whole)
        self.regions = [draft.divide(maps, whole.regions, self._grid) for maps in torch.stack(self._maps).sum(dim=0)]

    def _use_plan(self, plan: Composition) -> None:
        self._plan = plan
        self._inputs.clear()
        if self._steering is not None:
            self._steering.plan = plan

    def use(self, ours: Sequence[bool], x: Tensor, text: Tensor) -> None:
        """Sets what layers read in the next pass.

        Args:
            ours: By row, whether it is predicted for our conditioning.
            x: The latents of the pass. Shape: [rows, channels, height, width].
            text: Its text. Shape: [rows, tokens, channels].
        """
        if self._installation is None:
            raise RuntimeError("ComfyUI runs the model while its changes are taken out; please report this")
        plan, grid, tokens = self._plan, (x.shape[-2], x.shape[-1]), text.shape[1]
        if grid != self._grid and (self.steered or any(region is not None for region in plan.regions)):
            raise ValueError("a conditioning with an area of its own cannot be combined with regions of concepts")
        key = (*ours, grid, tokens)
        if key not in self._inputs:
            gates = plan.gates(self._family, ours, grid, tokens, self.regions)
            regions = joint = None
            if any(ours):
                found = plan.regions_of_pass(
                    self._family, sum(ours), grid, (self.regions or [plan.regions])[0], self._device
                )
                regions = found if isinstance(found, RegionAttention) else None
                joint = found if isinstance(found, JointRegions) else None
            bias = None if self._recorder is not None else plan.bias(self._family, ours, grid, tokens, self.regions)
            self._inputs[key] = self._installation.inputs(
                gates, regions=regions, joint_regions=joint, lengths=[tokens] * len(ours), text_bias=bias
            )
        recorders = [] if self._recorder is None or not any(ours) else [self._repeated(self._recorder, tokens)]
        self._installation.use(self._inputs[key], *recorders)
        if self._steering is not None:
            self._steering.ours = torch.tensor(ours)

    def _repeated(self, recorder: Recorder, tokens: int) -> Recorder:
        words = recorder.token_weights
        return Recorder(recorder.layers, words.repeat(1, tokens // words.shape[1], 1))

    def record(self) -> None:
        """Keeps the maps of our rows in the pass that has just been run, while a draft is made."""
        steering = self._steering
        if self._recorder is None or steering is None or not steering.state.recorders:
            return
        grid = grid_at(self._grid, self._family.map_level)
        mine = steering.state.recorders[0].mean()[steering.ours.to(self._device)]
        by_image = mine.unflatten(0, (-1, self._images)).mean(dim=0).float().cpu()
        self._maps.append(by_image.transpose(1, 2).unflatten(2, grid))
