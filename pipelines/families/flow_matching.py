"""Base classes of the pipelines of flow-matching transformers: sizes, timesteps, start noise, templates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle

from lora_compose.attention.backbones.joint import PATCH, packed, unpacked
from lora_compose.pipelines.calls.call import ATTENTION_ARGUMENTS, Call, GivenPrompts, Sampling, check_latents, listed
from lora_compose.pipelines.calls.front import Begun, Request
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.concepts.tags import check_no_tags
from lora_compose.pipelines.denoising.guidance import Guider
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.denoising.sampler import Schedule, renews_noise
from lora_compose.pipelines.families.image_tasks import ImageTasksPipeline, precision_kept
from lora_compose.pipelines.images.from_image import FromImage, Source
from lora_compose.pipelines.images.task import ImageToImage, Inpainting
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.text.emphasis import refuse_weights
from lora_compose.pipelines.text.encoder import EncodedText
from lora_compose.pipelines.text.long_prompts import Reading
from lora_compose.pipelines.text.templates import TemplateTokenizer
from lora_compose.pipelines.text.textual_inversion import TextualInversions

Shape = tuple[int, ...]

_REPEATED = (
    "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length", "text_encoder_out_layers",
)  # fmt: skip
"""Arguments with which the subjects of the images of a call are repainted."""

UNSTATED = 32
"""diffusers' default for `sample_size` of a VAE, which says nothing about the model."""


