"""Stable Diffusion 1.x and 2.x with concepts."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from attention import check_free
from pipelines.base import ComposePipeline, check_call, steps_to_record
from pipelines.conditioning import TokenMasks, TokenPositions
from pipelines.engine import EncodedText, Engine
from pipelines.methods import Settings
from pipelines.output import ComposeOutput
from pipelines.scene import Concept


class ComposeStableDiffusionPipeline(ComposePipeline, StableDiffusionPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `StableDiffusionPipeline` whose calls may name concepts."""

    _plain_class_name: ClassVar[str] = "StableDiffusionPipeline"

    @torch.no_grad()
    def __call__(  # noqa: D417
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        concepts: Sequence[str | Concept] | None = None,
        method: str | Settings | None = None,
        token_positions: TokenPositions | None = None,
        record_attention: bool | Sequence[int] = False,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Makes images; all arguments of diffusers' pipeline keep their meaning.

        Args:
            concepts: Who takes part: names of loaded concepts or adapters, or `Concept` objects, whose given fields
                win. None or empty: exactly what diffusers does.
            method: How they are fused: a name or a settings object such as `Tara(scope="cross_kv")`; None chooses.
            token_positions: With `prompt_embeds`: where each concept's trigger stands, by concept name.
            record_attention: True, or the steps of which attention maps are returned.

        Returns:
            A `ComposeOutput`, or `(images, nsfw_content_detected)` if `return_dict` is False.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        if not concepts:
            if method is not None or token_positions is not None or record_attention is not False:
                raise ValueError(
                    "method, token_positions and record_attention need concepts; name some with concepts=[...]"
                )
            check_free(self.unet)
            plain: Callable[..., Any] = super().__call__
            return plain(
                prompt, height, width, num_inference_steps, timesteps, sigmas, guidance_scale, negative_prompt,
                num_images_per_prompt, eta, generator, latents, prompt_embeds, negative_prompt_embeds, ip_adapter_image,
                ip_adapter_image_embeds, output_type, return_dict, cross_attention_kwargs, guidance_rescale, clip_skip,
                callback_on_step_end, list(callback_on_step_end_tensor_inputs), **kwargs,
            )  # fmt: skip
        started = time.perf_counter()
        if kwargs:
            raise TypeError(f"unknown arguments: {', '.join(kwargs)}")
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            raise ValueError("IP-Adapter images cannot be combined with concepts yet")
        if unknown := (cross_attention_kwargs or {}).keys() - {"scale"}:
            raise ValueError(
                f"cross_attention_kwargs {sorted(unknown)} cannot be combined with concepts; only 'scale' can"
            )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        width, height = self._size(width, height)
        self.check_inputs(
            prompt, height, width, None, negative_prompt, prompt_embeds, negative_prompt_embeds, None, None,
            list(callback_on_step_end_tensor_inputs),
        )  # fmt: skip
        loaded = self.resolve_concepts(concepts)
        check_call(loaded, width, height, num_inference_steps)
        prompts = None if prompt_embeds is not None else _listed(prompt)
        settings = self.resolve_method(method, loaded, prompts)
        takers = [found.concept for found in loaded]
        # Textual inversion puts several tokens in place of one.
        texts = None if prompts is None else self._converted(prompts)
        masks = self._token_masks(takers, texts, prompt_embeds, token_positions)

        device = self._execution_device
        images_per_prompt = num_images_per_prompt or 1
        batch_size = masks.trigger.shape[0] * images_per_prompt

        def encode(prompts: Sequence[str] | None, negative_prompts: Sequence[str] | None) -> EncodedText:
            own, negative = prompt, negative_prompts or negative_prompt
            if prompts is not None:
                own, negative = list(prompts), [negative] * len(prompts) if isinstance(negative, str) else negative
            embeds, uncond = self.encode_prompt(
                own, device, images_per_prompt, self.do_classifier_free_guidance, negative,
                prompt_embeds=prompt_embeds if prompts is None else None,
                negative_prompt_embeds=negative_prompt_embeds if negative_prompts is None else None,
                lora_scale=(cross_attention_kwargs or {}).get("scale"), clip_skip=clip_skip,
            )  # fmt: skip
            return EncodedText(embeds, uncond if self.do_classifier_free_guidance else None)

        engine = Engine(
            self.components,
            loaded,
            encode,
            lambda prompts, names, mentions: TokenMasks.of_prompts(
                self.tokenizer, self._converted(prompts), takers, names, mentions=mentions
            ),
            prompts,
            masks,
            latent_grid=(height // self.vae_scale_factor, width // self.vae_scale_factor),
            image_size=(height, width),
            images_per_prompt=images_per_prompt,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            device=device,
            unet_kwargs=self._unet_kwargs(batch_size, device, guidance_scale, cross_attention_kwargs),
            started=started,
        )
        # Refuses a second call on this UNet before the scheduler and the properties of the first are touched.
        with engine.installed():
            self._guidance_scale = guidance_scale
            self._guidance_rescale = guidance_rescale
            self._clip_skip = clip_skip
            self._cross_attention_kwargs = cross_attention_kwargs
            self._interrupt = False
            schedule: Any = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
            steps, num_inference_steps = schedule
            engine.timesteps = steps
            engine.record_steps = steps_to_record(record_attention, len(steps))
            process = settings.start(engine)
            start = self.prepare_latents(
                batch_size, self.unet.config.in_channels, height, width, engine.conditioning.prompt_embeds.dtype,
                device, generator, latents,
            )  # fmt: skip
            final = self.denoise(
                engine, process, start, steps, num_inference_steps, self.prepare_extra_step_kwargs(generator, eta),
                callback_on_step_end, callback_on_step_end_tensor_inputs,
            )  # fmt: skip
        images, nsfw = self._decode(final, output_type or "np", generator, engine.conditioning.prompt_embeds.dtype)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, nsfw
        recorded_steps, maps = engine.attention_maps() or (None, None)
        return ComposeOutput(
            images=images,
            nsfw_content_detected=nsfw,
            cost=engine.cost,
            attention_maps=maps,
            masks=engine.masks(),
            recorded_steps=recorded_steps,
        )

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height in pixels; what is None is the model's own."""
        sample: Any = self.unet.config["sample_size"]
        own_height, own_width = (sample, sample) if isinstance(sample, int) else sample
        scale = self.vae_scale_factor
        return own_width * scale if width is None else width, own_height * scale if height is None else height

    def _token_masks(
        self,
        concepts: Sequence[Concept],
        texts: Sequence[str] | None,
        prompt_embeds: Tensor | None,
        token_positions: TokenPositions | None,
    ) -> TokenMasks:
        if prompt_embeds is not None:
            prompts, tokens, _ = prompt_embeds.shape
            return TokenMasks.of_positions(token_positions or {}, prompts, tokens, concepts)
        if token_positions is not None:
            raise ValueError("token_positions go with prompt_embeds; with a prompt, words are found by their triggers")
        elsewhere = {concept.name for concept in concepts if concept.prompt is not None}
        return TokenMasks.of_prompts(self.tokenizer, texts or (), concepts, optional=elsewhere)

    def _converted(self, prompts: Sequence[str]) -> list[str]:
        return [str(self.maybe_convert_prompt(prompt, self.tokenizer)) for prompt in prompts]

    def _unet_kwargs(
        self,
        batch_size: int,
        device: torch.device,
        guidance_scale: float,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> Mapping[str, Any]:
        kwargs: dict[str, Any] = {"cross_attention_kwargs": cross_attention_kwargs}
        if self.unet.config.time_cond_proj_dim is not None:  # distilled models take the guidance scale as an input
            scale = torch.tensor(guidance_scale - 1).repeat(batch_size)
            embedding = self.get_guidance_scale_embedding(scale, embedding_dim=self.unet.config.time_cond_proj_dim)
            kwargs["timestep_cond"] = embedding.to(device=device, dtype=self.unet.dtype)
        return kwargs

    def _decode(self, latents: Tensor, output_type: str, generator: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        if output_type == "latent":
            return self.image_processor.postprocess(latents, output_type=output_type), None
        image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False, generator=generator)[0]
        image, nsfw = self.run_safety_checker(image, latents.device, dtype)
        denormalize = [True] * len(image) if nsfw is None else [not flag for flag in nsfw]
        return self.image_processor.postprocess(image, output_type=output_type, do_denormalize=denormalize), nsfw


def _listed(prompt: str | list[str] | None) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt or []
