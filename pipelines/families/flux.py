"""FLUX.1 with concepts: guidance distilled into the model, or classifier-free guidance with a negative prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from lora_compose.pipelines.calls.call import GivenPrompts, images_of_each, listed
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.concepts.tags import check_no_tags
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline, for_all, real_tokens
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.images.from_image import FromImage, Source
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.text.emphasis import Weighted, has_weights, plain_text, read_emphasis
from lora_compose.pipelines.text.long_prompts import Reading
from lora_compose.pipelines.text.weighted import weighted_embeds


class FluxCalls(FlowMatchingPipeline):
    """Calls of FLUX.1 and of Kontext, which has the same components."""

    architecture = "flux-1-dev"
    transformer_class = FluxTransformer2DModel
    text_tokenizers = ("tokenizer_2",)
    reads_weights = True
    reads = (
        "prompt_2", "negative_prompt", "negative_prompt_2", "true_cfg_scale", "sigmas", "prompt_embeds",
        "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "joint_attention_kwargs",
        "max_sequence_length",
    )  # fmt: skip

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        given["max_sequence_length"] = self._readable(given["max_sequence_length"])
        if isinstance(given["prompt"], list):  # one for all, which diffusers' pipeline does not take
            given["negative_prompt"] = for_all(given["negative_prompt"], len(given["prompt"]))
        return super()._read(given)

    def _flux_request(
        self, begun: Begun, size: tuple[int, int], source: Source | None, references: Sequence[Tensor] = ()
    ) -> Request:
        """The request of a call with concepts; `size` is that of the images in pixels."""
        given, per_prompt, length = begun.given, begun.images_per_prompt, begun.given["max_sequence_length"]
        prompt, prompt_2, prompt_embeds = given["prompt"], given["prompt_2"], given["prompt_embeds"]
        negatives = given["negative_prompt"], given["negative_prompt_2"]
        self._check_inputs(begun, size)
        texts = None if prompt_embeds is not None else [listed(prompt_2 or prompt)]
        if texts is not None and len(texts[0]) != len(listed(prompt)):
            raise ValueError(f"there are {len(listed(prompt))} prompts, but {len(texts[0])} in prompt_2")
        has_negative = negatives[0] is not None or given["negative_prompt_embeds"] is not None
        guider = ClassifierFree(given["true_cfg_scale"] if has_negative else 1.0)
        prompts_given = GivenPrompts(texts, prompt_embeds, length, list(map(listed, negatives)))

        def encode(
            prompts: list[str] | None, negative: bool, device: torch.device, reading: Reading | None = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            own = prompt, prompt_2, prompt_embeds, given["pooled_prompt_embeds"]
            if negative:
                words = [for_all(text, len(prompts_given)) for text in negatives]
                own = *words, given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"]
            first, second, embeds, pooled = own if prompts is None else (prompts, None, None, None)
            read = None
            if reading is not None and embeds is None:
                read = list(map(read_emphasis, listed(second or first)))
                first = [read_emphasis(text).text for text in listed(first)]
                second = [emphasis.text for emphasis in read]
            text, pooled, _ = self.encode_prompt(
                first, prompt_2=second, device=device, num_images_per_prompt=per_prompt, prompt_embeds=embeds,
                pooled_prompt_embeds=pooled, max_sequence_length=length,
                lora_scale=(given["joint_attention_kwargs"] or {}).get("scale"),
            )  # fmt: skip
            text = text if read is None else self._weighted(text, read, per_prompt)
            mask = text.new_ones(text.shape[:2], dtype=torch.bool)
            if embeds is None:
                read = self.maybe_convert_prompt(listed(second or first), self.tokenizer_2)
                mask = real_tokens(self.tokenizer_2, read, length, per_prompt, text.device)
            return text, {"pooled_projections": pooled, "text_mask": mask}

        inputs = {"joint_attention_kwargs": given["joint_attention_kwargs"]}
        inputs |= self._distilled_guidance(given["guidance_scale"], len(prompts_given) * per_prompt)
        return self._request(
            begun, prompts_given, guider, encode, size=size, source=source, references=references, inputs=inputs
        )

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """As `ImageTasksPipeline.guided`: distilled guidance where the model has it, otherwise a second pass."""
        if not self.transformer.config.guidance_embeds:
            return {"true_cfg_scale": scale, "negative_prompt": negative_prompt or ""}
        if negative_prompt is not None:
            raise ValueError(
                "the guidance of this model is distilled into it, and there is nothing to avoid; leave the negative "
                "prompt out, or call the pipeline with true_cfg_scale"
            )
        return {"guidance_scale": scale}

    def guidance_input(self, scale: float, rows: int, device: torch.device) -> dict[str, Tensor]:
        """As `FlowMatchingPipeline.guidance_input`: of distilled guidance."""
        if not self.transformer.config.guidance_embeds:
            return {}
        return {"guidance": torch.full([rows], scale, device=device, dtype=torch.float32)}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; "pooled_projections" come from CLIP."""
        text, pooled, _ = self.encode_prompt(
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
        length, count = arguments["max_sequence_length"], images_of_each(arguments["num_images_per_prompt"])
        encoded: dict[str, Any] = {}
        for side in ("", "negative_"):
            first, second = (listed(arguments[f"{side}prompt{number}"]) for number in ("", "_2"))
            if not first:
                continue
            read = list(map(read_emphasis, second or first))
            text, pooled, _ = self.encode_prompt(
                list(map(plain_text, first)), prompt_2=[emphasis.text for emphasis in read],
                device=self._execution_device, num_images_per_prompt=count, max_sequence_length=length,
                lora_scale=(arguments["joint_attention_kwargs"] or {}).get("scale"),
            )  # fmt: skip
            encoded[f"{side}prompt_embeds"] = self._weighted(text, read, count)
            encoded[f"{side}pooled_prompt_embeds"] = pooled
        return {**arguments, **dict.fromkeys(names), **encoded, "num_images_per_prompt": 1}

    def _weighted(self, text: Tensor, read: Sequence[Weighted], images_per_prompt: int) -> Tensor:
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

    def _cfg_scale(self, step: Step) -> float:
        """`_guidance_scale` is that of the distilled guidance; a callback ends guidance as elsewhere, by 1 or less."""
        return 1.0 if self.guidance_scale <= 1 else step.cfg_scale


class ComposeFluxPipeline(FluxCalls, FluxPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `FluxPipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "FLUX.1"
    image_to_image = ImageTask(FluxImg2ImgPipeline, resizes=True)
    inpainting = ImageTask(FluxInpaintPipeline, resizes=True)

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family; Kontext's has the same names, and opens as this."""
        bare = [key.removeprefix("model.diffusion_model.") for key in keys]
        others = ("single_stream_modulation.", "distilled_guidance_layer.")  # FLUX.2 and Chroma have double blocks too
        other = any(key.startswith(others) for key in bare)
        return not other and any(key.startswith("double_blocks.") for key in bare)

    @front(FluxPipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            token_positions: Positions among the T5 tokens.
            record_attention: Maps come from the single-stream blocks.
        """
        source, size = self._source(begun)
        return self._flux_request(begun, size, source)
