"""Stable Diffusion XL with concepts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from lora_compose.pipelines.calls.call import (
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

_REFINER = (
    "this is SDXL's refiner, which improves finished images and does not read prompts as the base model does; open "
    "the base model, such as stabilityai/stable-diffusion-xl-base-1.0"
)


class ComposeStableDiffusionXLPipeline(UNetPipeline, StableDiffusionXLPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `StableDiffusionXLPipeline` whose calls may name concepts."""

    image_to_image = ImageTask(StableDiffusionXLImg2ImgPipeline, resizes=False)
    inpainting = ImageTask(StableDiffusionXLInpaintPipeline, resizes=True)
    family = "Stable Diffusion XL"
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

    @front
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
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

        If `prompt_2` differs, a concept's words must have the same token positions in both prompts. Methods with a text
        for each concept (`lora-composer`, `clora`) derive them from `prompt`, for both encoders, and refuse another
        `prompt_2`. In a batch with negative sizes, every row has its own; diffusers mixes them up there.

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
            A `ComposeOutput`, or `(images,)` if `return_dict` is False.

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
            prompt, prompt_2=prompt_2, height=height, width=width, callback_steps=None, negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=self._of_every_task(tensors, begun.start),
        )  # fmt: skip
        self._check_model(pooled_prompt_embeds)
        given = GivenPrompts(
            None if prompt_embeds is not None else self._texts(prompt, prompt_2), prompt_embeds,
            negative=[listed(negative_prompt), listed(negative_prompt_2)],
        )  # fmt: skip
        call = self._call(begun, asked, given, width, height, source)
        per_prompt = call.size.images_per_prompt
        sizes = (original_size or (height, width)) + crops_coords_top_left + (target_size or (height, width))
        negative_sizes = sizes
        if negative_original_size is not None and negative_target_size is not None:
            negative_sizes = negative_original_size + negative_crops_coords_top_left + negative_target_size

        def encode(
            prompts: Sequence[str] | None,
            negative_prompts: Sequence[str] | None,
            device: torch.device,
            reading: Reading | None = None,
        ) -> EncodedText:
            own, own_2, negative, negative_2 = prompt, prompt_2, negative_prompt, negative_prompt_2
            if negative_prompts is not None:
                negative, negative_2 = list(negative_prompts), None
            if prompts is not None:
                _check_one_text(given)
                own, own_2 = list(prompts), None
            if reading is None:
                encode_prompt: Any = self.encode_prompt  # its annotations know no lists
                embeds, uncond, pooled, uncond_pooled = encode_prompt(
                    own, prompt_2=own_2, device=device, num_images_per_prompt=per_prompt,
                    do_classifier_free_guidance=self.do_classifier_free_guidance, negative_prompt=negative,
                    negative_prompt_2=negative_2,
                    prompt_embeds=prompt_embeds if prompts is None else None,
                    negative_prompt_embeds=negative_prompt_embeds if negative_prompts is None else None,
                    pooled_prompt_embeds=pooled_prompt_embeds if prompts is None else None,
                    negative_pooled_prompt_embeds=negative_pooled_prompt_embeds if negative_prompts is None else None,
                    lora_scale=(cross_attention_kwargs or {}).get("scale"), clip_skip=clip_skip,
                )  # fmt: skip
            else:
                texts = {
                    "prompt": own, "prompt_2": own_2, "negative_prompt": negative, "negative_prompt_2": negative_2,
                }  # fmt: skip
                embeds, uncond, pooled, uncond_pooled = self.read_texts(
                    reading, texts, per_prompt, guided=self.do_classifier_free_guidance,
                    scale=(cross_attention_kwargs or {}).get("scale"), clip_skip=clip_skip,
                )  # fmt: skip
            uncond = uncond if self.do_classifier_free_guidance else None
            parts = [(pooled, sizes)] if uncond is None else [(uncond_pooled, negative_sizes), (pooled, sizes)]
            lengths = {} if reading is None else reading.lengths(per_prompt, len(parts))
            return EncodedText(embeds, uncond, {**self._added(parts, embeds), **lengths})

        def decode(latents: Tensor, process: Process) -> tuple[Any]:
            return (self._finished(self._decode(latents, output_type or "np"), source),)

        return Request(call, encode, decode, return_dict)

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

    def _added(self, parts: Sequence[tuple[Tensor, tuple[int, ...]]], embeds: Tensor) -> Mapping[str, Tensor]:
        """Pooled text and sizes of all rows, from those of the unconditional and of the conditional rows."""
        rows = [torch.tensor([sizes], dtype=embeds.dtype).repeat(len(pooled), 1) for pooled, sizes in parts]
        pooled = torch.cat([pooled for pooled, _ in parts])
        return {"text_embeds": pooled.to(embeds.device), "time_ids": torch.cat(rows).to(embeds.device)}

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


ComposePipeline.families.append(ComposeStableDiffusionXLPipeline)


def _check_one_text(prompts: GivenPrompts) -> None:
    """Raises ValueError if the second encoder reads another prompt, of which no texts can be made."""
    if prompts.texts is not None and list(prompts.texts[0]) != list(prompts.texts[-1]):
        raise ValueError(
            "this method makes texts of its own from the prompt, for both text encoders; leave prompt_2 out, or use a "
            "method with one text for all: merge, tara, regional, switch, composite"
        )
