"""Base models for training: a UNet with a noise schedule, or a transformer of flow matching."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from lora_compose.attention import backbone_of
from lora_compose.compose.training.noising import Diffusion, Flow, Noising
from lora_compose.compose.training.settings import SCOPES, Training
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline
from lora_compose.pipelines.families.references import ReferencesPipeline
from lora_compose.pipelines.text.textual_inversion import ExpandingTokenizer

_TOKENS = 512  # of a text of transformers, as `read_texts` has it
_SD2_TEXT = 1024  # channels of the text that Stable Diffusion 2.x reads
_IN_BLOCK = r".*(blocks|layers|refiner)(\.[a-z_]+)?\.\d+\."
_ATTENTION = rf"{_IN_BLOCK}(attn\d?|attention)\..+"
_CROSS_KV = rf"{_IN_BLOCK}attn2\.to_[kv]"


class Base(Protocol):
    """A base model, opened.

    Attributes:
        part: The component that gets the LoRA, as diffusers names it.
        pipe: Its pipeline.
        network: The component itself.
        side: Side of the images that it was made for, in pixels.
        architecture: Its architecture, named as in the ModelSpec standard.
        prediction: The target of the network, named as in the ModelSpec standard; empty if that has no name for it.
        tokenizers: The tokenizers of prompts.
        unconditional: The caption of unconditional rows under guidance; None where guidance needs none.
    """

    part: str
    pipe: Any
    network: Any
    side: int
    architecture: str
    prediction: str = ""
    tokenizers: Sequence[Any]
    unconditional: str | None

    def check(self, settings: Training) -> None:
        """Raises ValueError for settings that do not apply to this kind of model."""
        ...

    def noising(self, settings: Training) -> Noising:
        """How images are noised, and what the network predicts."""
        ...

    def targets(self, settings: Training) -> list[str]:
        """The layers to train, as PEFT takes them."""
        ...

    def texts(
        self, captions: Sequence[str], references: Sequence[Sequence[Image.Image]] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Features of captions, shape [captions, tokens, channels], and further inputs by caption; on the CPU.

        `references` are the reference images of each caption.
        """
        ...

    def latents(self, pixels: Tensor) -> Tensor:
        """The means of the VAE, as the network has them, from pixels between -1 and 1; on the CPU."""
        ...

    def reference(self, images: Sequence[Tensor]) -> Tensor:
        """Tokens [1, tokens, channels] of images [1, 3, height, width] between -1 and 1, on the CPU."""
        ...

    def generate(
        self, accelerator: Accelerator, prompts: Sequence[str], noise: Sequence[torch.Generator], steps: int,
        guidance: float, side: int, references: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:  # fmt: skip
        """An image for every prompt, with the network as it is; all with the same reference images."""
        ...

    def sizes(self, size: tuple[int, int], cut: tuple[int, int], side: int) -> Mapping[str, Sequence[int]]:
        """Further inputs of the network for a training image, by name.

        All in pixels: its width and height, what is cut off at top and left, and the side of what is left.
        """
        return {}


def base_of(pipe: Any) -> Base:
    """The base model of a pipeline that `open_base` has opened."""
    return _Transformer(pipe) if isinstance(pipe, FlowMatchingPipeline) else _UNet(pipe)


class _UNet(Base):
    """Stable Diffusion 1.x, 2.x and SDXL."""

    part = "unet"

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.network = pipe, pipe.unet
        sample = self.network.config.sample_size
        self.side = (sample if isinstance(sample, int) else min(sample)) * pipe.vae_scale_factor
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        self.prediction = "v" if velocity else "epsilon"
        if hasattr(pipe, "text_encoder_2"):
            self.architecture = "stable-diffusion-xl-v1-base"
        elif self.network.config.cross_attention_dim != _SD2_TEXT:
            self.architecture = "stable-diffusion-v1"
        else:
            self.architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        tokenizers = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
        self.tokenizers = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
        self.unconditional = "" if self.network.config.time_cond_proj_dim is None else None

    def check(self, settings: Training) -> None:
        """Raises ValueError for references and guidance."""
        if settings.references:
            raise ValueError(_no_references("Stable Diffusion"))
        if settings.guidance != 1:
            raise ValueError(_no_guidance("Stable Diffusion"))

    def noising(self, settings: Training) -> Noising:
        schedule: Any = DDPMScheduler.from_config(self.pipe.scheduler.config)
        return Diffusion(self.network, schedule, settings.high_noise)

    def targets(self, settings: Training) -> list[str]:
        return list(SCOPES[settings.scope])

    def texts(
        self, captions: Sequence[str], references: Sequence[Sequence[Image.Image]] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features, pooled = [], []
        with torch.no_grad():
            for caption in captions:
                encoded = self.pipe.encode_prompt(
                    caption, device=self.pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
                # SDXL's unconditional rows read zeros in place of an empty text.
                kept = float(bool(caption) or not self.pipe.config.get("force_zeros_for_empty_prompt"))
                features.append(encoded[0].cpu() * kept)
                if len(encoded) == 4:  # SDXL's, with negative and pooled ones
                    pooled.append(encoded[2].cpu() * kept)
        return torch.cat(features), {"text_embeds": torch.cat(pooled)} if pooled else {}

    def latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        with torch.no_grad():
            return vae.encode(pixels.to(vae.device)).latent_dist.mode().cpu() * vae.config.scaling_factor

    def reference(self, images: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError("`check` has refused references")

    def generate(
        self, accelerator: Accelerator, prompts: Sequence[str], noise: Sequence[torch.Generator], steps: int,
        guidance: float, side: int, references: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:  # fmt: skip
        with torch.no_grad(), accelerator.autocast():
            latents = self.pipe(
                list(prompts), generator=list(noise), num_inference_steps=steps, guidance_scale=guidance, width=side,
                height=side, output_type="latent",
            ).images  # fmt: skip
        vae = self.pipe.vae
        with torch.no_grad():  # one by one: decoding is what needs most memory
            pixels = torch.cat([vae.decode(row[None].float() / vae.config.scaling_factor).sample for row in latents])
        return self.pipe.image_processor.postprocess(pixels)

    def sizes(self, size: tuple[int, int], cut: tuple[int, int], side: int) -> Mapping[str, Sequence[int]]:
        width, height = size  # SDXL reads original size, crop offset and target size; each height and width
        xl = isinstance(self.pipe, StableDiffusionXLPipeline)
        return {"time_ids": (height, width, *cut, side, side)} if xl else {}


class _Transformer(Base):
    """A transformer whose pipeline encodes texts for training (`FlowMatchingPipeline.read_texts`)."""

    part = "transformer"

    def __init__(self, pipe: FlowMatchingPipeline) -> None:
        self.pipe, self.network = pipe, pipe.transformer
        if hasattr(pipe.vae, "enable_slicing"):  # decoding is what needs most memory
            pipe.vae.enable_slicing()
        self.side, self.architecture = min(pipe.own_size), pipe.architecture
        tokenizers = pipe.tokenizers_for([])
        self.tokenizers = [t.tokenizer if isinstance(t, ExpandingTokenizer) else t for t in tokenizers]
        self._backbone = backbone_of(pipe.transformer)
        self.unconditional = pipe.unconditional_prompt

    def check(self, settings: Training) -> None:
        family = self.pipe.family
        if self.network.config.get("flow_map"):
            raise ValueError(
                f"{family} reads to which time a step leads, which flow matching does not know; train on FLUX.3, whose "
                "LoRAs have the same layers"
            )
        self._check_references(len(settings.references))
        if settings.tara is not None:
            raise ValueError(
                "--tara aligns keys of the cross-attention of UNets; leave it out: the method tara takes ordinary "
                f"LoRAs of {family}"
            )
        if settings.scope == "cross_kv" and not self._backbone.reads_regions:
            raise ValueError(f"{family} has no cross-attention for scope cross_kv; use attention or transformer")
        if settings.scope == "convolutions":
            raise ValueError(f"{family} has no convolutions in its blocks; use attention or transformer")
        if settings.min_snr is not None:
            raise ValueError(f"--min-snr is for models with a noise schedule; {family} learns by flow matching")
        if settings.compile and not self.network._repeated_blocks:
            raise ValueError(f"diffusers does not name the blocks of {family}, which --compile needs; leave it out")
        if settings.guidance != 1 and not self.pipe.guidance_input(settings.guidance, 1, torch.device("cpu")):
            raise ValueError(_no_guidance(family))
        unit = self.pipe.cell
        if settings.resolution is not None and settings.resolution % unit:
            raise ValueError(f"the resolution must be a multiple of {unit} for {family}, not {settings.resolution}")

    def _check_references(self, count: int) -> None:
        family = self.pipe.family
        if not isinstance(self.pipe, ReferencesPipeline):
            if count:
                raise ValueError(_no_references(family))
            return
        most = self.pipe.most_references
        if most is not None and count > most:
            raise ValueError(f"{family} reads {most} reference image, not {count}; give --references once")
        if self.pipe.needs_references and not count:
            raise ValueError(
                f"{family} reads every text with a reference image; give --references FOLDER, with one of the same "
                "name for each training image"
            )

    def noising(self, settings: Training) -> Noising:
        return Flow(self.pipe, settings.high_noise, settings.guidance)

    def targets(self, settings: Training) -> list[str]:
        pattern = {"attention": _ATTENTION, "cross_kv": _CROSS_KV}.get(settings.scope, f"{_IN_BLOCK}.+")
        left_out = {"modulation"} if settings.references else {"modulation", "reference"}
        backbone = self._backbone
        unread = set(backbone.unread)  # without a gradient there, processes would wait for each other
        return [
            name for name, site in backbone.sites.items()
            if name not in unread and left_out.isdisjoint(site.parts) and re.fullmatch(pattern, name)
            and isinstance(self.network.get_submodule(name), nn.Linear)
        ]  # fmt: skip

    def texts(
        self, captions: Sequence[str], references: Sequence[Sequence[Image.Image]] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        encoded = []
        with torch.no_grad():
            for caption, images in zip(captions, references or [()] * len(captions), strict=True):
                beside = isinstance(self.pipe, ReferencesPipeline) and images
                text, added = self.pipe.read_beside([caption], images) if beside else self.pipe.read_texts([caption])
                encoded.append((text.cpu(), {name: value.cpu() for name, value in added.items()}))
        texts, by_caption = zip(*encoded, strict=True)
        longest = max(text.shape[1] for text in texts)
        texts = [pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]
        return torch.cat(texts), {name: torch.cat([values[name] for values in by_caption]) for name in by_caption[0]}

    def latents(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.pipe.latents_of(pixels.to(self.pipe.vae.device)).cpu()

    def reference(self, images: Sequence[Tensor]) -> Tensor:
        assert isinstance(self.pipe, ReferencesPipeline), "`check` has refused references"
        with torch.no_grad():
            return self.pipe.reference_tokens(images).cpu()

    def generate(
        self, accelerator: Accelerator, prompts: Sequence[str], noise: Sequence[torch.Generator], steps: int,
        guidance: float, side: int, references: Sequence[Image.Image] = (),
    ) -> list[Image.Image]:  # fmt: skip
        pipe: Any = self.pipe
        shown = {"image": list(references)} if references else {}
        together = 1 if pipe.one_prompt else len(prompts)
        images: list[Image.Image] = []
        for first in range(0, len(prompts), together):
            rows = slice(first, first + together)
            with torch.no_grad(), accelerator.autocast():
                images += pipe(
                    prompt=list(prompts[rows]),
                    generator=list(noise[rows]),
                    num_inference_steps=steps,
                    max_sequence_length=_TOKENS,
                    **pipe.sized(side, side),
                    **pipe.guided(guidance, None),
                    **shown,
                ).images
        return images


def _no_guidance(family: str) -> str:
    return f"guidance is no input of {family}; leave --guidance out, or train on FLUX.1-dev or FLUX.2-dev"


def _no_references(family: str) -> str:
    return (
        f"{family} reads no reference images; leave --references out, or train on FLUX.1 Kontext, FLUX.2, FLUX.3 or "
        "Qwen-Image-Edit-Plus"
    )
