"""Z-Image with concepts: the prompt in Qwen3's chat template, without padding, so that rows have their own lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from torch.nn.functional import pad

from lora_compose.pipelines.calls.call import Call, GivenPrompts
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.denoising.guidance import NormLimited
from lora_compose.pipelines.families.flow_matching import Shape, TemplatePipeline
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.images.from_image import FromImage
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.templates import TemplateTokenizer


class ComposeZImagePipeline(TemplatePipeline, ZImagePipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `ZImagePipeline` whose calls may name concepts."""

    family = "Z-Image"
    reads = (
        "sigmas", "cfg_normalization", "cfg_truncation", "negative_prompt", "prompt_embeds", "negative_prompt_embeds",
        "joint_attention_kwargs", "max_sequence_length",
    )  # fmt: skip
    architecture = "z-image"
    transformer_class = ZImageTransformer2DModel
    image_to_image = ImageTask(ZImageImg2ImgPipeline, resizes=False)
    inpainting = ImageTask(ZImageInpaintPipeline, resizes=False)
    starts_from_latents = False  # diffusers' image processor of this family knows no latents

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family."""
        return any(key.removeprefix("model.diffusion_model.") == "cap_pad_token" for key in keys)

    @front(ZImagePipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Args:
            token_positions: Positions among all tokens, those of the chat template included.
            record_attention: Maps come from the last third of the layers.
        """
        given, length = begun.given, begun.given["max_sequence_length"]
        prompt, prompt_embeds = given["prompt"], given["prompt_embeds"]
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give a prompt or prompt_embeds, one of the two")
        scale, truncation = self._cfg_of(given["guidance_scale"]), given["cfg_truncation"]
        if prompt_embeds is not None and scale > 1 and given["negative_prompt_embeds"] is None:
            raise ValueError("with prompt_embeds, guidance needs negative_prompt_embeds as well")
        source, size = self._source(begun)
        if unknown := {*self._of_every_task(begun.tensors, begun.start)} - {*self._callback_tensor_inputs}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {', '.join(sorted(unknown))}; callbacks can have "
                f"{' and '.join(self._callback_tensor_inputs)}"
            )
        tokens = _padded(length)
        embeds = None if prompt_embeds is None else _stacked(prompt_embeds, tokens)
        prompts_given = begun.prompts(length, embeds)

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            # A copy of the texts, because diffusers writes into them.
            features = self._encode_prompt(
                list(words or ()), device=device, prompt_embeds=embeds, max_sequence_length=length
            )
            rows = [row for row in features for _ in range(begun.images_per_prompt)]
            return _stacked(rows, tokens), {"lengths": torch.tensor([len(row) for row in rows])}

        normalization = float(given["cfg_normalization"])
        return self._text_request(
            begun, prompts_given, NormLimited(scale, normalization, 1.0 if truncation is None else truncation), encode,
            size=size, source=source, inputs={"joint_attention_kwargs": given["joint_attention_kwargs"]},
            properties={"_cfg_normalization": given["cfg_normalization"], "_cfg_truncation": truncation},
        )  # fmt: skip

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        size = self._sides(width, height)
        self.check_sides(*size)
        return size

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        prompt = arguments["prompt"]
        self._check_plain_texts(prompt, arguments["negative_prompt"])
        # A copy of a list, because diffusers writes into it.
        return {**arguments, "prompt": list(prompt) if isinstance(prompt, list) else prompt}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; texts keep their "lengths"."""
        rows = self._encode_prompt(list(prompts), device=self._execution_device, max_sequence_length=length or 512)
        return _stacked(rows, _padded(length or 512)), {"lengths": torch.tensor([len(row) for row in rows])}

    def _check_negative_embeds(self, given: GivenPrompts, embeds: Any) -> None:
        """Checks the number of negative embeddings alone, since each may have its own length."""
        if len(embeds) != len(given):
            raise ValueError(f"negative_prompt_embeds are for {len(embeds)} prompts, and there are {len(given)}")

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

    def _noise(self, call: Call, resolved: ResolvedCall, dtype: torch.dtype) -> Tensor:
        return super()._noise(call, resolved, torch.float32)  # in any precision of the model

    def _returned(self, latents: Tensor) -> Tensor:
        return latents

    def _scaled(self, latents: Tensor) -> Tensor:
        return super()._scaled(latents.to(self.vae.dtype))


def _padded(tokens: int) -> int:
    """How long a text of so many tokens is inside the model."""
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _stacked(rows: Sequence[Tensor], tokens: int) -> Tensor:
    """Texts of different lengths in one tensor. Shape: [rows, tokens, channels]."""
    longest = max(map(len, rows))
    if longest > tokens:
        raise ValueError(f"prompt_embeds have up to {longest} tokens; raise max_sequence_length, which allows {tokens}")
    return torch.stack([pad(row, (0, 0, 0, tokens - len(row))) for row in rows])
