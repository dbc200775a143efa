"""What the pipelines of flow-matching transformers have in common: sizes, timesteps, start noise, templates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from lora_compose.attention.backbones.joint import PATCH
from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.call import Call, Sampling, listed
from lora_compose.pipelines.canvas import Step
from lora_compose.pipelines.concepts.textual_inversion import TextualInversions
from lora_compose.pipelines.plan import Plan
from lora_compose.pipelines.text.encoder import EncodedText
from lora_compose.pipelines.text.templates import TemplateTokenizer

Encode = Callable[[list[str] | None, bool], tuple[Tensor, Mapping[str, Tensor]]]
"""Encodes prompts, or those of the call where there are none, of the negative side if the second argument is True; the
text and further inputs of the model by row."""


class FlowMatchingPipeline(ComposePipeline):
    """A composing pipeline of a transformer."""

    transformer_class: ClassVar[type[nn.Module]]

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family."""
        kind = tuple(config.get("transformer") or ())
        return kind[1:] == (cls.transformer_class.__name__,) and config.get("_class_name") in (None, cls.__name__)

    def _rounded(self, side: int) -> int:
        """A side in pixels that makes whole patches, rounded down."""
        unit = self.vae_scale_factor * PATCH
        return unit * (side // unit)

    def _shift(self, tokens: int, steps: int) -> float:
        """The shift of the timesteps for an image of so many tokens."""
        raise NotImplementedError

    def _sigmas(self, steps: int) -> Any:
        """The noise levels before they are shifted."""
        return np.linspace(1.0, 1 / steps, steps)

    def _timesteps(self, sampling: Sampling, plan: Plan) -> tuple[Tensor, int]:
        steps = sampling.num_inference_steps or 1
        height, width = plan.canvas.latent_grid
        shift = self._shift(height * width // PATCH**2, steps)
        sigmas = self._sigmas(steps) if sampling.sigmas is None else sampling.sigmas
        found: Any = retrieve_timesteps(self.scheduler, steps, plan.canvas.device, sigmas=sigmas, mu=shift)
        self.scheduler.set_begin_index(0)
        return found

    def _latents(self, given: Tensor, shape: Sequence[int]) -> Tensor:
        """Start noise as diffusers' pipeline takes it, as latents of this shape where it can be; else as it is."""
        return given

    def _drawn(self, shape: Sequence[int]) -> Sequence[int]:
        """The shape in which diffusers' pipeline draws noise for latents of a shape."""
        return shape

    def _channels(self) -> int:
        """Channels of the latents."""
        return self.transformer.config.in_channels // PATCH**2

    def _noise(self, call: Call, plan: Plan, dtype: torch.dtype) -> Tensor:
        canvas, given, generator = plan.canvas, call.sampling.latents, call.sampling.generator
        shape = canvas.images, self._channels(), *canvas.latent_grid
        if isinstance(generator, list) and len(generator) != canvas.images:
            raise ValueError(
                f"there are {len(generator)} generators for {canvas.images} images; give one, or one for each"
            )
        if given is None:
            given = randn_tensor(tuple(self._drawn(shape)), generator=generator, device=canvas.device, dtype=dtype)
        latents = given if given.shape == shape else self._latents(given, shape)
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {list(given.shape)}; expected {list(shape)}, or as diffusers'")
        return latents.to(canvas.device, dtype)

    def _prompt_tokenizers(self, textual_inversions: TextualInversions, length: int | None) -> Sequence[Any]:
        if textual_inversions.words:
            words = ", ".join(map(repr, textual_inversions.words))
            raise ValueError(
                f"the LoRA files bring words of their own ({words}), which {self.family} cannot read; expected files "
                "without textual inversions"
            )
        return [self._template(length or 512)]

    def _template(self, length: int) -> TemplateTokenizer:
        """The tokenizer for texts of so many tokens."""
        raise NotImplementedError

    def _cfg_of(self, guidance_scale: float) -> float:
        """The scale s of uncond + s (cond - uncond) that diffusers' guidance scale means; 1 is no guidance."""
        return guidance_scale

    def _cfg_scale(self, step: Step) -> float:
        return step.cfg_scale if step.cfg_scale <= 1 else self._cfg_of(self.guidance_scale)


def both_sides(
    encode: Encode, prompts: Sequence[str] | None, negative_prompts: Sequence[str] | None, *, guided: bool
) -> EncodedText:
    """The text of all rows, of which those without the prompt come first."""
    text, added = encode(None if prompts is None else list(prompts), False)
    if not guided:
        return EncodedText(text, None, added)
    negative, negative_added = encode(None if negative_prompts is None else list(negative_prompts), True)
    return EncodedText(text, negative, {name: torch.cat([negative_added[name], of]) for name, of in added.items()})


def for_each(text: str | list[str] | None, count: int) -> list[str]:
    """A text for each of so many prompts: one for all, or the empty one."""
    found = listed(text) or [""]
    return found * count if len(found) == 1 else found
