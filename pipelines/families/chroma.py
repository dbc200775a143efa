"""Chroma with concepts: FLUX.1 without CLIP and without distilled guidance, T5 with a mask."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ChromaImg2ImgPipeline, ChromaInpaintPipeline, ChromaPipeline, ChromaTransformer2DModel
from torch import Tensor

from lora_compose.pipelines.calls.call import (
    Concepts,
    Generators,
    GivenPrompts,
    check_arguments,
    listed,
    tensors_for,
)
from lora_compose.pipelines.calls.front import Begun, Plain, Request, front
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.flow_matching import (
    FlowMatchingPipeline,
    both_sides,
    check_negative_embeds,
    for_each,
)
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.images.from_image import FromImage
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.text.conditioning import Conditioning, TokenPositions


class ComposeChromaPipeline(FlowMatchingPipeline, ChromaPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `ChromaPipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "Chroma"
    architecture = "chroma"
    transformer_class = ChromaTransformer2DModel
    image_to_image = ImageTask(ChromaImg2ImgPipeline, resizes=True)
    inpainting = ImageTask(ChromaInpaintPipeline, resizes=True)

    @property
    def inpaints_as_diffusers(self) -> bool:
        """Only if diffusers' inpainting finds FLUX.1's `guidance_embeds`, which it asks for, among the settings."""
        return "guidance_embeds" in self.transformer.config

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family."""
        return any(key.removeprefix("model.diffusion_model.").startswith("distilled_guidance_layer.") for key in keys)

    @front
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 35,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        max_sequence_length: int = 512,
        *,
        concepts: Concepts | None = None,
        method: str | Settings | None = None,
        control: Control | Sequence[Control] | None = None,
        token_positions: TokenPositions | None = None,
        record_attention: bool | Sequence[int] = False,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        paste_original: bool = False,
        **kwargs: Any,
    ) -> Request | Plain:
        """Generates images; all arguments of diffusers' pipeline keep their meaning.

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            concepts: As for `ComposePipeline.__call__`.
            method: The name of a method without gradients (`lora-compose methods`), or settings.
            control: Not supported yet.
            token_positions: Positions among the T5 tokens.
            record_attention: Maps come from the last third of the double-stream blocks.
            image: As in `ComposeStableDiffusionPipeline.__call__`, as are the four arguments after it.

        Returns:
            A `ComposeOutput`, or `(images,)` if `return_dict` is False.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        width, height = self._sides(width, height)
        given = dict(locals())
        begun = self._begin(given)
        return self._request(begun, given) if begun.plain is None else begun.plain

    def _request(self, begun: Begun, given: Mapping[str, Any]) -> Request:
        """The request of a call with concepts.

        Args:
            given: The arguments of `__call__`, by name.
        """
        prompt, negative_prompt, scale = begun.prompt, given["negative_prompt"], given["guidance_scale"]
        embeds, negative_embeds = given["prompt_embeds"], given["negative_prompt_embeds"]
        kwargs, per_prompt = given["joint_attention_kwargs"], given["num_images_per_prompt"] or 1
        length, output_type = given["max_sequence_length"], given["output_type"] or "np"
        ip_adapters = [given[f"{side}ip_adapter_image{kind}"] for side in ("", "negative_") for kind in ("", "_embeds")]
        check_arguments(given["kwargs"], ip_adapters, kwargs, "joint_attention_kwargs")
        source = self._source(begun.start, given)
        width, height = self._size(given["width"], given["height"]) if source is None else source.size
        tensors = tensors_for(given["callback_on_step_end"], given["callback_on_step_end_tensor_inputs"])
        self.check_inputs(
            prompt, height=height, width=width, negative_prompt=negative_prompt, prompt_embeds=embeds,
            prompt_attention_mask=given["prompt_attention_mask"], negative_prompt_embeds=negative_embeds,
            negative_prompt_attention_mask=given["negative_prompt_attention_mask"],
            callback_on_step_end_tensor_inputs=self._of_every_task(tensors, begun.start), max_sequence_length=length,
        )  # fmt: skip
        texts = None if prompt is None else [listed(prompt)]
        prompts_given = GivenPrompts(texts, embeds, length, [listed(negative_prompt)])
        check_negative_embeds(prompts_given, negative_embeds if scale > 1 else None)
        call = begun.call(
            given, prompts_given, (width, height), per_prompt, ClassifierFree(scale),
            inputs={"joint_attention_kwargs": kwargs},
            properties={"_guidance_scale": scale, "_joint_attention_kwargs": kwargs, "_current_timestep": None},
            source=source,
            repaint={
                "guidance_scale": scale, "negative_prompt": (listed(negative_prompt) or [None])[0],
                "max_sequence_length": length,
            },
        )  # fmt: skip

        def encode(prompts: list[str] | None, negative: bool, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            side, words, own = "", prompts or prompt, (None, None)
            if negative:
                side, words = "negative_", prompts or for_each(negative_prompt, len(prompts_given))
            if prompts is None and given[f"{side}prompt_embeds"] is not None:
                words, own = None, (given[f"{side}prompt_embeds"], given[f"{side}prompt_attention_mask"])
            text, mask = self._encoded(
                words, device=device, num_images_per_prompt=per_prompt, prompt_embeds=own[0],
                prompt_attention_mask=own[1], max_sequence_length=length, lora_scale=(kwargs or {}).get("scale"),
            )  # fmt: skip
            # From an image, diffusers reads masks of True and False as numbers.
            return text, {"text_mask": mask if source is None else mask.to(text.dtype)}

        def decode(latents: Tensor, process: Process) -> tuple[Any]:
            return (self._finished(self._decode(latents, output_type), source),)

        return Request(call, partial(both_sides, encode, guided=scale > 1), decode, given["return_dict"])

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        self._check_plain_texts(arguments["prompt"], arguments["negative_prompt"])
        return arguments

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`."""
        length = min(length or 512, self.tokenizer.model_max_length)
        text, mask = self._encoded(list(prompts), device=self._execution_device, max_sequence_length=length)
        return text, {"text_mask": mask}

    def _encoded(self, words: str | list[str] | None, **options: Any) -> tuple[Tensor, Tensor]:
        """Features of one side, and the numbers that mask them."""
        encode_prompt: Any = self.encode_prompt  # its annotations know no missing prompt
        text, _, mask, *_ = encode_prompt(words, do_classifier_free_guidance=False, **options)
        return text, mask

    def _cfg_scale(self, step: Step) -> float:
        """As diffusers' loop, which keeps the scale that was given until a callback ends guidance."""
        return 1.0 if self.guidance_scale <= 1 else step.cfg_scale

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Tensor]:
        return {"prompt_embeds": text.conditional().prompt_embeds}


ComposePipeline.families.append(ComposeChromaPipeline)
