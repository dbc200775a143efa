"""The base class of the pipelines with a UNet: sizes, start noise or image, inputs of distilled models."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AsymmetricAutoencoderKL
from torch import Tensor

from lora_compose.pipelines.calls.call import Call, GivenPrompts, Sampling, check_latents, listed
from lora_compose.pipelines.calls.front import Begun
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.concepts.tags import check_no_tags
from lora_compose.pipelines.control.image_prompts import prepare_image_prompts
from lora_compose.pipelines.denoising.guidance import Embedded, Guider, Rescaled
from lora_compose.pipelines.denoising.inputs import ByImage, OnGrid
from lora_compose.pipelines.denoising.sampler import Schedule
from lora_compose.pipelines.families.image_tasks import ImageTasksPipeline, precision_kept
from lora_compose.pipelines.images.from_image import FromImage, Source
from lora_compose.pipelines.images.task import OF_INPAINTING, ImageToImage, Inpainting
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.text.emphasis import Weighted, has_weights
from lora_compose.pipelines.text.long_prompts import Reading
from lora_compose.pipelines.text.textual_inversion import TOKENIZERS
from lora_compose.pipelines.text.weighted import weighted_embeds

_FOR_INPAINTING = 9
"""Input channels of UNets that were made for inpainting: latents, mask, and latents of the masked image."""

_DIFFUSERS_INPAINTS = (4, _FOR_INPAINTING)
"""Input channels of the UNets with which diffusers inpaints."""

TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Arguments that are texts, and what the text encoders make of them."""


