"""FLUX.1 with concepts: guidance distilled into the model, or classifier-free guidance with a negative prompt."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from lora_compose.pipelines.calls.call import (
    Concepts,
    Generators,
    GivenPrompts,
    check_arguments,
    listed,
    tensors_for,
)
from lora_compose.pipelines.calls.front import Begun, Plain, Request, front
from lora_compose.pipelines.concepts.tags import check_no_tags
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.flow_matching import (
    FlowMatchingPipeline,
    both_sides,
    check_negative_embeds,
    real_tokens,
)
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.images.from_image import FromImage, Source
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.text.conditioning import TokenPositions
from lora_compose.pipelines.text.emphasis import Emphasis, has_weights, plain_text, read_emphasis
from lora_compose.pipelines.text.long_prompts import Reading
from lora_compose.pipelines.text.weighted import weighted_embeds


class FluxCalls(FlowMatchingPipeline):
    """Calls of FLUX.1 and of Kontext, which has the same components."""

    architecture = "flux-1-dev"
    transformer_class = FluxTransformer2DModel
    text_tokenizers = ("tokenizer_2",)
    reads_weights = True

    def _request(
        self,
        begun: Begun,
        given: Mapping[str, Any],
        size: tuple[int, int],
        source: Source | None = None,
        references: Sequence[Tensor] = (),
    ) -> Request:
        """The request of a call with concepts.

        Args:
            given: The arguments of `__call__`, by name.
            size: Width and height of the images, in pixels.
        """
        prompt, prompt_2, (width, height) = begun.prompt, given["prompt_2"], size
        negative_prompt, negative_prompt_2 = given["negative_prompt"], given["negative_prompt_2"]
        prompt_embeds, pooled_prompt_embeds = given["prompt_embeds"], given["pooled_prompt_embeds"]
        negative_prompt_embeds = given["negative_prompt_embeds"]
        negative_pooled_prompt_embeds = given["negative_pooled_prompt_embeds"]
        true_cfg_scale, guidance_scale = given["true_cfg_scale"], given["guidance_scale"]
        joint_attention_kwargs, callback_on_step_end = given["joint_attention_kwargs"], given["callback_on_step_end"]
        max_sequence_length, output_type = given["max_sequence_length"], given["output_type"] or "np"
        ip_adapters = [given[f"{side}ip_adapter_image{kind}"] for side in ("", "negative_") for kind in ("", "_embeds")]
        check_arguments(given["kwargs"], ip_adapters, joint_attention_kwargs, "joint_attention_kwargs")
        tensors = tensors_for(callback_on_step_end, given["callback_on_step_end_tensor_inputs"])
        self.check_inputs(
            prompt, prompt_2=prompt_2, height=height, width=width, negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds, callback_on_step_end_tensor_inputs=tensors,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
        texts = None if prompt_embeds is not None else [listed(prompt_2 or prompt)]
        if texts is not None and len(texts[0]) != len(listed(prompt)):
            raise ValueError(f"there are {len(listed(prompt))} prompts, but {len(texts[0])} in prompt_2")
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        cfg_scale = true_cfg_scale if has_negative else 1.0
        per_prompt = given["num_images_per_prompt"] or 1
        negatives = [listed(negative_prompt), listed(negative_prompt_2)]
        prompts_given = GivenPrompts(texts, prompt_embeds, max_sequence_length, negatives)
        check_negative_embeds(prompts_given, negative_prompt_embeds if cfg_scale > 1 else None)
        images = len(prompts_given) * per_prompt
        call = begun.call(
            given, prompts_given, size, per_prompt, ClassifierFree(cfg_scale),
            inputs=self._inputs(guidance_scale, images, joint_attention_kwargs),
            properties={
                "_guidance_scale": guidance_scale, "_joint_attention_kwargs": joint_attention_kwargs,
                "_current_timestep": None,
            },
            source=source,
            repaint={
                "guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale,
                "negative_prompt": None if negative_prompt is None else listed(negative_prompt)[0],
                "max_sequence_length": max_sequence_length,
            },
            references=references,
        )  # fmt: skip

        def encode(
            prompts: list[str] | None, negative: bool, device: torch.device, reading: Reading | None = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            own = prompt, prompt_2, prompt_embeds, pooled_prompt_embeds
            if negative:
                words = [for_all(text, len(prompts_given)) for text in (negative_prompt, negative_prompt_2)]
                own = *words, negative_prompt_embeds, negative_pooled_prompt_embeds
            first, second, embeds, pooled = own if prompts is None else (prompts, None, None, None)
            read = None
            if reading is not None and embeds is None:
                texts_read = enumerate(listed(second or first))
                read = [reading.emphasis(text, i, derived=not negative) for i, text in texts_read]
                first, second = list(map(plain_text, listed(first))), [emphasis.text for emphasis in read]
            encode_prompt: Any = self.encode_prompt  # its annotations know no plain tensors
            text, pooled, _ = encode_prompt(
                first, prompt_2=second, device=device, num_images_per_prompt=per_prompt, prompt_embeds=embeds,
                pooled_prompt_embeds=pooled, max_sequence_length=max_sequence_length,
                lora_scale=(joint_attention_kwargs or {}).get("scale"),
            )  # fmt: skip
            text = text if read is None else self._weighted(text, read, per_prompt)
            mask = text.new_ones(text.shape[:2], dtype=torch.bool)
            if embeds is None:
                read = self.maybe_convert_prompt(listed(second or first), self.tokenizer_2)
                mask = real_tokens(self.tokenizer_2, read, max_sequence_length, per_prompt, text.device)
            return text, {"pooled_projections": pooled, "text_mask": mask}

        def decode(latents: Tensor, process: Process) -> tuple[Any]:
            return (self._finished(self._decode(latents, output_type), source),)

        return Request(call, partial(both_sides, encode, guided=cfg_scale > 1), decode, given["return_dict"])

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """As `FlowMatchingPipeline.guided`: distilled guidance where the model has it, otherwise a second pass."""
        if not self.transformer.config.guidance_embeds:
            return {"true_cfg_scale": scale, "negative_prompt": negative_prompt or ""}
        if negative_prompt is not None:
            raise ValueError(
                "the guidance of this model is distilled into it, and there is nothing to avoid; leave the negative "
                "prompt out, or call the pipeline with true_cfg_scale"
            )
        return {"guidance_scale": scale}

    def inputs_without_guidance(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """As `FlowMatchingPipeline.inputs_without_guidance`: the distilled guidance is 1."""
        return {"guidance": torch.ones(rows, device=device)} if self.transformer.config.guidance_embeds else {}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; "pooled_projections" come from CLIP."""
        encode_prompt: Any = self.encode_prompt
        text, pooled, _ = encode_prompt(
            list(prompts), device=self._execution_device, max_sequence_length=self._readable(length or 512)
        )
        return text, {"pooled_projections": pooled}

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        """The arguments of a call without concepts; prompts with weights become embeddings, others stay as they are."""
        names = [f"{side}prompt{number}" for side in ("", "negative_") for number in ("", "_2")]
        texts = [text for name in names if isinstance(arguments[name], str | list) for text in listed(arguments[name])]
        check_no_tags(texts)
        if not any(map(has_weights, texts)):
            return arguments
        embeds = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
        if given := [name for name in embeds if arguments[name] is not None]:
            raise ValueError(f"weights in prompts do not go with {', '.join(given)}; give the prompts")
        length, count = arguments["max_sequence_length"], arguments["num_images_per_prompt"] or 1
        encoded: dict[str, Any] = {}
        for side in ("", "negative_"):
            first, second = (listed(arguments[f"{side}prompt{number}"]) for number in ("", "_2"))
            if not first:
                continue
            read = list(map(read_emphasis, second or first))
            encode_prompt: Any = self.encode_prompt
            text, pooled, _ = encode_prompt(
                list(map(plain_text, first)), prompt_2=[emphasis.text for emphasis in read],
                device=self._execution_device, num_images_per_prompt=count, max_sequence_length=length,
                lora_scale=(arguments["joint_attention_kwargs"] or {}).get("scale"),
            )  # fmt: skip
            encoded[f"{side}prompt_embeds"] = self._weighted(text, read, count)
            encoded[f"{side}pooled_prompt_embeds"] = pooled
        return {**arguments, **dict.fromkeys(names), **encoded, "num_images_per_prompt": 1}

    def _weighted(self, text: Tensor, read: Sequence[Emphasis], images_per_prompt: int) -> Tensor:
        """T5's features with those texts encoded anew that have weights; CLIP's pooled text has none."""
        features = text.clone()
        for i, emphasis in enumerate(read):
            if not emphasis.is_even:
                features[i * images_per_prompt : (i + 1) * images_per_prompt] = weighted_embeds(
                    self.tokenizer_2, self.text_encoder_2, emphasis, text.device, penultimate=False,
                    expand=self.maybe_convert_prompt, length=text.shape[1],
                ).to(text)  # fmt: skip
        return features

    def _readable(self, length: int) -> int:
        """Tokens to which texts are padded, at most the T5's own maximum; that of the playground is short."""
        return length if self.tokenizer_2 is None else min(length, self.tokenizer_2.model_max_length)

    def _inputs(
        self, guidance_scale: float, images: int, joint_attention_kwargs: dict[str, Any] | None
    ) -> Mapping[str, Any]:
        """Further arguments of every forward pass."""
        inputs: dict[str, Any] = {"joint_attention_kwargs": joint_attention_kwargs}
        if self.transformer.config.guidance_embeds:
            scale = torch.full([images], guidance_scale, device=self._execution_device, dtype=torch.float32)
            inputs["guidance"] = ByImage(scale)
        return inputs

    def _cfg_scale(self, step: Step) -> float:
        """`_guidance_scale` is that of the distilled guidance; a callback ends guidance as elsewhere, by 1 or less."""
        return 1.0 if self.guidance_scale <= 1 else step.cfg_scale