class FlowMatchingPipeline(ImageTasksPipeline):
    """A composing pipeline of a transformer; in its calls latents keep their height and width, unpacked.

    Control images are not supported yet, and methods that need what UNets alone have (`lora-compose methods`).
    """

    transformer_class: ClassVar[type[nn.Module]]
    rounds_steps_up: ClassVar[bool] = True
    named_channels: ClassVar[str] = "num_channels_latents"
    """What diffusers' pipelines that start from an image call the channels of the latents."""
    prepared: ClassVar[Sequence[int]] = (0, 1, 2)
    """Where the start latents, their noise and the image's latents are in what diffusers prepares for inpainting."""
    architecture: ClassVar[str]
    """The architecture in the metadata of trained LoRAs, named as in the ModelSpec standard."""
    most_tokens: ClassVar[int] = 4096
    """Image tokens at which timesteps are shifted most, where the scheduler does not say."""
    one_prompt: ClassVar[bool] = False
    """Whether a call without concepts takes one prompt only."""
    native_side: ClassVar[int | None] = None
    """Side of the model's images in pixels, where the VAE's configuration names another one."""

    encode_prompt: Callable[..., tuple[Tensor, ...]]
    """diffusers' method, whose annotations know no missing prompt and no plain tensors."""

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family."""
        kind = tuple(config.get("transformer") or ())
        names = [task.pipeline.__name__ for task in (cls.image_to_image, cls.inpainting) if task is not None]
        known = (None, cls.__name__, *names)
        return kind[1:] == (cls.transformer_class.__name__,) and config.get("_class_name") in known

    @property
    def cell(self) -> int:
        """As `ImageTasksPipeline.cell`: the side of a patch."""
        return self.vae_scale_factor * PATCH

    def runs_as_diffusers(self, inpaints: bool) -> bool:
        """Not if steps draw noise: diffusers' pipelines give them no generator, so that a seed makes another image."""
        return not renews_noise(self.scheduler)

    def _step_arguments(self, sampling: Sampling) -> Mapping[str, Any]:
        return {"generator": sampling.generator} if renews_noise(self.scheduler) else {}

    def _rounded(self, side: int) -> int:
        """A side in pixels that makes whole patches, rounded down."""
        return self.cell * (side // self.cell)

    def _shift(self, tokens: int, steps: int) -> float:
        """The shift of the timesteps for an image of so many tokens."""
        config = self.scheduler.config
        return calculate_shift(
            tokens, base_seq_len=config.get("base_image_seq_len", 256),
            max_seq_len=config.get("max_image_seq_len", self.most_tokens), base_shift=config.get("base_shift", 0.5),
            max_shift=config.get("max_shift", 1.15),
        )  # fmt: skip

    def _sigmas(self, steps: int) -> Any:
        """The noise levels before they are shifted."""
        return np.linspace(1.0, 1 / steps, steps)

    def _timesteps(self, scheduler: Any, sampling: Sampling, canvas: Canvas) -> tuple[Tensor, int]:
        steps = sampling.num_inference_steps or 1
        sigmas = self._sigmas(steps) if sampling.sigmas is None else sampling.sigmas
        if scheduler.config.get("shift_terminal") and len(sigmas) == 1:
            raise ValueError(
                "this scheduler stretches its steps to end at shift_terminal, which needs at least 2 of them: with 1, "
                "diffusers divides by 0"
            )
        if scheduler.config.get("use_flow_sigmas"):
            sigmas = None
        height, width = canvas.latent_grid
        shift = self._shift(height * width // PATCH**2, steps)
        timesteps_and_steps: Any = retrieve_timesteps(
            scheduler, num_inference_steps=steps, device=canvas.device, sigmas=sigmas, mu=shift
        )
        scheduler.set_begin_index(0)
        return timesteps_and_steps

    def _latent_shape(self, canvas: Canvas) -> Shape:
        return canvas.images, self.transformer.config.in_channels // PATCH**2, *canvas.latent_grid

    def _other_shapes(self, shape: Shape) -> Sequence[Shape]:
        """Shapes in which diffusers' pipeline takes latents: with patches as tokens."""
        rows, channels, height, width = shape
        return [(rows, height * width // PATCH**2, channels * PATCH**2)]

    def _drawn(self, shape: Shape) -> Shape:
        """The shape in which diffusers' pipeline draws noise for latents of a shape."""
        return shape

    def check_start(self, call: Call, canvas: Canvas) -> None:
        """See `Host.check_start`."""
        if call.source is not None and call.sampling.latents is not None:
            raise ValueError("latents cannot be given with an image, whose own latents are the start")
        shape = self._latent_shape(canvas)
        check_latents(call.sampling.latents, shape, *self._other_shapes(shape))

    def _noise(self, call: Call, resolved: ResolvedCall, dtype: torch.dtype) -> Tensor:
        canvas, latents = resolved.canvas, call.sampling.latents
        if latents is None:
            shape, generator = self._drawn(self._latent_shape(canvas)), call.sampling.generator
            latents = randn_tensor(shape, generator=generator, device=canvas.device, dtype=dtype)
        return self._cells(latents, canvas.latent_grid).to(canvas.device, dtype)

    def _cells(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents as the family's pipeline in diffusers has them, in their own height and width."""
        return _unpacked(latents, grid)

    def _sides(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height as given; None means the model's own, for which diffusers has 1024 with any model."""
        return width or self.own_size[0], height or self.own_size[1]

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        width, height = self._sides(width, height)
        return self._rounded(width), self._rounded(height)

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as the family reads them; without a size, one of text alone has the model's own."""
        task = self.image_to_image or self.inpainting
        if given["image"] is None or (task is not None and task.resizes):
            given["width"], given["height"] = self._sides(given["width"], given["height"])
        return given

    def _request(
        self,
        begun: Begun,
        prompts: GivenPrompts,
        guider: Guider,
        encode: "Encode",
        *,
        size: tuple[int, int],
        source: Source | None = None,
        references: Sequence[Tensor] = (),
        inputs: Mapping[str, Any] | None = None,
        properties: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """The request of a call with concepts.

        Args:
            size: Width and height of the images, in pixels.
            references: Prepared reference images.
            inputs: Further arguments of every forward pass.
            properties: Further attributes that diffusers' pipeline has during a call.
            options: Further arguments of the image processor.
        """
        given = begun.given
        negative = given.get("negative_prompt_embeds")
        if guider.scale > 1 and negative is not None:
            self._check_negative_embeds(prompts, negative)
        known = {f"_{name}": given[name] for name in ("guidance_scale", *ATTENTION_ARGUMENTS) if name in given}
        if hasattr(type(self), "current_timestep"):
            known["_current_timestep"] = None
        repaint = {name: given[name] for name in _REPEATED if name in given}
        call = begun.call(
            prompts, size, guider, inputs=inputs or {}, properties={**known, **(properties or {})}, source=source,
            repaint=repaint, references=references,
        )  # fmt: skip

        def both_sides(
            prompts: Sequence[str] | None,
            negative_prompts: Sequence[str] | None,
            device: torch.device,
            **reading: Reading,  # of texts with weights
        ) -> EncodedText:
            text, added = encode(None if prompts is None else list(prompts), False, device, **reading)
            if guider.scale <= 1:
                return EncodedText(text, None, added)
            negatives = None if negative_prompts is None else list(negative_prompts)
            negative, of_negative = encode(negatives, True, device, **reading)
            if negative.shape[1] != text.shape[1]:
                raise ValueError(
                    f"`prompt_embeds` have {text.shape[1]} tokens, and the negative prompt is read as "
                    f"{negative.shape[1]}, but both are read in one batch: give max_sequence_length={text.shape[1]}, "
                    "or negative_prompt_embeds"
                )
            return EncodedText(text, negative, added, of_negative)

        def decoded(latents: Tensor, process: Process) -> tuple[Any]:
            return (self._finished(self._decode(latents, given["output_type"] or "np", **options), source),)

        return Request(call, both_sides, decoded, given["return_dict"])

    def _check_negative_embeds(self, given: GivenPrompts, embeds: Any) -> None:
        """Raises ValueError for negative embeddings that cannot be in one batch with the text of the prompts."""
        tokens = given.length if given.embeds is None else given.embeds.shape[1]
        if tuple(embeds.shape[:2]) != (len(given), tokens):
            raise ValueError(
                "`prompt_embeds` and `negative_prompt_embeds` must have the same shape when passed directly, since "
                f"both are read in one batch: expected negative ones for {len(given)} prompts of {tokens} tokens, but "
                f"got the shape {list(embeds.shape)}"
            )

    def _text_request(
        self,
        begun: Begun,
        prompts: GivenPrompts,
        guider: Guider,
        encode: Callable[[Any, Any, Tensor | None, torch.device], tuple[Tensor, Mapping[str, Tensor]]],
        **how: Any,
    ) -> Request:
        """The request of a call whose texts are all encoded in the same way; `how` is as for `_request`.

        `encode` takes texts, or else embeddings and their mask as they were given, to what `Encode` returns.
        """
        given = begun.given

        def of_side(new: list[str] | None, negative: bool, device: torch.device) -> tuple[Tensor, Mapping[str, Tensor]]:
            side = "negative_" if negative else ""
            embeds = None if new is not None else given.get(f"{side}prompt_embeds")
            if embeds is not None:
                mask = given.get(f"{side}prompt_embeds_mask", given.get(f"{side}prompt_attention_mask"))
                return encode(None, embeds, mask, device)
            own = for_each(given.get("negative_prompt"), len(prompts)) if negative else listed(given["prompt"])
            return encode(own if new is None else new, None, None, device)

        return self._request(begun, prompts, guider, of_side, **how)

    def _check_plain_texts(self, *given: Any) -> None:
        """Refuses weights and names of LoRAs in texts of a call without concepts, which the model would read."""
        texts = [text for column in given if isinstance(column, str | list) for text in listed(column)]
        texts = [text for text in texts if isinstance(text, str)]
        check_no_tags(texts)
        refuse_weights(texts)

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        self._check_plain_texts(arguments["prompt"], arguments.get("negative_prompt"))
        return arguments

    def _check_start(self, given: FromImage | None) -> None:
        if given is not None and not hasattr(self.scheduler, "scale_noise"):
            raise ValueError(
                f"with a {type(self.scheduler).__name__}, {self.family} cannot start from an image; use diffusers' "
                "FlowMatchEulerDiscreteScheduler"
            )

    def _from_image(self, call: Call, source: Source, resolved: ResolvedCall, schedule: Schedule) -> ImageToImage:
        canvas, generator, pixels = resolved.canvas, call.sampling.generator, self._by_image(call, source.pixels)
        first: Any = schedule.timesteps[:1]
        height, width = canvas.image_size
        diffusers_own: Any = source.pipeline  # families prepare latents in their own ways
        with precision_kept(self.vae):
            prepared = diffusers_own.prepare_latents(
                pixels.float(), timestep=first.repeat(canvas.images), batch_size=canvas.images, height=height,
                width=width, dtype=self._text_dtype, device=canvas.device, generator=generator,
                **{self.named_channels: self._latent_shape(canvas)[1]},
            )  # fmt: skip
        if source.mask is None:
            latents = prepared if isinstance(prepared, Tensor) else prepared[0]
            return ImageToImage(_unpacked(latents, canvas.latent_grid))
        latents, noise, image = (_unpacked(prepared[place], canvas.latent_grid) for place in self.prepared)
        mask = self._latent_mask(self._by_image(call, source.mask), canvas).to(canvas.device, self._text_dtype)
        inputs = self._inputs_from_image(call, image)
        return Inpainting(latents, inputs, mask=mask, image=image, noise=noise, timesteps=schedule.timesteps)

    def _inputs_from_image(self, call: Call, image: Tensor) -> Mapping[str, Any]:
        """Further arguments of every forward pass of inpainting, from the latents of the image."""
        return {}

    def _latent_mask(self, mask: Tensor, canvas: Canvas) -> Tensor:
        """A mask on the latent grid, as diffusers' inpainting has it."""
        return interpolate(mask, canvas.latent_grid)

    @property
    def own_size(self) -> tuple[int, int]:
        """Width and height in pixels: what the VAE's configuration says, or 1024."""
        side = self.own_side(self.vae.config)
        return side, side

    @classmethod
    def own_side(cls, vae: Mapping[str, Any]) -> int:
        """Side in pixels of the images that a model was made for, from the configuration of its VAE."""
        side = cls.native_side or vae.get("sample_size")
        return 1024 if side in (None, UNSTATED) else int(side)

    def _distilled_guidance(self, scale: float, images: int) -> dict[str, ByImage]:
        """The scale as an input of the model."""
        given = self.guidance_input(scale, images, self._execution_device)
        return {name: ByImage(scales) for name, scales in given.items()}

    def guidance_input(self, scale: float, rows: int, device: torch.device) -> dict[str, Tensor]:
        """The guidance scale of a forward pass, for models that take it as an input; 1 is none."""
        return {}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Texts as the backbone's forward pass takes them.

        Args:
            length: Tokens to which they are padded or cut; None for what the pipeline takes by itself.

        Returns:
            Features, shape [prompts, tokens, channels], and further inputs by row.
        """
        raise NotImplementedError

    def latents_of(self, pixels: Tensor) -> Tensor:
        """Images from -1 to 1, [images, 3, height, width], as the transformer has them: the VAE's means, normalised.

        Unpacked. Shape: [images, channels, height / 8, width / 8].
        """
        config: Any = self.vae.config
        means = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return (means - config.shift_factor) * config.scaling_factor

    def cells_of(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """As `UNetPipeline.cells_of`, unpacked."""
        width, height = (self._rounded(side) // self.vae_scale_factor for side in size)
        return self._cells(latents, (height, width))

    def pixels_of(self, cells: Tensor) -> Tensor:
        """As `UNetPipeline.pixels_of`."""
        return self._decode(cells, "pt") * 2 - 1

    def _decode(self, latents: Tensor, output_type: str, **options: Any) -> Any:
        """The images of final latents, as diffusers returns them."""
        if output_type == "latent":
            return self._returned(latents)
        image = self.vae.decode(self._scaled(latents).to(self.vae.dtype), return_dict=False)[0]
        return self._postprocess(image, output_type, **options)

    def _returned(self, latents: Tensor) -> Tensor:
        """Final latents as diffusers returns them: packed tokens."""
        return packed(latents)

    def _scaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE decodes them."""
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def _cfg_of(self, guidance_scale: float) -> float:
        """The scale s of uncond + s (cond - uncond) that diffusers' guidance scale means; 1 is no guidance."""
        return guidance_scale

    def _cfg_scale(self, step: Step) -> float:
        return self._cfg_of(self.guidance_scale)


def _unpacked(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latents with patches as tokens, or as channels, in their own height and width."""
    if latents.shape[-2:] == grid and latents.dim() == 4:
        return latents
    return unpacked(latents, grid) if latents.dim() == 3 else pixel_shuffle(latents, PATCH)


class TemplatePipeline(FlowMatchingPipeline):
    """A composing pipeline that writes prompts into a chat template."""

    def prompt_tokenizers(
        self, textual_inversions: TextualInversions, length: int | None
    ) -> Sequence[TemplateTokenizer]:
        """See `Host.prompt_tokenizers`."""
        if textual_inversions.words:
            words = ", ".join(map(repr, textual_inversions.words))
            raise ValueError(
                f"the LoRA files bring words of their own ({words}), which {self.family} cannot read; expected files "
                "without textual inversions"
            )
        return [self._template(length or 512)]

    def _template(self, length: int) -> TemplateTokenizer:
        """The tokenizer for texts of so many tokens."""
        raise NotImplementedError

    def _chat_template(self, **options: Any) -> Callable[[str], str]:
        """Writes a prompt into the tokenizer's chat template, as a message to be answered."""

        def render(prompt: str) -> str:
            message = {"role": "user", "content": prompt}
            return self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True, **options)

        return render


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; None if there is no processor, as where only embeddings are read."""
    return None if processor is None else processor.tokenizer


Encode = Callable[..., tuple[Tensor, Mapping[str, Tensor]]]
"""Encodes prompts on a device: the given ones, or the call's own if they are None; as negative prompts if the second
argument is True. Returns the text, and further inputs of the model by row."""


def for_each(text: str | list[str] | None, count: int) -> list[str]:
    """A text for each of `count` prompts: a single text is repeated, None is the empty text."""
    return for_all(text, count) or [""] * count


def for_all(text: str | list[str] | None, count: int) -> list[str] | None:
    """A text for each of `count` prompts, of which a single one is for all; None if there is none."""
    texts = listed(text) or []
    return (texts * count if len(texts) == 1 else texts) or None


def for_images(
    encoded: tuple[Tensor, Mapping[str, Tensor]], images_per_prompt: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The text and further inputs of prompts, for so many images of each."""
    text, added = encoded
    rows = {name: values.repeat_interleave(images_per_prompt, dim=0) for name, values in added.items()}
    return text.repeat_interleave(images_per_prompt, dim=0), rows


def real_tokens(
    tokenizer: Any, texts: Sequence[str], length: int, images_per_prompt: int, device: torch.device
) -> Tensor:
    """True at tokens that are not padding. Shape: [images, tokens]."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.attention_mask.bool().to(device).repeat_interleave(images_per_prompt, dim=0)
