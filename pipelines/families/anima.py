"""Anima with concepts: Cosmos Predict2 reads what a text conditioner makes of Qwen3's states at the tokens of a T5.

diffusers has Anima as a modular pipeline only. Ours has the same components; a call without concepts is the modular
pipeline's own.
"""

import copy
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CosmosTransformer3DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import AnimaLoraLoaderMixin
from diffusers.modular_pipelines import ModularPipeline
from diffusers.modular_pipelines.anima import AnimaAutoBlocks, AnimaModularPipeline
from diffusers.modular_pipelines.anima.before_denoise import get_timesteps
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from diffusers.utils import is_torchvision_available
from torch import Tensor, nn

from lora_compose.attention.backbones.cosmos import with_padding_mask
from lora_compose.attention.device import uncompiled
from lora_compose.pipelines.calls.call import Call
from lora_compose.pipelines.calls.front import Begun, Request, arguments_with, front
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.denoising.sampler import Schedule
from lora_compose.pipelines.families.flow_matching import Shape, for_images
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.families.modular import ModularFamilyPipeline
from lora_compose.pipelines.families.video_vae import VideoVaePipeline
from lora_compose.pipelines.images.from_image import FromImage, Source
from lora_compose.pipelines.images.task import ImageToImage
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.text.templates import TemplateTokenizer


