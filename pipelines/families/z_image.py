"""Z-Image with concepts: the prompt in Qwen3's chat template, without padding, so that rows have their own lengths."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from torch.nn.functional import pad

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
from lora_compose.pipelines.calls.plan import Plan
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.denoising.guidance import NormLimited
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.flow_matching import Shape, TemplatePipeline, both_sides, for_each
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.images.from_image import FromImage
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.text.conditioning import Conditioning, TokenPositions
from lora_compose.pipelines.text.templates import TemplateTokenizer


class ComposeZImagePipeline(TemplatePipeline, ZImagePipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `ZImagePipeline` whose calls may name concepts."""

    family = "Z-Image"
    architecture = "z-image"
    transformer_class = ZImageTransformer2DModel
    image_to_image = ImageTask(ZImageImg2ImgPipeline, resizes=False)
    inpainting = ImageTask(ZImageInpaintPipeline, resizes=False)
    starts_from_latents = False  # diffusers' image processor of this family knows no latents

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family."""
        return any(key.removeprefix("model.diffusion_model.") == "cap_pad_token" for key in keys)

    @front
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        cfg_normalization: bool = False,
        cfg_truncation: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
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
        """Generates images, as `ComposePipeline.__call__`.

        Args:
            method: The name of a method without gradients (`lora-compose methods`), or settings.
            control: Not supported yet.
            token_positions: Positions among all tokens, those of the chat template included.
            record_attention: Maps come from the last third of the layers.
        """
        asked = dict(locals())
        begun = self._begin(asked)
        if begun.plain is not None:
            return begun.plain
        prompt = begun.prompt
        check_arguments(kwargs, (), joint_attention_kwargs, "joint_attention_kwargs")
        cfg_scale = self._cfg_of(guidance_scale)
        guider = NormLimited(cfg_scale, float(cfg_normalization), 1.0 if cfg_truncation is None else cfg_truncation)
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give a prompt or prompt_embeds, one of the two")
        if prompt_embeds is not None and cfg_scale > 1 and negative_prompt_embeds is None:
            raise ValueError("with prompt_embeds, guidance needs negative_prompt_embeds as well")
        source = self._source(begun.start, asked)
        width, height = self._sides(width, height) if source is None else source.size
        self.check_sides(width, height)
        tensors = tensors_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if unknown := {*self._of_every_task(tensors, begun.start)} - {*self._callback_tensor_inputs}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {', '.join(sorted(unknown))}; callbacks can have "
                f"{' and '.join(self._callback_tensor_inputs)}"
            )
        per_prompt, tokens = num_images_per_prompt or 1, _padded(max_sequence_length)
        embeds = None if prompt_embeds is None else _stacked(prompt_embeds, tokens)
        texts = None if prompt is None else [listed(prompt)]
        given = GivenPrompts(texts, embeds, max_sequence_length, [listed(negative_prompt)])
        call = begun.call(
            asked, given, (width, height), per_prompt, guider,
            inputs={"joint_attention_kwargs": joint_attention_kwargs},
            properties={
                "_guidance_scale": guidance_scale, "_joint_attention_kwargs": joint_attention_kwargs,
                "_cfg_normalization": cfg_normalization, "_cfg_truncation": cfg_truncation,
            },
            source=source,
            repaint={
                "guidance_scale": guidance_scale, "negative_prompt": (listed(negative_prompt) or [None])[0],
                "max_sequence_length": max_sequence_length,
            },
        )  # fmt: skip

        def encode(prompts: list[str] | None, negative: bool, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            own = (listed(prompt), prompt_embeds)
            if negative:
                own = (for_each(negative_prompt, len(given)), negative_prompt_embeds)
            words, embeds = own if prompts is None else (prompts, None)
            encode_prompt: Any = self._encode_prompt
            features = encode_prompt(
                list(words), device=device, prompt_embeds=embeds, max_sequence_length=max_sequence_length
            )
            rows = [row for row in features for _ in range(per_prompt)]
            return _stacked(rows, tokens), {"lengths": torch.tensor([len(row) for row in rows])}

        def decode(latents: Tensor, process: Process) -> tuple[Any]:
            return (self._finished(self._decode(latents, output_type or "np"), source),)

        return Request(call, partial(both_sides, encode, guided=cfg_scale > 1), decode, return_dict)

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        prompt = arguments["prompt"]
        self._check_plain_texts(prompt, arguments["negative_prompt"])
        if start is None:
            arguments["width"], arguments["height"] = self._sides(arguments["width"], arguments["height"])
        # A copy of a list, because diffusers writes into it.
        return {**arguments, "prompt": list(prompt) if isinstance(prompt, list) else prompt}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; texts keep their "lengths"."""
        encode_prompt: Any = self._encode_prompt
        rows = encode_prompt(list(prompts), device=self._execution_device, max_sequence_length=length or 512)
        return _stacked(rows, _padded(length or 512)), {"lengths": torch.tensor([len(row) for row in rows])}

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Any]:
        rows = text.conditional()
        return {"prompt_embeds": [row[:length] for row, length in zip(rows.prompt_embeds, rows.lengths, strict=True)]}

    def _template(self, length: int) -> TemplateTokenizer:
        return TemplateTokenizer(self.tokenizer, self._chat_template(enable_thinking=True), length, _padded(length))

    def _cfg_of(self, guidance_scale: float) -> float:
        return 1 + max(0.0, guidance_scale)

    def _sigmas(self, steps: int) -> Any:
        return get_default_z_image_sigmas(steps)

    def _latent_shape(self, canvas: Canvas) -> Shape:
        return canvas.images, self.transformer.in_channels, *canvas.latent_grid

    def _other_shapes(self, shape: Shape) -> Sequence[Shape]:
        return []

    def _noise(self, call: Call, plan: Plan, dtype: torch.dtype) -> Tensor:
        return super()._noise(call, plan, torch.float32)  # in any precision of the model

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self._postprocess(self.vae.decode(scaled, return_dict=False)[0], output_type)


def _padded(tokens: int) -> int:
    """How long a text of so many tokens is inside the model."""
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _stacked(rows: Sequence[Tensor], tokens: int) -> Tensor:
    """Texts of different lengths in one tensor. Shape: [rows, tokens, channels]."""
    longest = max(map(len, rows))
    if longest > tokens:
        raise ValueError(f"prompt_embeds have up to {longest} tokens; raise max_sequence_length, which allows {tokens}")
    return torch.stack([pad(row, (0, 0, 0, tokens - len(row))) for row in rows])


ComposePipeline.families.append(ComposeZImagePipeline)
