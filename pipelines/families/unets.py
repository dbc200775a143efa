"""What the pipelines with a UNet have in common: sizes, start noise or image, inputs of distilled models."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import AsymmetricAutoencoderKL
from torch import Tensor, nn

from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.call import Call, Guidance, Sampling, check_latents, listed
from lora_compose.pipelines.canvas import Canvas
from lora_compose.pipelines.concepts.selection import check_no_tags
from lora_compose.pipelines.concepts.textual_inversion import TOKENIZERS
from lora_compose.pipelines.from_image import FromImage, Source, check_steps
from lora_compose.pipelines.plan import Plan
from lora_compose.pipelines.refine import Origin
from lora_compose.pipelines.sampler import Schedule
from lora_compose.pipelines.task import ImageToImage, Inpainting
from lora_compose.pipelines.text.emphasis import Emphasis, has_weights
from lora_compose.pipelines.text.long_prompts import Reading
from lora_compose.pipelines.text.weighted import weighted_embeds

_FOR_INPAINTING = 9
"""Input channels of UNets that were made for inpainting: latents, mask, and latents of the masked image."""

TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Arguments that are texts, and what the text encoders make of them."""

OLD_CALLBACK = {"callback", "callback_steps"}
"""Arguments that diffusers takes beside those that it names."""


