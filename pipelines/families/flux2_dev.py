"""FLUX.2-dev with concepts: guidance distilled into the model, and a processor with a system message of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor

from lora_compose.attention.backbones.joint import packed
from lora_compose.pipelines.calls.call import Concepts, Generators, listed, tensors_for
from lora_compose.pipelines.calls.front import Plain, Request, front
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.flow_matching import tokenizer_of
from lora_compose.pipelines.families.flux2 import Flux2Calls
from lora_compose.pipelines.families.references import reference_or_start
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.text.conditioning import TokenPositions
from lora_compose.pipelines.text.templates import TemplateTokenizer


class ComposeFlux2Pipeline(Flux2Calls, Flux2Pipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `Flux2Pipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "FLUX.2-dev"
    architecture = "flux-2-dev"

    @front
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image: Any = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (10, 20, 30),
        caption_upsample_temperature: float | None = None,
        *,
        concepts: Concepts | None = None,
        method: str | Settings | None = None,
        control: Control | Sequence[Control] | None = None,
        token_positions: TokenPositions | None = None,
        record_attention: bool | Sequence[int] = False,
        mask_image: Any = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        paste_original: bool = False,
        **kwargs: Any,
    ) -> Request | Plain:
        """Generates images, as `ComposePipeline.__call__`.

        Args:
            image: One or several reference images, as in `ComposeFlux2KleinPipeline.__call__`.
            caption_upsample_temperature: Only without concepts, since it has the text encoder rewrite the prompt.
            concepts: As for `ComposeFlux2KleinPipeline.__call__`, as are the four arguments after it.
            mask_image: Not supported, as are the three arguments after it.

        Returns:
            A `ComposeOutput`, or `(images,)` if `return_dict` is False. With concepts, `output_type="latent"` returns
            them packed, as diffusers does.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        reference, image = reference_or_start(image, mask_image, strength, padding_mask_crop, paste_original)
        if reference is None:  # otherwise the size is that of the image
            width, height = self._sides(width, height)
        given = dict(locals())
        begun = self._begin(given)
        if begun.plain is not None:
            return begun.plain
        if caption_upsample_temperature:
            raise ValueError(
                "caption_upsample_temperature has the text encoder rewrite the prompt, which may lose the triggers of "
                "concepts; call pipe.upsample_prompt first, and write them into its prompt"
            )
        references = self._references(reference)
        if references:
            height, width = height or references[0].shape[-2], width or references[0].shape[-1]
        size = self._size(width, height)
        tensors = tensors_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            begun.prompt, height=size[1], width=size[0], prompt_embeds=prompt_embeds,
            callback_on_step_end_tensor_inputs=tensors,
        )  # fmt: skip
        images = num_images_per_prompt * len(listed(begun.prompt) if prompt_embeds is None else prompt_embeds)
        guidance = torch.full([images], guidance_scale, device=self._execution_device, dtype=torch.float32)
        return self._request(begun, given, size, None, references, guidance=ByImage(guidance))

    def inputs_without_guidance(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """As `FlowMatchingPipeline.inputs_without_guidance`: the distilled guidance is 1."""
        return {"guidance": torch.ones(rows, device=device)}

    def _template(self, length: int) -> TemplateTokenizer:
        processor: Any = self.tokenizer
        words = tokenizer_of(processor)

        def render(prompt: str) -> str:
            (messages,) = format_input([prompt], self.system_message)
            return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)

        first = None if words is None else words.bos_token  # which it does not add if the template has it
        special = first is None or not render("").startswith(first)
        return TemplateTokenizer(words, render, length, length, adds_special=special)

    def _cfg_of(self, guidance_scale: float) -> float:
        return 1.0

    def _cfg_scale(self, step: Step) -> float:
        return 1.0

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        return packed(latents) if output_type == "latent" else super()._decode(latents, output_type)


ComposePipeline.families.append(ComposeFlux2Pipeline)
