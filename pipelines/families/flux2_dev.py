"""FLUX.2-dev with concepts: guidance distilled into the model, and a processor with a system message of its own."""

from typing import Any

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor

from lora_compose.attention.backbones.joint import packed
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.families.flow_matching import tokenizer_of
from lora_compose.pipelines.families.flux2 import Flux2Calls
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.text.templates import TemplateTokenizer


class ComposeFlux2Pipeline(Flux2Calls, Flux2Pipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `Flux2Pipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "FLUX.2-dev"
    reads = (*Flux2Calls.reads, "caption_upsample_temperature")
    architecture = "flux-2-dev"

    @front(Flux2Pipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Args:
            image: One or several reference images, as in `ComposeFlux2KleinPipeline.__call__`.
            caption_upsample_temperature: Only without concepts, since it has the text encoder rewrite the prompt.
            mask_image: Not supported, as are the three arguments after it.

        Returns:
            A `ComposeOutput`, or `(images,)` if `return_dict` is False. With concepts, `output_type="latent"` returns
            them packed, as diffusers does.
        """
        if begun.given["caption_upsample_temperature"]:
            raise ValueError(
                "caption_upsample_temperature has the text encoder rewrite the prompt, which may lose the triggers of "
                "concepts; call pipe.upsample_prompt first, and write them into its prompt"
            )
        references = self._references(begun.given["reference"])
        return self._flux2_request(begun, self._sized_by_first(begun.given, references), None, references)

    def _guidance_inputs(self, scale: float, images: int) -> dict[str, ByImage]:
        return self._distilled_guidance(scale, images)

    def guidance_input(self, scale: float, rows: int, device: torch.device) -> dict[str, Tensor]:
        """As `FlowMatchingPipeline.guidance_input`: of distilled guidance."""
        return {"guidance": torch.full([rows], scale, device=device, dtype=torch.float32)}

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

    def _returned(self, latents: Tensor) -> Tensor:
        return packed(latents)