class UNetPipeline(ComposePipeline):
    """A composing pipeline of the Stable Diffusion families."""

    image_to_image: ClassVar[type]
    """diffusers' pipeline for image-to-image, which shares all components."""

    inpainting: ClassVar[type]
    """diffusers' pipeline for inpainting, which shares all components."""

    reads_weights: ClassVar[bool] = True
    reads_penultimate: ClassVar[bool]
    """Whether the UNet reads the text of the layer before the last, without its norm."""

    # What diffusers' pipelines of these families have.
    prepare_latents: Any
    prepare_extra_step_kwargs: Any
    get_guidance_scale_embedding: Any
    encode_prompt: Any
    maybe_convert_prompt: Any

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height in pixels; None means the model's own."""
        sample: Any = self.unet.config["sample_size"]
        own_height, own_width = (sample, sample) if isinstance(sample, int) else sample
        scale = self.vae_scale_factor
        return own_width * scale if width is None else width, own_height * scale if height is None else height

    @property
    def own_size(self) -> tuple[int, int]:
        """Width and height of the images that the model was made for, in pixels."""
        return self._size(None, None)

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """Arguments of a call with classifier-free guidance.

        Args:
            scale: As the family means `guidance_scale`.
            negative_prompt: What to avoid; None means nothing, for which SDXL gets zeros instead of an empty text.
        """
        return {"guidance_scale": scale, "negative_prompt": negative_prompt}

    def _check_latents(self, call: Call, canvas: Canvas) -> None:
        given, source = call.sampling.latents, call.source
        if given is not None and source is not None and source.mask is None:
            raise ValueError("latents cannot be given for image-to-image, which starts from those of the image")
        channels = self.unet.config.in_channels if source is None else self.vae.config.latent_channels
        check_latents(given, (canvas.images, channels, *canvas.latent_grid))

    def _noise(self, call: Call, plan: Plan, dtype: torch.dtype) -> Tensor:
        return self.prepare_latents(
            plan.canvas.images, self.unet.config.in_channels, call.size.height, call.size.width, dtype,
            plan.canvas.device, call.sampling.generator, call.sampling.latents,
        )  # fmt: skip

    def _step_arguments(self, sampling: Sampling) -> Mapping[str, Any]:
        return self.prepare_extra_step_kwargs(sampling.generator, sampling.eta)

    def _inputs(
        self, guidance: Guidance, images: int, cross_attention_kwargs: dict[str, Any] | None
    ) -> Mapping[str, Any]:
        """Further arguments of every forward pass."""
        inputs: dict[str, Any] = {"cross_attention_kwargs": cross_attention_kwargs}
        width = self.unet.config.time_cond_proj_dim
        if width is not None:  # distilled models take the guidance scale as an input
            embedding = self.get_guidance_scale_embedding(
                torch.tensor(guidance.scale - 1).repeat(images), embedding_dim=width
            )
            inputs["timestep_cond"] = embedding.to(device=self._execution_device, dtype=self.unet.dtype)
        return inputs

    # Texts with weights, and texts longer than a text encoder reads at once.

    def read_texts(
        self,
        reading: Reading,
        texts: Mapping[str, str | Sequence[str] | None],
        images_per_prompt: int,
        *,
        guided: bool,
        scale: float | None = None,
        clip_skip: int | None = None,
    ) -> list[Any]:
        """Encodes texts chunk by chunk, with their weights.

        Args:
            reading: How they are read.
            texts: By the names that `encode_prompt` of diffusers has for them: prompts, then negative prompts.
            images_per_prompt: Rows of each prompt.
            guided: Whether negative prompts are encoded, too.
            scale: Of adapters in the text encoders.
            clip_skip: As in diffusers.

        Returns:
            What `encode_prompt` returns.

        Raises:
            ValueError: For weights together with a scale or `clip_skip`, which compel does not know.
        """
        prompts = len(listed(texts["prompt"]))  # pyright: ignore[reportArgumentType]
        columns = [[column] * prompts if isinstance(column, str) else column for column in texts.values()]

        def encode(chunk: Sequence[Sequence[str] | None]) -> Sequence[Tensor]:
            return self.encode_prompt(
                **dict(zip(texts, chunk, strict=True)), device=self._execution_device,
                num_images_per_prompt=images_per_prompt, do_classifier_free_guidance=guided, lora_scale=scale,
                clip_skip=clip_skip,
            )  # fmt: skip

        def weighted(given: Sequence[Emphasis]) -> Tensor:
            if clip_skip is not None or scale is not None:
                raise ValueError(
                    "weights in prompts do not go with clip_skip or with a scale in cross_attention_kwargs; leave out "
                    "one of them"
                )
            found = []
            for name, part in TOKENIZERS.items():
                if self.components.get(part) is not None:
                    text = given[min(len(found), len(given) - 1)]
                    found.append(weighted_embeds(
                        getattr(self, name), getattr(self, part), text, self._execution_device,
                        penultimate=self.reads_penultimate, expand=self.maybe_convert_prompt,
                    ))  # fmt: skip
            return torch.cat(found, dim=-1)

        return reading.encode(columns, encode, weighted, images_per_prompt)

    def with_weights(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call without concepts; prompts with weights become embeddings, others stay as they are."""
        names = [name for name in TEXTS if isinstance(arguments.get(name), str | list)]  # others are for diffusers
        texts = {name: listed(arguments[name]) for name in names}
        check_no_tags([text for column in texts.values() for text in column])
        if not any(has_weights(text) for column in texts.values() for text in column):
            return arguments
        given = [name for name in EMBEDS if arguments.get(name) is not None]
        if given or "prompt" not in texts:
            raise ValueError(f"weights in prompts do not go with {', '.join(given) or 'embeddings'}; give the prompts")
        prompts = [column for name, column in texts.items() if not name.startswith("negative")]
        negative = [text for name, column in texts.items() if name.startswith("negative") for text in column]
        reading = Reading.of(self.tokenizers_for([]), prompts, negative)
        guided = arguments["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
        known = [name for name in TEXTS if name in arguments]
        found = self.read_texts(
            reading, {name: arguments[name] for name in known}, 1, guided=guided, clip_skip=arguments["clip_skip"],  # pyright: ignore[reportArgumentType]
            scale=(arguments["cross_attention_kwargs"] or {}).get("scale"),
        )  # fmt: skip
        return {**arguments, **dict.fromkeys(known), **dict(zip(EMBEDS, found, strict=False))}

    # Calls that start from an image.

    def _origin(self, call: Call, plan: Plan) -> Origin | None:
        prompts, sampling = call.prompts.first, call.sampling
        if prompts is None or call.source is not None or sampling.has_schedule:
            return None
        names = [concept.name for concept in plan.concepts.concepts]
        sets = {index: found.concepts.concepts for found in plan.sets for index in found.indices}
        each = [sets[index] for index in range(len(prompts))]
        options = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance.scale}
        if call.prompts.negative:
            options["negative_prompt"] = call.prompts.negative[0]
        columns = [[names.index(concept.name) for concept in one] for one in each]
        return Origin(self, prompts, each, columns, call.size.images_per_prompt, options)

    def _task_pipeline(self, given: FromImage) -> Any:
        """The pipeline of diffusers for the task of a call, with the same components."""
        kind: Any = self.image_to_image if given.mask is None else self.inpainting
        names = inspect.signature(kind.__init__).parameters
        options = {name: self.config[name] for name in ("requires_safety_checker", "force_zeros_for_empty_prompt")
                   if name in names and name in self.config}  # fmt: skip
        if "add_watermarker" in names:
            options["add_watermarker"] = False
        pipe = kind(**{name: part for name, part in self.components.items() if name in names}, **options)
        pipe.__dict__.update({name: self.__dict__[name] for name in ("watermark", "_progress_bar_config")
                              if name in self.__dict__})  # fmt: skip
        return pipe

    def _from_image_as_diffusers(self, given: FromImage, arguments: Mapping[str, Any]) -> Any:
        """A call without concepts that starts from an image: exactly what diffusers' pipeline for the task does.

        Args:
            given: The image.
            arguments: All other arguments of the call; those that have their default value may be unknown to it.

        Raises:
            ValueError: For arguments that it does not take.
        """
        self._check_model_for(given)
        pipe = self._task_pipeline(given)
        given.check_size(self.vae_scale_factor)
        if given.mask is None:
            self._check_size(given.cells(self.vae_scale_factor), arguments["width"], arguments["height"])
            arguments = {**arguments, "width": None, "height": None}
        check_steps(_steps(arguments), self._strength(given.strength, given.mask is not None))
        taken = inspect.signature(type(pipe).__call__).parameters
        own = inspect.signature(type(self).__call__).parameters
        left_out = [name for name in arguments if name not in taken and name in own]
        if unread := [name for name in left_out if arguments[name] != own[name].default]:
            task = "image-to-image" if given.mask is None else "inpainting"
            raise ValueError(f"{', '.join(unread)} cannot be given for {task}")
        if given.paste_original and arguments["output_type"] != "pil":
            raise ValueError(_PIL_ONLY)
        with _precision_kept(self.vae):
            output = pipe(**given.arguments, **{name: value for name, value in arguments.items() if name in taken})
        self.maybe_free_model_hooks()
        if not given.paste_original or given.padding_mask_crop is not None:  # which diffusers has pasted
            return output
        images = output.images if arguments["return_dict"] else output[0]
        images[:] = given.pasted(images, pipe.image_processor)
        return output

    def steps_from_image(self, steps: int, strength: float | None, inpaints: bool) -> int:
        """How many of the steps are run in a call that starts from an image.

        Args:
            steps: Denoising steps that are asked for.
            strength: The share of them; None is diffusers' default for the task.
            inpaints: Whether there is a mask.
        """
        return min(int(steps * self._strength(strength, inpaints)), steps)

    def _strength(self, given: float | None, inpaints: bool) -> float:
        kind: Any = self.inpainting if inpaints else self.image_to_image
        return inspect.signature(kind.__call__).parameters["strength"].default if given is None else given

    def _check_size(self, size: tuple[int, int], width: int | None, height: int | None) -> None:
        """Raises ValueError if a call of image-to-image asks for another size than the image has."""
        if (width or size[0], height or size[1]) != size:
            raise ValueError(
                f"width and height are those of the image, {size[0]} x {size[1]} in whole latent cells; resize the "
                "image, or leave them out"
            )

    def _check_model_for(self, given: FromImage | None) -> None:
        """Raises ValueError for UNets made for inpainting where there is no mask."""
        if self.unet.config.in_channels == _FOR_INPAINTING and (given is None or given.mask is None):
            raise ValueError("this UNet was made for inpainting: give image=... and mask_image=...")

    def _source(
        self, given: FromImage | None, width: int | None, height: int | None, output_type: str
    ) -> Source | None:
        """The image that a call with concepts starts from, made ready.

        Raises:
            ValueError: For models and outputs that do not go with it.
        """
        self._check_model_for(given)
        if given is None:
            return None
        pipe = self._task_pipeline(given)
        strength = self._strength(given.strength, given.mask is not None)
        if given.mask is None:
            source = Source.of(given, pipe, strength, None)
            self._check_size(source.size, width, height)
            return source
        if isinstance(self.vae, AsymmetricAutoencoderKL):
            raise ValueError(
                "inpainting with concepts does not support AsymmetricAutoencoderKL; use the model's own VAE"
            )
        if self.unet.config.in_channels == _FOR_INPAINTING and given.is_latents:
            raise ValueError(
                "a UNet made for inpainting reads the image without its masked part, and latents do not give that; "
                "give the image in pixels"
            )
        if (given.paste_original or given.padding_mask_crop is not None) and output_type != "pil":
            raise ValueError(_PIL_ONLY)
        width, height = self._size(width, height)
        scale = self.vae_scale_factor
        if width % scale or height % scale or min(width, height) < 1:
            raise ValueError(f"width and height must be multiples of {scale}, not {width} x {height}")
        return Source.of(given, pipe, strength, (width, height))

    def _timesteps(self, sampling: Sampling, plan: Plan) -> tuple[Tensor, int]:
        timesteps, steps = super()._timesteps(sampling, plan)
        source = plan.call.source
        if source is None:
            return timesteps, steps
        return type(source.pipeline).get_timesteps(self, steps, source.strength, plan.canvas.device)

    def _from_image(self, call: Call, source: Source, plan: Plan, schedule: Schedule) -> ImageToImage:
        canvas, generator, per_prompt = plan.canvas, call.sampling.generator, call.size.images_per_prompt
        encoder = self.components.get("text_encoder_2") or self.components.get("text_encoder") or self.unet
        dtype, device = encoder.dtype, canvas.device  # as diffusers' text
        first = schedule.timesteps[:1].repeat(canvas.images)  # pyright: ignore[reportAttributeAccessIssue]
        pixels = source.pixels if len(source.pixels) == 1 else source.pixels.repeat_interleave(per_prompt, dim=0)
        with _precision_kept(self.vae):
            if source.mask is None:
                latents = source.pipeline.prepare_latents(
                    pixels, first, canvas.prompts, per_prompt, dtype, device, generator
                )
                return ImageToImage(latents)
            size = call.size.height, call.size.width
            inpaints = self.unet.config.in_channels == _FOR_INPAINTING
            latents, noise, *image = source.pipeline.prepare_latents(
                canvas.images, self.vae.config.latent_channels, *size, dtype, device, generator, call.sampling.latents,
                image=pixels.float(), timestep=first, is_strength_max=source.strength == 1, return_noise=True,
                return_image_latents=not inpaints,
            )  # fmt: skip
            # What is left of latents is not known, and only UNets made for inpainting read it.
            left = pixels if source.given.is_latents else pixels.float() * (source.mask < 0.5)
            mask, masked = source.pipeline.prepare_mask_latents(
                source.mask, left, canvas.images, *size, dtype, device, generator, False
            )
        channels = {"channels": torch.cat([mask, masked], dim=1)} if inpaints else {}
        return Inpainting(
            latents, channels,
            mask=mask, image=image[0] if image else None, noise=noise, timesteps=schedule.timesteps,
            add_noise=self.scheduler.add_noise,
        )  # fmt: skip

    def _finished(self, images: Any, source: Source | None) -> Any:
        """Images with what is outside of the mask pasted in, where that is asked for."""
        if source is None or source.mask is None:
            return images
        if source.crop is None and not source.given.paste_original:
            return images
        return source.given.pasted(images, source.pipeline.image_processor, source.crop)


_PIL_ONLY = "padding_mask_crop and paste_original give PIL images; leave output_type='pil'"


def _steps(arguments: Mapping[str, Any]) -> int:
    """How many steps a call asks for."""
    schedule = arguments["timesteps"] if arguments["timesteps"] is not None else arguments["sigmas"]
    return arguments["num_inference_steps"] if schedule is None else len(schedule)


@contextmanager
def _precision_kept(model: nn.Module) -> Iterator[None]:
    """Restores the precision of a model afterwards: diffusers casts a VAE to encode with it."""
    before: Any = model.dtype
    try:
        yield
    finally:
        if model.dtype != before:
            model.to(dtype=before)
