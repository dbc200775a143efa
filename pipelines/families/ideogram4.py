"""Ideogram 4 with concepts: a second network for guidance, a scale for every step, 13 layers of Qwen3-VL as text."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from torch import Tensor

from lora_compose.attention import Backbone
from lora_compose.attention.backbones.ideogram4 import Ideogram4Backbone, from_tokens, tokens_of
from lora_compose.attention.device import dtype_of, uncompiled
from lora_compose.pipelines.calls.call import Call, GivenPrompts, Sampling, listed
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.denoising.guidance import ScaleByStep
from lora_compose.pipelines.families.flow_matching import Shape, TemplatePipeline, for_images
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.scene.scene import Concept, ConceptNames
from lora_compose.pipelines.text.layout_captions import text_of, with_boxes
from lora_compose.pipelines.text.templates import TemplateTokenizer


class ComposeIdeogram4Pipeline(TemplatePipeline, Ideogram4Pipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `Ideogram4Pipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "Ideogram 4"
    reads = (
        "guidance_schedule", "mu", "std", "prompt_upsampling", "prompt_upsampling_temperature", "max_sequence_length",
        "attention_kwargs",
    )  # fmt: skip
    architecture = "ideogram-4"
    transformer_class = Ideogram4Transformer2DModel
    native_side = 2048
    _guidance_schedule: tuple[float, ...] = ()
    """Scales of the call in progress, by step."""

    @front(Ideogram4Pipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images; all arguments of diffusers' pipeline keep their meaning.

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            guidance_schedule: With concepts, scales that are all below 1 are refused; 1 is without guidance.
            prompt_upsampling: Cannot be combined with concepts: call `upsample_prompt` first, and give its result.
            token_positions: Positions among all tokens, those of the chat template included.
            record_attention: Maps come from the last third of the layers.
            image: Refused, as are the four arguments after it: diffusers has no image-to-image for this family.
        """
        given, tokens = begun.given, begun.given["max_sequence_length"]
        steps, size = given["num_inference_steps"], (given["width"], given["height"])
        self._check_inputs(begun, size)
        if given["prompt_upsampling"]:
            raise ValueError(
                "prompt_upsampling cannot be combined with concepts, whose words have to be in the prompt: call "
                "pipe.upsample_prompt(...) first, and give its result as the prompt"
            )
        constant = [given["guidance_scale"] or 0.0] * steps
        scales = constant if given["guidance_schedule"] is None else given["guidance_schedule"]
        guider = ScaleByStep(tuple(map(float, scales)))
        if guider.scale <= 1 and min(guider.scales) < 1:
            raise ValueError(
                f"guidance below 1 in every step cannot be combined with concepts, but the scales are {guider.scales}; "
                "1 is without guidance"
            )
        texts, per_prompt = listed(given["prompt"]), begun.images_per_prompt
        mu = _resolution_aware_mu(given["height"], given["width"], given["mu"])
        sigmas = _logit_normal_sigmas(steps, mu, given["std"]).tolist()

        def encode(prompts: list[str] | None, negative: bool, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            if not negative:
                return for_images(self._encoded(texts if prompts is None else prompts, tokens, device), per_prompt)
            if any(prompts or ()):
                raise ValueError(f"{self.family} reads no negative prompts; leave them out")
            images = len(texts) * per_prompt
            text = torch.zeros((), device=device, dtype=dtype_of(uncompiled(self.transformer)))
            return text.expand(images, tokens, self.transformer.config.llm_features_dim), {
                "text_mask": torch.zeros(images, tokens, dtype=torch.bool, device=device),
                "unconditional": torch.ones(images, dtype=torch.bool),
            }

        return self._request(
            replace(begun, given={**given, "sigmas": sigmas}), GivenPrompts([texts], None, tokens), guider, encode,
            size=size, inputs={"attention_kwargs": given["attention_kwargs"]},
            properties={"_guidance_schedule": guider.scales},
        )  # fmt: skip

    def boxes_in_prompt(
        self, prompt: str, concepts: ConceptNames, width: int = 2048, height: int = 2048
    ) -> tuple[str, list[Concept]]:
        """A prompt in JSON that has the boxes of concepts, and the concepts with such prompts of their own.

        The model then draws by the boxes that also gate the LoRAs: `pipe(prompt, concepts=concepts)`.

        Args:
            prompt: Plain text, or a caption in the model's JSON, e.g. of `upsample_prompt`.
            concepts: A concept set, as for `__call__`; those without a box are left as they are.
            width: Of the image, in pixels.
            height: As `width`.

        Raises:
            ValueError: If no concept has a box, one has a mask image, or the prompt says nothing about one.
        """
        known = [loaded.concept for loaded in self.resolve_concepts(concepts)]
        placed = [concept for concept in known if concept.region is not None]
        if not placed:
            raise ValueError(
                'there is no box to write into the prompt; give concepts a region, {"cat": (0, 0, 900, 900)}'
            )
        if masks := [concept.name for concept in placed if isinstance(concept.region, str)]:
            raise ValueError(f"{masks[0]!r} has a mask image, and the model's prompts have boxes; give it a box")
        texts = {it.name: with_boxes(text_of(it, prompt, placed), [it], width, height) for it in placed}
        named = [concept.model_copy(update={"prompt": texts.get(concept.name, concept.prompt)}) for concept in known]
        return with_boxes(prompt, placed, width, height), named

    def backbone_of(self, call: Call) -> Backbone:
        """The backbone of a call, with the network for its unconditional rows."""
        return Ideogram4Backbone(self.transformer, self.unconditional_transformer)

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """As `ImageTasksPipeline.guided`; the scale is the same for all steps."""
        if negative_prompt is not None:
            raise ValueError(f"{self.family} reads no negative prompt; leave it out")
        return {"guidance_scale": max(1.0, scale), "guidance_schedule": None}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`."""
        return self._encoded(prompts, length or 512, self._execution_device)

    def encode_prompt(
        self, prompt: str | list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encodes prompts as diffusers does, also with a text encoder that is offloaded layer by layer.

        diffusers moves tokens to where the text encoder's weights are, and then calls its layers one by one. Weights
        that are offloaded by layer are nowhere between calls.
        """
        given: Any = self
        if self.text_encoder.device.type == "meta":
            given = copy.copy(self)
            vars(given)["text_encoder"] = SimpleNamespace(
                language_model=self.text_encoder.language_model, device=device
            )
        return Ideogram4Pipeline.encode_prompt(
            given, prompt, grid_h=grid_h, grid_w=grid_w, max_sequence_length=max_sequence_length, device=device
        )

    def _encoded(self, words: Sequence[str], tokens: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Texts with their padding behind them; diffusers has it before them, where it is masked as well."""
        text, _, segments, _ = self.encode_prompt(
            list(words), grid_h=0, grid_w=0, max_sequence_length=tokens, device=device
        )
        lengths = (segments == 1).sum(dim=1)
        rows = [row.roll(length, 0) for row, length in zip(text, lengths.tolist(), strict=True)]
        return torch.stack(rows).to(dtype_of(uncompiled(self.transformer))), {
            "text_mask": torch.arange(tokens, device=device) < lengths[:, None],
            "unconditional": torch.zeros(len(text), dtype=torch.bool),
        }

    def latents_of(self, pixels: Tensor) -> Tensor:
        """As `FlowMatchingPipeline.latents_of`; the channels of patches are normalised as the VAE's last layer says."""
        means = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        mean, deviation = self._norm(means)
        return from_tokens((tokens_of(means) - mean) / deviation, means.shape[-2:])

    def _cells(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return latents if latents.dim() == 4 else from_tokens(latents, grid)

    def _template(self, length: int) -> TemplateTokenizer:
        def render(prompt: str) -> str:
            message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
            return self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

        return TemplateTokenizer(self.tokenizer, render, length, length, adds_special=False, pads=False)

    def _timesteps(self, scheduler: Any, sampling: Sampling, canvas: Canvas) -> tuple[Tensor, int]:
        scheduler.set_timesteps(sigmas=sampling.sigmas, device=canvas.device)
        return scheduler.timesteps, len(scheduler.timesteps)

    def _drawn(self, shape: Shape) -> Shape:
        (of_tokens,) = self._other_shapes(shape)
        return of_tokens

    def _noise(self, call: Call, resolved: ResolvedCall, dtype: torch.dtype) -> Tensor:
        return super()._noise(call, resolved, torch.float32)  # in any precision of the model

    def _before_step(self, step: Step) -> None:
        """Sets the scale that callbacks may read."""
        self._guidance_scale = self._guidance_schedule[step.index]

    def _cfg_scale(self, step: Step) -> float:
        return step.cfg_scale  # diffusers' callbacks cannot change it

    def _norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the channels of patches."""
        norm: Any = self.vae.bn
        mean, variance = (numbers.view(1, 1, -1).to(like) for numbers in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + self.vae.config.batch_norm_eps)

    def _returned(self, latents: Tensor) -> Tensor:
        return tokens_of(latents)

    def _scaled(self, latents: Tensor) -> Tensor:
        tokens = tokens_of(latents)
        mean, deviation = self._norm(tokens)
        return from_tokens(tokens * deviation + mean, latents.shape[-2:])

    def _postprocess(self, image: Tensor, output_type: str, **options: Any) -> Any:
        return super()._postprocess(image.float(), output_type, **options)
