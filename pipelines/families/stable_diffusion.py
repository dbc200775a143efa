"""Stable Diffusion 1.x and 2.x with concepts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from lora_compose.attention.device import uncompiled
from lora_compose.pipelines.calls.call import Call, GivenPrompts, listed
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.families.unets import UNetPipeline
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.encoder import EncodedText
from lora_compose.pipelines.text.long_prompts import Reading


class ComposeStableDiffusionPipeline(UNetPipeline, StableDiffusionPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `StableDiffusionPipeline` whose calls may name concepts."""

    image_to_image = ImageTask(StableDiffusionImg2ImgPipeline, resizes=False)
    inpainting = ImageTask(StableDiffusionInpaintPipeline, resizes=True)
    family = "Stable Diffusion 1.x and 2.x"
    reads = (
        "timesteps", "sigmas", "negative_prompt", "eta", "prompt_embeds", "negative_prompt_embeds",
        "ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs", "guidance_rescale", "clip_skip",
    )  # fmt: skip
    reads_penultimate = False

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family."""
        return "unet" in config and "text_encoder" in config and "text_encoder_2" not in config

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family: it has a UNet, and no text encoders as SDXL names its own."""
        bare = [key.removeprefix("model.diffusion_model.") for key in keys]
        return any(key.startswith("input_blocks.") for key in bare) and not any(
            key.startswith("conditioner.") for key in keys
        )

    @wraps(StableDiffusionPipeline.encode_prompt, assigned=())  # its signature
    def encode_prompt(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As in diffusers, whose `clip_skip` works with text encoders of transformers 5 as well."""
        with _inner_model_named(self.text_encoder):
            return super().encode_prompt(*args, **options)

    @front(StableDiffusionPipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Returns:
            A `ComposeOutput`, or `(images, nsfw_content_detected)` if `return_dict` is False.
        """
        given, (source, size) = begun.given, self._source(begun)
        self._check_inputs(begun, size)
        texts = None if given["prompt_embeds"] is not None else [listed(given["prompt"])]
        negatives = [listed(given["negative_prompt"])]
        prompts = GivenPrompts(
            texts, given["prompt_embeds"], negative=negatives, negative_embeds=given["negative_prompt_embeds"]
        )
        call = self._call(begun, prompts, size, source)

        def encode(
            prompts: Sequence[str] | None,
            negative_prompts: Sequence[str] | None,
            device: torch.device,
            reading: Reading | None = None,
        ) -> EncodedText:
            own, negative = given["prompt"], negative_prompts or given["negative_prompt"]
            if negative_prompts is not None and own is not None:
                own = listed(own)  # diffusers takes two lists, or two texts
            if prompts is not None:
                own, negative = list(prompts), [negative] * len(prompts) if isinstance(negative, str) else negative
            embeds, uncond = self._encoded(
                begun, {"prompt": own, "negative_prompt": negative}, device, reading, own=prompts is None,
                own_negative=negative_prompts is None,
            )  # fmt: skip
            uncond = uncond if self.do_classifier_free_guidance else None
            lengths = None if reading is None else reading.lengths(begun.images_per_prompt) or None
            return EncodedText(embeds, uncond, lengths, None if uncond is None else lengths)

        def decode(latents: Tensor, process: Process) -> tuple[Any, Any]:
            output_type = given["output_type"] or "np"
            images, nsfw = self._decode(latents, call, output_type, process.text.prompt_embeds.dtype)
            return self._finished(images, source), nsfw

        return Request(call, encode, decode, given["return_dict"])

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
