"""Stable Diffusion XL with concepts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from torch import Tensor

from lora_compose.pipelines.calls.call import GivenPrompts, listed
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.families.unets import UNetPipeline
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.encoder import EncodedText
from lora_compose.pipelines.text.long_prompts import Reading

_REFINER = (
    "this is SDXL's refiner, which improves finished images and does not read prompts as the base model does; open "
    "the base model, such as stabilityai/stable-diffusion-xl-base-1.0"
)


class ComposeStableDiffusionXLPipeline(UNetPipeline, StableDiffusionXLPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `StableDiffusionXLPipeline` whose calls may name concepts."""

    image_to_image = ImageTask(StableDiffusionXLImg2ImgPipeline, resizes=False)
    inpainting = ImageTask(StableDiffusionXLInpaintPipeline, resizes=True)
    family = "Stable Diffusion XL"
    reads = (
        "timesteps", "sigmas", "negative_prompt", "eta", "prompt_embeds", "negative_prompt_embeds",
        "ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs", "guidance_rescale", "clip_skip",
        "prompt_2", "denoising_end", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
        "original_size", "crops_coords_top_left", "target_size", "negative_original_size",
        "negative_crops_coords_top_left", "negative_target_size",
    )  # fmt: skip
    reads_penultimate = True

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family; raises ValueError for SDXL's refiner."""
        if config.get("requires_aesthetics_score"):
            raise ValueError(_REFINER)
        return {"unet", "text_encoder", "text_encoder_2"} <= config.keys()

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family; raises ValueError for SDXL's refiner."""
        if any(key.startswith("conditioner.embedders.1.") for key in keys):
            return True
        if any(key.startswith("conditioner.embedders.0.model.") for key in keys):
            raise ValueError(_REFINER)
        return False

    @front(StableDiffusionXLPipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        If `prompt_2` differs, a concept's words must have the same token positions in both prompts. Methods with a text
        for each concept (`lora-composer`, `clora`) derive them from `prompt`, for both encoders, and refuse another
        `prompt_2`. In a batch with negative sizes, every row has its own; diffusers mixes them up there.

        Returns:
            A `ComposeOutput`, or `(images,)` if `return_dict` is False.
        """
        given, (source, size) = begun.given, self._source(begun)
        prompt, prompt_2, embeds = given["prompt"], given["prompt_2"], given["prompt_embeds"]
        negative_prompts_given = given["negative_prompt"], given["negative_prompt_2"]
        self._check_inputs(begun, size)
        self._check_model(given["pooled_prompt_embeds"])
        prompts_given = GivenPrompts(
            None if embeds is not None else self._texts(prompt, prompt_2), embeds,
            negative=list(map(listed, negative_prompts_given)), negative_embeds=given["negative_prompt_embeds"],
        )  # fmt: skip
        sizes, negative_sizes = self._sizes(given, size)

        def encode(
            prompts: Sequence[str] | None,
            negative_prompts: Sequence[str] | None,
            device: torch.device,
            reading: Reading | None = None,
        ) -> EncodedText:
            (own, own_2), (negative, negative_2) = (prompt, prompt_2), negative_prompts_given
            if negative_prompts is not None:
                negative, negative_2 = list(negative_prompts), None
            if prompts is not None:
                _check_one_text(prompts_given)
                own, own_2 = list(prompts), None
            texts = {"prompt": own, "prompt_2": own_2, "negative_prompt": negative, "negative_prompt_2": negative_2}
            embeds, uncond, pooled, uncond_pooled = self._encoded(
                begun, texts, device, reading, own=prompts is None, own_negative=negative_prompts is None
            )
            uncond = uncond if self.do_classifier_free_guidance else None
            lengths = {} if reading is None else reading.lengths(begun.images_per_prompt)
            added = {**_added(pooled, sizes, embeds), **lengths}
            if uncond is None:
                return EncodedText(embeds, None, added)
            return EncodedText(embeds, uncond, added, {**_added(uncond_pooled, negative_sizes, embeds), **lengths})

        def decode(latents: Tensor, process: Process) -> tuple[Any]:
            return (self._finished(self._decode(latents, given["output_type"] or "np"), source),)

        return Request(self._call(begun, prompts_given, size, source), encode, decode, given["return_dict"])

    def _sizes(self, given: Mapping[str, Any], size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The six numbers of conditional and of unconditional rows, in pixels; `size` is that of the images."""
        own = size[1], size[0]
        sizes = (given["original_size"] or own) + given["crops_coords_top_left"] + (given["target_size"] or own)
        original, target = given["negative_original_size"], given["negative_target_size"]
        if original is None or target is None:
            return sizes, sizes
        return sizes, original + given["negative_crops_coords_top_left"] + target

    def _check_model(self, pooled: Tensor | None) -> None:
        """Raises ValueError for UNets that take something else than pooled text and six numbers, as the refiner's."""
        config, encoder = self.unet.config, self.text_encoder_2
        encoded = None if encoder is None else encoder.config.projection_dim
        width = encoded if pooled is None else pooled.shape[-1]
        taken = config.projection_class_embeddings_input_dim
        numbers = None if width is None or taken is None else taken - width
        if config.addition_embed_type != "text_time" or numbers not in (None, 6 * config.addition_time_embed_dim):
            raise ValueError(
                "this UNet does not take the pooled text and the six sizes of SDXL's base model; concepts need the "
                "base model, and the refiner can refine the images afterwards"
            )

    def _texts(self, prompt: str | list[str] | None, prompt_2: str | list[str] | None) -> list[list[str]]:
        """The texts for each tokenizer."""
        texts = [listed(prompt), listed(prompt_2 or prompt)]
        if len(texts[0]) != len(texts[1]):
            raise ValueError(f"there are {len(texts[0])} prompts, but {len(texts[1])} in prompt_2")
        return texts[-sum(self.components.get(name) is not None for name in self.text_tokenizers) :]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        with self._vae_in_range():
            scaled = self._unscaled(latents.to(self.vae.dtype))
            image = self.vae.decode(scaled, return_dict=False)[0]
        if self.watermark is not None:
            image = self.watermark.apply_watermark(image)
        return self._postprocess(image, output_type)

    @contextmanager
    def _vae_in_range(self) -> Iterator[None]:
        """The VAE in float32 where it would overflow in float16; its precision is restored afterwards."""
        if self.vae.dtype != torch.float16 or not self.vae.config.force_upcast:
            yield
            return
        self.vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            self.vae.to(dtype=torch.float16)

    def _unscaled(self, latents: Tensor) -> Tensor:
        config: Mapping[str, Any] = self.vae.config
        # Some kinds of VAE do not know them.
        statistics = [config.get(name) for name in ("latents_mean", "latents_std")]
        if None in statistics:
            return latents / config["scaling_factor"]
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1) for values in statistics
        )
        return latents * std / config["scaling_factor"] + mean

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Any]:
        added = text.added or {}
        return {
            "prompt_embeds": text.prompt_embeds,
            "add_text_embeds": added["text_embeds"],
            "add_time_ids": added["time_ids"],
        }


def _check_one_text(prompts: GivenPrompts) -> None:
    """Raises ValueError if the second encoder reads another prompt, of which no texts can be made."""
    if prompts.texts is not None and list(prompts.texts[0]) != list(prompts.texts[-1]):
        raise ValueError(
            "this method makes texts of its own from the prompt, for both text encoders; leave prompt_2 out, or use a "
            "method with one text for all: merge, tara, regional, switch, composite"
        )


def _added(pooled: Tensor, sizes: tuple[int, ...], embeds: Tensor) -> Mapping[str, Tensor]:
    """Pooled text and sizes of rows, beside their embeddings."""
    rows = torch.tensor([sizes], dtype=embeds.dtype).repeat(len(pooled), 1)
    return {"text_embeds": pooled.to(embeds.device), "time_ids": rows.to(embeds.device)}
