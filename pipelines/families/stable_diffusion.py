"""Stable Diffusion 1.x and 2.x with concepts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor
from transformers import CLIPTextModel

from lora_compose.attention.device import uncompiled
from lora_compose.pipelines.calls.call import (
    Call,
    Concepts,
    Generators,
    GivenPrompts,
    check_arguments,
    listed,
    tensors_for,
)
from lora_compose.pipelines.calls.front import Plain, Request, front
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.families.unets import OLD_CALLBACK, UNetPipeline
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.text.conditioning import Conditioning, TokenPositions
from lora_compose.pipelines.text.encoder import EncodedText
from lora_compose.pipelines.text.long_prompts import Reading


class ComposeStableDiffusionPipeline(UNetPipeline, StableDiffusionPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `StableDiffusionPipeline` whose calls may name concepts."""

    image_to_image = ImageTask(StableDiffusionImg2ImgPipeline, resizes=False)
    inpainting = ImageTask(StableDiffusionInpaintPipeline, resizes=True)
    family = "Stable Diffusion 1.x and 2.x"
    reads_penultimate = False

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family."""
        return "unet" in config and "text_encoder" in config and "text_encoder_2" not in config

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family: as in diffusers, if it has no keys of another one."""
        return not any(key.startswith(("conditioner.", "double_blocks.")) for key in keys)

    def encode_prompt(
        self,
        prompt: Any,
        device: Any,
        num_images_per_prompt: Any,
        do_classifier_free_guidance: Any,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As in diffusers, whose `clip_skip` works with text encoders of transformers 5 as well."""
        with _inner_model_named(self.text_encoder):
            return super().encode_prompt(
                prompt, device=device, num_images_per_prompt=num_images_per_prompt,
                do_classifier_free_guidance=do_classifier_free_guidance, negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, lora_scale=lora_scale,
                clip_skip=clip_skip,
            )  # fmt: skip

    @front
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
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

        Args:
            concepts: Names of loaded concepts or adapters, boxes by name, {"cat": (0, 0, 64, 128)}, `Concept` objects
                or their fields as in JSON, {"name": "cat", "lora": "cat.safetensors"}, or a list of these per prompt;
                "auto": those that the prompt names; None: as in diffusers.
            method: draft, lora-composer, regional, clora, tara, merge, switch, composite, freefuse, or settings such as
                `Tara(scope="cross_kv")`; None chooses.
            control: Control images for ControlNets and T2I-Adapters; only with concepts.
            token_positions: With `prompt_embeds`: where each concept's trigger is, by concept name.
            record_attention: True, or the steps of which attention maps are returned.
            image: What image-to-image and inpainting start from: a PIL image, a path, an array, a tensor, or one for
                each prompt. Regions are in its coordinates.
            mask_image: White where the image is painted: as `image`, or a box in pixels or fractions.
            strength: The share of the steps that are run; None is diffusers' default for the task.
            padding_mask_crop: Pixels around the mask; only that part is painted, enlarged to width and height.
            paste_original: Whether pixels outside of the mask are the image's own; greys of the mask blend.

        Returns:
            A `ComposeOutput`, or `(images, nsfw_content_detected)` if `return_dict` is False.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        asked = dict(locals())
        begun = self._begin(asked, OLD_CALLBACK)
        if begun.plain is not None:
            return begun.plain
        prompt = begun.prompt
        check_arguments(kwargs, (), cross_attention_kwargs, allowed=("scale", "ip_adapter_masks"))
        tensors = tensors_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        source = self._source(begun.start, asked)
        width, height = self._size(width, height) if source is None else source.size
        self.check_inputs(
            prompt, height=height, width=width, callback_steps=None, negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            callback_on_step_end_tensor_inputs=self._of_every_task(tensors, begun.start),
        )  # fmt: skip
        texts = None if prompt_embeds is not None else [listed(prompt)]
        given = GivenPrompts(texts, prompt_embeds, negative=[listed(negative_prompt)])
        call = self._call(begun, asked, given, width, height, source)
        per_prompt = call.size.images_per_prompt

        def encode(
            prompts: Sequence[str] | None,
            negative_prompts: Sequence[str] | None,
            device: torch.device,
            reading: Reading | None = None,
        ) -> EncodedText:
            own, negative = prompt, negative_prompts or negative_prompt
            if negative_prompts is not None and prompt is not None:
                own = listed(prompt)  # diffusers takes two lists, or two texts
            if prompts is not None:
                own, negative = list(prompts), [negative] * len(prompts) if isinstance(negative, str) else negative
            if reading is None:
                embeds, uncond = self.encode_prompt(
                    own, device=device, num_images_per_prompt=per_prompt,
                    do_classifier_free_guidance=self.do_classifier_free_guidance, negative_prompt=negative,
                    prompt_embeds=prompt_embeds if prompts is None else None,
                    negative_prompt_embeds=negative_prompt_embeds if negative_prompts is None else None,
                    lora_scale=(cross_attention_kwargs or {}).get("scale"), clip_skip=clip_skip,
                )  # fmt: skip
            else:
                texts = {"prompt": own, "negative_prompt": negative}
                embeds, uncond = self.read_texts(
                    reading, texts, per_prompt, guided=self.do_classifier_free_guidance,
                    scale=(cross_attention_kwargs or {}).get("scale"), clip_skip=clip_skip,
                )  # fmt: skip
            uncond = uncond if self.do_classifier_free_guidance else None
            lengths = {} if reading is None else reading.lengths(per_prompt, 1 if uncond is None else 2)
            return EncodedText(embeds, uncond, lengths or None)

        def decode(latents: Tensor, process: Process) -> tuple[Any, Any]:
            images, nsfw = self._decode(latents, call, output_type or "np", process.text.prompt_embeds.dtype)
            return self._finished(images, source), nsfw

        return Request(call, encode, decode, return_dict)

    def _decode(self, latents: Tensor, call: Call, output_type: str, dtype: torch.dtype) -> tuple[Any, Any]:
        if output_type == "latent":
            return self._postprocess(latents, output_type), None
        scaled = latents / self.vae.config.scaling_factor
        image = self.vae.decode(scaled, return_dict=False, generator=call.sampling.generator)[0]
        image, nsfw = self.run_safety_checker(image, device=latents.device, dtype=dtype)
        denormalize = [True] * len(image) if nsfw is None else [not flag for flag in nsfw]
        return self._postprocess(image, output_type, do_denormalize=denormalize), nsfw

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Any]:
        uncond = text.prompt_embeds[text.roles.unconditional] if text.guided else None
        return {"prompt_embeds": text.prompt_embeds, "negative_prompt_embeds": uncond}


ComposePipeline.families.append(ComposeStableDiffusionPipeline)


@contextmanager
def _inner_model_named(text_encoder: Any) -> Iterator[None]:
    """Inside this block a text encoder has the name by which diffusers finds its final layer norm, `text_model`.

    transformers 4 has one module more between `CLIPTextModel` and its layers, which is called so.
    """
    model = uncompiled(text_encoder)
    if not isinstance(model, CLIPTextModel) or hasattr(model, "text_model"):
        yield
        return
    model.__dict__["text_model"] = model  # not as a child: a module that contains itself has no end
    try:
        yield
    finally:
        del model.__dict__["text_model"]
