"""A composition in a model of ComfyUI, for as long as it samples with it.

ComfyUI calls us when a sampling begins (SAMPLER_SAMPLE), when a pass begins (APPLY_MODEL), and around changes that it
makes in the middle of a sampling (ON_EJECT_MODEL, ON_INJECT_MODEL). LoRAs act on the `forward` of layers, so keys of
the state dict stay, and are taken out at the end of the sampling, also after an exception.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import comfy.patcher_extension as core  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from lora_compose.attention import BankCache, Grid, Installation, KeptBanks, installed_layers
from lora_compose.attention.forward_state import LayerInputs
from lora_compose.compose.comfyui.composition import Composition
from lora_compose.compose.comfyui.families import sites_of

KEY = "lora_compose"
"""Our name among callbacks and wrappers, and of the mark in conditionings."""


def compose(patcher: Any, composition: Composition) -> Any:
    """A clone of a model (`ModelPatcher`) in which a composition acts wherever ComfyUI samples with it.

    Raises:
        ValueError: If the model has one already, or is of a family that is not supported.
    """
    if patcher.wrappers.get(core.WrappersMP.APPLY_MODEL, {}).get(KEY):
        raise ValueError("this model has concepts already; chain all concepts, and connect them to one Compose")
    sites_of(patcher.model.diffusion_model)
    clone, host = patcher.clone(), Host(composition)
    clone.add_callback_with_key(core.CallbacksMP.ON_EJECT_MODEL, KEY, host.eject)
    clone.add_callback_with_key(core.CallbacksMP.ON_INJECT_MODEL, KEY, host.inject)
    clone.add_wrapper_with_key(core.WrappersMP.SAMPLER_SAMPLE, KEY, host.sample)
    clone.add_wrapper_with_key(core.WrappersMP.APPLY_MODEL, KEY, host.apply_model)
    return clone


def marked(conditioning: Sequence[Sequence[Any]], composition: Composition) -> list[list[Any]]:
    """A conditioning of ComfyUI as one of a composition, whose concepts act on its rows."""
    return [[text, {**options, KEY: composition.mark}] for text, options in conditioning]


class Host:
    """What ComfyUI calls.

    Args:
        composition: What acts where.
    """

    def __init__(self, composition: Composition) -> None:
        self.composition = composition
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
            if one["uuid"] in ours and words not in (1, tokens := one["cross_attn"].shape[1]):
                raise ValueError(
                    f"the conditioning has {tokens} tokens, the text of the concepts has {words}: connect the "
                    "CONDITIONING of Compose without joining it to other texts"
                )
        if {*marks.values()} - {None, self.composition.mark}:
            raise ValueError("conditionings of several Compose nodes cannot be sampled together; chain the concepts")
        noise = arguments[3]  # after the noise levels, more arguments and a callback
        device = guider.model_patcher.load_device
        self._sampling = Sampling(guider.inner_model, self.composition, ours, tuple(noise.shape[-2:]), device)
        try:
            self._sampling.put()
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
        uuids = options["uuids"]
        sampling.use([uuid in sampling.ours for uuid in uuids for _ in range(len(x) // len(uuids))], x, text)
        return executor(x, t, concat, text, control, options, **inputs)


class Sampling:
    """A composition in a model during one sampling.

    Args:
        model: ComfyUI's `BaseModel`.
        composition: What acts where.
        ours: The conditionings that concepts act on.
        grid: Height and width of the latents.
        device: Where the model runs.
    """

    def __init__(
        self, model: Any, composition: Composition, ours: frozenset[Any], grid: Grid, device: torch.device
    ) -> None:
        self.model, self.ours = model, ours
        self._composition, self._device = composition, device
        self._sites = sites_of(model.diffusion_model)
        self._kept = KeptBanks(BankCache(sys.maxsize), tuple((i,) for i in range(len(composition.loras))))
        self._stack = ExitStack()
        self._installation: Installation | None = None
        self._grid = grid
        self._inputs: dict[tuple[Any, ...], LayerInputs] = {}

    def put(self) -> None:
        """Puts the LoRAs in."""
        model, dtype = self.model.diffusion_model, self.model.manual_cast_dtype or self.model.get_dtype()
        layers = installed_layers(
            model,
            self._composition.loras,
            self._sites,
            device=self._device,
            dtype=dtype,
            kept=self._kept,
            how="forward",
        )
        self._installation = self._stack.enter_context(layers)

    def take(self) -> None:
        """Takes them out; may be called twice."""
        self._installation = None
        self._stack.close()

    def use(self, ours: Sequence[bool], x: Tensor, text: Tensor) -> None:
        """Sets the gates of the next pass.

        Args:
            ours: By row, whether it is predicted for our conditioning.
            x: The latents of the pass. Shape: [rows, channels, height, width].
            text: Its text. Shape: [rows, tokens, channels].
        """
        if self._installation is None:
            raise RuntimeError("ComfyUI runs the model while its changes are taken out; please report this")
        grid, tokens = (x.shape[-2], x.shape[-1]), text.shape[1]
        if grid != self._grid and any(region is not None for region in self._composition.regions):
            raise ValueError("a conditioning with an area of its own cannot be combined with boxes and masks")
        key = (*ours, grid, tokens)
        if key not in self._inputs:
            gates = self._composition.gates(self._sites, ours, grid, tokens)
            self._inputs[key] = self._installation.inputs(gates, lengths=[tokens] * len(ours))
        self._installation.use(self._inputs[key])