def for_all(text: str | list[str] | None, count: int) -> list[str] | None:
    """A text for each of so many prompts; one is for all."""
    if text is None:
        return None
    texts = listed(text)
    return (texts * count if len(texts) == 1 else texts) or None


class ComposeFluxPipeline(FluxCalls, FluxPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `FluxPipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "FLUX.1"
    image_to_image = ImageTask(FluxImg2ImgPipeline, resizes=True)
    inpainting = ImageTask(FluxInpaintPipeline, resizes=True)

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family."""
        bare = [key.removeprefix("model.diffusion_model.") for key in keys]
        others = ("single_stream_modulation.", "distilled_guidance_layer.")  # FLUX.2 and Chroma have double blocks too
        other = any(key.startswith(others) for key in bare)
        return not other and any(key.startswith("double_blocks.") for key in bare)

    @front
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
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

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            method: The name of a method without gradients (`lora-compose methods`), or settings.
            control: Not supported yet.
            token_positions: Positions among the T5 tokens.
            record_attention: Maps come from the last third of the double-stream blocks.
        """
        max_sequence_length = self._readable(max_sequence_length)
        if isinstance(prompt, list):  # one for all, which diffusers' pipeline does not take
            negative_prompt = for_all(negative_prompt, len(prompt))
        width, height = self._sides(width, height)
        given = dict(locals())
        begun = self._begin(given)
        if begun.plain is not None:
            return begun.plain
        source = self._source(begun.start, given)
        size = self._size(width, height) if source is None else source.size
        return self._request(begun, given, size, source)


ComposePipeline.families.append(ComposeFluxPipeline)