class UNetPipeline(ImageTasksPipeline):
    """A composing pipeline of the Stable Diffusion families."""

    old_arguments = ("callback", "callback_steps")
    attention_settings = ("scale", "ip_adapter_masks")
    reads_image_prompts = True
    of_inpainting = OF_INPAINTING
    reads_weights: ClassVar[bool] = True
    reads_in_chunks: ClassVar[bool] = True
    reads_penultimate: ClassVar[bool]
    """Whether the UNet reads the text of the layer before the last, without its norm."""

    # What diffusers' pipelines of these families have.
    prepare_latents: Any
    prepare_extra_step_kwargs: Any
    get_guidance_scale_embedding: Any
    encode_prompt: Any
    do_classifier_free_guidance: Any
    image_encoder: Any
    prepare_ip_adapter_image_embeds: Any

    @property
    def cell(self) -> int:
        """As `ImageTasksPipeline.cell`: the side of a latent cell."""
        return self.vae_scale_factor

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

    def check_start(self, call: Call, canvas: Canvas) -> None:
        """See `Host.check_start`."""
        given, source = call.sampling.latents, call.source
        if given is not None and source is not None and source.mask is None:
            raise ValueError("latents cannot be given for image-to-image, which starts from those of the image")
        channels = self.unet.config.in_channels if source is None else self.vae.config.latent_channels
        check_latents(given, (canvas.images, channels, *canvas.latent_grid))

    def _noise(self, call: Call, resolved: ResolvedCall, dtype: torch.dtype) -> Tensor:
        return self.prepare_latents(
            resolved.canvas.images, num_channels_latents=self.unet.config.in_channels, height=call.size.height,
            width=call.size.width, dtype=dtype, device=resolved.canvas.device, generator=call.sampling.generator,
            latents=call.sampling.latents,
        )  # fmt: skip

    def _step_arguments(self, sampling: Sampling) -> Mapping[str, Any]:
        return self.prepare_extra_step_kwargs(sampling.generator, eta=sampling.eta)

    def guider(self, scale: float, rescale: float = 0.0) -> Guider:
        """The guider of a call; distilled models take the scale as an input."""
        return Rescaled(scale, rescale) if self.unet.config.time_cond_proj_dim is None else Embedded()

    def _inputs(
        self, guidance_scale: float, images: int, cross_attention_kwargs: dict[str, Any] | None
    ) -> Mapping[str, Any]:
        """Further arguments of every forward pass."""
        given = {name: it for name, it in (cross_attention_kwargs or {}).items() if name != "ip_adapter_masks"}
        inputs: dict[str, Any] = {"cross_attention_kwargs": given or None}
        width = self.unet.config.time_cond_proj_dim
        if width is not None:
            embedding = self.get_guidance_scale_embedding(
                torch.tensor(guidance_scale - 1).repeat(images), embedding_dim=width
            )
            inputs["timestep_cond"] = ByImage(embedding.to(self._execution_device, self.unet.dtype))
        return inputs

    def _call(self, begun: Begun, prompts: GivenPrompts, size: tuple[int, int], source: Source | None) -> Call:
        """A call with concepts; `size` is that of the images in pixels."""
        given, images = begun.given, len(prompts) * begun.images_per_prompt
        scale, attention, adapters = given["guidance_scale"], given["cross_attention_kwargs"], given["ip_adapter_image"]
        embeds, guider = given["ip_adapter_image_embeds"], self.guider(scale, given["guidance_rescale"])
        return begun.call(
            prompts, size, guider, inputs=self._inputs(scale, images, attention),
            properties={
                "_guidance_scale": scale, "_guidance_rescale": given["guidance_rescale"],
                "_clip_skip": given["clip_skip"], "_cross_attention_kwargs": attention,
                "_denoising_end": given.get("denoising_end"),
            },
            source=source,
            repaint={
                "guidance_scale": scale, "negative_prompt": given["negative_prompt"],
                "ip_adapter_image": adapters, "ip_adapter_image_embeds": embeds,
            },
            image_prompts=prepare_image_prompts(
                self, adapters, embeds, (attention or {}).get("ip_adapter_masks"), guided=guider.scale > 1,
                images=images, size=size,
            ),
        )  # fmt: skip

    def _encoded(
        self,
        begun: Begun,
        texts: Mapping[str, Any],
        device: torch.device,
        reading: Reading | None,
        *,
        own: bool,
        own_negative: bool,
    ) -> Sequence[Any]:
        """What `encode_prompt` of diffusers returns for the prompts and negative prompts of a pass.

        Args:
            texts: By the names that `encode_prompt` has for them: prompts, then negative prompts.
            own: Whether the prompts are those of the call, of which there may be embeddings.
            own_negative: Whether the negative prompts are.
        """
        given, guided = begun.given, self.do_classifier_free_guidance
        scale = (given["cross_attention_kwargs"] or {}).get("scale")
        if reading is not None:
            return self.read_texts(
                reading, texts, begun.images_per_prompt, guided=guided, scale=scale, clip_skip=given["clip_skip"]
            )
        embeds = {
            name: given[name] if (own_negative if name.startswith("negative") else own) else None
            for name in EMBEDS if name in given
        }  # fmt: skip
        return self.encode_prompt(
            **texts, **embeds, device=device, num_images_per_prompt=begun.images_per_prompt,
            do_classifier_free_guidance=guided, lora_scale=scale, clip_skip=given["clip_skip"],
        )  # fmt: skip

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
            texts: By the names that `encode_prompt` of diffusers has for them: prompts, then negative prompts.
            images_per_prompt: Rows of each prompt.
            scale: Scale of adapters in the text encoders.

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

        def weighted(given: Sequence[Weighted]) -> Tensor:
            if clip_skip is not None or scale is not None:
                raise ValueError(
                    "weights in prompts do not go with clip_skip or with a scale in cross_attention_kwargs; leave out "
                    "one of them"
                )
            features = []
            for name, part in TOKENIZERS.items():
                if self.components.get(part) is not None:
                    text = given[min(len(features), len(given) - 1)]
                    features.append(weighted_embeds(
                        getattr(self, name), getattr(self, part), text, self._execution_device,
                        penultimate=self.reads_penultimate, expand=self.maybe_convert_prompt,
                    ))  # fmt: skip
            return torch.cat(features, dim=-1)

        return reading.encode(columns, encode, weighted, images_per_prompt)

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        """The arguments of a call without concepts, in which prompts with weights are embeddings."""
        if start is None:
            self._check_start(None)
        names = [name for name in TEXTS if isinstance(arguments.get(name), str | list)]  # others are for diffusers
        texts = {name: listed(arguments[name]) for name in names}
        check_no_tags([text for column in texts.values() for text in column])
        if not any(has_weights(text) for column in texts.values() for text in column):
            return arguments
        given = [name for name in EMBEDS if arguments.get(name) is not None]
        if given or "prompt" not in texts:
            raise ValueError(f"weights in prompts do not go with {', '.join(given) or 'embeddings'}; give the prompts")
        prompts = [column for name, column in texts.items() if not name.startswith("negative")]
        negative = [column for name, column in texts.items() if name.startswith("negative")]
        reading = Reading.of(self.tokenizers_for([]), prompts, negative)
        guided = arguments["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
        known = [name for name in TEXTS if name in arguments]
        embeds = self.read_texts(
            reading, {name: arguments[name] for name in known}, 1, guided=guided, clip_skip=arguments["clip_skip"],  # pyright: ignore[reportArgumentType]
            scale=(arguments["cross_attention_kwargs"] or {}).get("scale"),
        )  # fmt: skip
        return {**arguments, **dict.fromkeys(known), **dict(zip(EMBEDS, embeds, strict=False))}

    # Calls that start from an image.

    def runs_as_diffusers(self, inpaints: bool) -> bool:
        """As `ImageTasksPipeline.runs_as_diffusers`: diffusers inpaints with UNets of four or nine channels only."""
        return not inpaints or self.unet.config.in_channels in _DIFFUSERS_INPAINTS

    def _check_start(self, given: FromImage | None) -> None:
        """Raises ValueError for UNets made for inpainting where there is no mask, and for those of other tasks."""
        channels, latents = self.unet.config.in_channels, self.vae.config.latent_channels
        inpaints = given is not None and given.inpaints
        if channels == _FOR_INPAINTING and not inpaints:
            raise ValueError("this UNet was made for inpainting: give image=... and mask_image=...")
        if channels in (latents, _FOR_INPAINTING):
            return
        if inpaints:
            raise ValueError(
                f"a UNet with {channels} input channels cannot inpaint with a VAE of {latents} channels; expected "
                f"{latents}, or {_FOR_INPAINTING} for a UNet made for inpainting"
            )
        raise ValueError(
            f"a UNet with {channels} input channels cannot be used with a VAE of {latents} channels; expected "
            f"{latents}: this one reads more than the noisy image, as InstructPix2Pix's does, for which diffusers has "
            "another pipeline"
        )

    def _check_composed(self, given: FromImage) -> None:
        if not given.inpaints:
            return
        if isinstance(self.vae, AsymmetricAutoencoderKL):
            raise ValueError(
                "inpainting with concepts does not support AsymmetricAutoencoderKL; use the model's own VAE"
            )
        if self.unet.config.in_channels == _FOR_INPAINTING and given.is_latents:
            raise ValueError(
                "a UNet made for inpainting reads the image without its masked part, and latents do not give that; "
                "give the image in pixels"
            )

    def cells_of(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents as callbacks have them, in their height and width; `size` is that of the image in pixels."""
        return latents

    def pixels_of(self, cells: Tensor) -> Tensor:
        """Latents decoded by the VAE, from -1 to 1."""
        return self.vae.decode(cells / self.vae.config.scaling_factor, return_dict=False)[0]

    def _from_image(self, call: Call, source: Source, resolved: ResolvedCall, schedule: Schedule) -> ImageToImage:
        canvas, generator = resolved.canvas, call.sampling.generator
        dtype, device = self._text_dtype, canvas.device
        first = schedule.timesteps[:1].repeat(canvas.images)  # pyright: ignore[reportAttributeAccessIssue]
        pixels = self._by_image(call, source.pixels)
        diffusers_own: Any = source.pipeline  # families prepare latents in their own ways
        with precision_kept(self.vae):
            if source.mask is None:
                latents = diffusers_own.prepare_latents(
                    pixels, timestep=first, batch_size=canvas.prompts, num_images_per_prompt=canvas.images_per_prompt,
                    dtype=dtype, device=device, generator=generator,
                )  # fmt: skip
                return ImageToImage(latents)
            white = self._by_image(call, source.mask)
            how = {
                "height": call.size.height, "width": call.size.width, "dtype": dtype, "device": device,
                "generator": generator,
            }  # fmt: skip
            inpaints = self.unet.config.in_channels == _FOR_INPAINTING
            latents, noise, *image = diffusers_own.prepare_latents(
                canvas.images, num_channels_latents=self.vae.config.latent_channels, latents=call.sampling.latents,
                image=pixels.float(), timestep=first, is_strength_max=source.strength == 1, return_noise=True,
                return_image_latents=not inpaints, **how,
            )  # fmt: skip
            # What is left of latents is not known, and only UNets made for inpainting read it.
            left = pixels if source.given.is_latents else pixels.float() * (white < 0.5)
            mask, masked = diffusers_own.prepare_mask_latents(
                white, masked_image=left, batch_size=canvas.images, do_classifier_free_guidance=False, **how
            )
        channels = {"channels": OnGrid(torch.cat([mask, masked], dim=1))} if inpaints else {}
        return Inpainting(
            latents, channels,
            mask=mask, masked=masked, image=image[0] if image else None, noise=noise, timesteps=schedule.timesteps,
        )  # fmt: skip