class AnimaImageToImage:
    """diffusers' image-to-image, which it has as blocks only, with what is used of its pipelines for other families."""

    def __init__(self, vae: Any, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.vae_scale_factor = 2 ** len(vae.temperal_downsample)
        self.image_processor = VaeImageProcessor(vae_scale_factor=8)

    def get_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> tuple[Tensor, int]:
        """The timesteps that a strength leaves, and the number of steps."""
        timesteps, steps = get_timesteps(self.scheduler, num_inference_steps=num_inference_steps, strength=strength)
        return timesteps.to(device), steps


class ComposeAnimaPipeline(VideoVaePipeline, ModularFamilyPipeline, AnimaLoraLoaderMixin):
    """The components of diffusers' `AnimaModularPipeline`, in calls that may name concepts.

    Args:
        tokenizer: The tokenizer of the text encoder.
        text_encoder: Qwen3.
        t5_tokenizer: T5's, whose tokens are the positions that the transformer reads; there is no T5.
        text_conditioner: Makes the text of the transformer from both.
        transformer: The denoiser.
        vae: Qwen-Image's VAE, for videos of one frame.
    """

    family = "Anima"
    architecture = "anima"
    modular_class = AnimaModularPipeline
    transformer_class = CosmosTransformer3DModel
    image_to_image = ImageTask(AnimaImageToImage, resizes=True)
    text_tokenizers = ("t5_tokenizer",)
    model_cpu_offload_seq = "text_encoder->text_conditioner->transformer->vae"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        t5_tokenizer: Any,
        text_conditioner: Any,
        transformer: Any,
        vae: Any,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, t5_tokenizer=t5_tokenizer,
            text_conditioner=text_conditioner, transformer=transformer, vae=vae, scheduler=scheduler,
        )  # fmt: skip
        self.vae_scale_factor = 2 ** len(vae.temperal_downsample)
        self.image_processor = VaeImageProcessor(vae_scale_factor=8)

    @classmethod
    def _blocks(cls) -> Any:
        return AnimaAutoBlocks()

    @classmethod
    def save_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: dict[str, nn.Module | Tensor],
        transformer_lora_adapter_metadata: dict[str, Any],
    ) -> None:
        """Writes a LoRA of the transformer as diffusers' other pipelines do; for Anima it reads files only."""
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            is_main_process=True,
            weight_name=None,  # pyright: ignore[reportArgumentType]
            save_function=None,  # pyright: ignore[reportArgumentType]
            safe_serialization=True,
        )

    @front(
        arguments_with(
            prompt=None, negative_prompt=None, height=None, width=None, num_inference_steps=50, sigmas=None,
            guidance_scale=4.0, num_images_per_prompt=1, generator=None, latents=None, output_type="pil",
            return_dict=True, callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",),
            max_sequence_length=512,
        )
    )  # fmt: skip
    def __call__(self, begun: Begun) -> Request:
        """Generates images; arguments are the inputs of diffusers' modular pipeline, and `guidance_scale` its guider's.

        Latents have the shape [images, channels, height, width]; with a frame axis of 1, as diffusers has them, they
        are taken too.

        Args:
            guidance_scale: 1 is no guidance. Less than 1 is for calls without concepts.
            callback_on_step_end: For calls with concepts; modular pipelines have no callbacks.
            max_sequence_length: To how many tokens prompts are cut; with concepts at most what the conditioner pads to.
            token_positions: Refused, since there are no prompt embeddings to give.
            record_attention: Maps come from the last third of the blocks.
            image: What image-to-image starts from: a PIL image, a path, an array, a tensor, or one for each prompt. It
                is resized to width and height.
            mask_image: Refused, as are `padding_mask_crop` and `paste_original`: diffusers has no inpainting for this
                family.
        """
        given = begun.given
        self._check_composed_arguments(given, given["guidance_scale"])
        # Longer texts are not padded: then an image's texts would have as many tokens as their words.
        length = min(given["max_sequence_length"], self.text_conditioner.config.min_sequence_length)
        source, size = self._source(begun)

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            return for_images(self.read_texts(words, length), begun.images_per_prompt)

        guider = ClassifierFree(given["guidance_scale"])
        return self._text_request(begun, begun.prompts(length), guider, encode, size=size, source=source)

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        return given  # diffusers has a size of its own

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        latents = arguments["latents"]
        if latents is not None and latents.dim() == 4:
            arguments["latents"] = latents[:, :, None]
        if start is not None:  # diffusers looks at the size of images from text alone
            self.check_sides(*self._sides(arguments["width"], arguments["height"]))
        return super()._plain_arguments(arguments, start)

    def _prepare_plain(self, pipe: ModularPipeline) -> None:
        if not is_torchvision_available():
            pipe.update_components(transformer=_without_torchvision(uncompiled(self.transformer)))

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; the conditioner pads short texts with zeros, which are read."""
        device, block, cut = self._execution_device, AnimaTextEncoderStep, length or 512
        components: Any = self
        reading = {"prompt": list(prompts), "max_sequence_length": cut, "device": device}
        states, seen = block._get_qwen_prompt_embeds(components, **reading, dtype=self.text_encoder.dtype)
        ids, mask = block._get_t5_prompt_ids(components, **reading)
        text = self.text_conditioner(
            source_hidden_states=states.to(self.text_conditioner.dtype), target_input_ids=ids,
            target_attention_mask=mask, source_attention_mask=seen,
        )  # fmt: skip
        return text.to(self.transformer.dtype), {}

    def _template(self, length: int) -> TemplateTokenizer:
        most = self.text_conditioner.config.min_sequence_length
        return TemplateTokenizer(self.t5_tokenizer, str, min(length, most), most)

    def _shift(self, tokens: int, steps: int) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None  # the scheduler's own, whatever the size

    def _latent_shape(self, canvas: Canvas) -> Shape:
        return canvas.images, self.transformer.config.in_channels, *canvas.latent_grid

    def _drawn(self, shape: Shape) -> Shape:
        return *shape[:2], 1, *shape[2:]  # with a frame axis

    def _other_shapes(self, shape: Shape) -> Sequence[Shape]:
        return [self._drawn(shape)]

    def _cells(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return latents if latents.dim() == 4 else latents[:, :, 0]

    def _noise(self, call: Call, resolved: ResolvedCall, dtype: torch.dtype) -> Tensor:
        return super()._noise(call, resolved, torch.float32)  # in any precision of the model

    def _from_image(self, call: Call, source: Source, resolved: ResolvedCall, schedule: Schedule) -> ImageToImage:
        """As diffusers' blocks do it: in fp32."""
        latents = self.latents_of(source.pixels.to(resolved.canvas.device)).float()
        noise = self._noise(call, resolved, torch.float32)
        image, first = self._by_image(call, latents).expand_as(noise), schedule.timesteps[0]
        return ImageToImage(self.scheduler.scale_noise(image, first.repeat(len(noise)), noise))

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        width, height = super()._size(width, height)
        config = self.transformer.config
        patches = max(most // patch for most, patch in zip(config.max_size, config.patch_size, strict=True))
        longest = self.vae_scale_factor * config.patch_size[-1] * patches  # of diffusers' rotary embedding
        if max(width, height) > longest:
            raise ValueError(f"this model makes images of at most {longest} pixels a side, not {width} x {height}")
        return width, height

    def _returned(self, latents: Tensor) -> Tensor:
        return latents[:, :, None]


def _without_torchvision(model: Any) -> Any:
    """A transformer that gets its padding mask as a channel, which diffusers resizes with torchvision."""
    if not model.config.concat_padding_mask:
        return model
    if "forward" in vars(model):
        raise ValueError("an offloaded Anima needs torchvision in calls without concepts; install it")
    view = copy.copy(model)
    view._forward_pre_hooks = OrderedDict(model._forward_pre_hooks)
    view._forward_pre_hooks_with_kwargs = OrderedDict(model._forward_pre_hooks_with_kwargs)
    view.register_to_config(concat_padding_mask=False)

    def add(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**options, "hidden_states": with_padding_mask(model, options["hidden_states"])}

    view.register_forward_pre_hook(add, with_kwargs=True)
    return view
