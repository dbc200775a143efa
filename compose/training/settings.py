"""The settings of a training: `Training` and `TaraTraining`, frozen and validated, and presets by kind of model."""

import re
import string
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator

from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUND_FLUX, PLAYGROUNDS
from lora_compose.compose.playground.words import CLASSES, PLACES
from lora_compose.compose.support.frozen import Frozen
from lora_compose.compose.support.precision import cpu_has_bf16
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.words import spaced
from lora_compose.pipelines.text.tokens import find_words

Scope = Literal["cross_kv", "attention", "transformer", "convolutions"]

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
SCOPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cross_kv": ("attn2.to_k", "attn2.to_v"),
        "attention": _ATTENTION,
        "transformer": _TRANSFORMER,
        "convolutions": (*_TRANSFORMER, "conv1", "conv2", "conv_shortcut", "conv"),
    }
)
"""The layers of each scope, as ends of their names."""


def _template(text: str) -> str:
    fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    if unknown := fields - {"trigger", "class_word"}:
        raise ValueError(f"{text!r} has {{{', '.join(sorted(unknown))}}}; there are {{trigger}} and {{class_word}}")
    return text


Template = Annotated[str, Field(min_length=1), AfterValidator(_template)]
"""A prompt in which {trigger} and {class_word} are filled in."""

_OF_PRIOR = ("class_prompts", "prior_batch", "prior_weight")

Word = Annotated[str, Field(min_length=1, max_length=100)]
Positive = Annotated[int, Field(gt=0)]


class TaraTraining(Frozen):
    """Settings of training for the method `tara` (Peng et al., arXiv 2508.08812).

    Attributes:
        align_weight: Weight of the token alignment loss; 0 is none.
        align_norm: Its distance: "l1" is what the authors' code has, "l2" the squared one.
        class_target: Where the class word's features come from. "caption": from the caption, as in the paper, where
            they depend on the trigger, since CLIP reads from left to right. "clean": from the caption without it.
        keys: "aligned": keys are trained, and the loss pulls the trigger's key to the class word's. "tied": keys are
            not trained; the trigger's key is set to the class word's in closed form, which the file carries as a LoRA.
        token_mask: "training": keys and values of cross-attention change at the trigger only, in training as in
            inference. "inference": training has no mask.
        start_aligned: Whether training starts with aligned keys, also set in closed form, or with the model's own.
    """

    align_weight: Annotated[float, Field(ge=0)] = 1.0
    align_norm: Literal["l1", "l2"] = "l1"
    class_target: Literal["caption", "clean"] = "caption"
    keys: Literal["aligned", "tied"] = "aligned"
    token_mask: Literal["training", "inference"] = "training"
    start_aligned: bool = True

    @property
    def needs_class_word(self) -> bool:
        """Whether every caption must have the class word."""
        return self.align_weight > 0 or self.keys == "tied" or self.start_aligned


class Training(Frozen):
    """Everything that determines a LoRA: images, words, model, which layers, how they are optimised, seed.

    `Training.preset` fills in what suits a kind of model.

    Attributes:
        images: A folder with images of the concept. Captions are read from its `captions.tsv` (file, tab, caption)
            or a .txt beside each image.
        out: The LoRA to be written, a .safetensors file.
        trigger: The rare word or words that will name the concept: "sks".
        class_word: The noun after it: "cat".
        model: The base model: `playground`, a folder as diffusers saves it, a .safetensors file, or a hub repository.
        prompt: The caption of images that have none.
        references: Folders with reference images, for models that read some: each has an image of the same name for
            each of `images`. The first folder has the first reference of each, and so on.
        tara: Train for composing by `tara`; None is an ordinary LoRA.
        scope: Which layers get a LoRA. "cross_kv": keys and values of cross-attention. "attention": all projections of
            attention. "transformer": also the feed-forward layers and the projections around the transformer.
            "convolutions": also the convolutions of residual blocks and between resolutions (LoCon; UNets).
        rank: Rank r of the LoRA.
        alpha: The LoRA is scaled by alpha / r; None is r. Not every tool reads alpha: leave it if others use the file.
        dora: Train the norms of the changed weights as well (DoRA).
        steps: Optimisation steps.
        batch_size: Images of the concept in a batch, on every process.
        accumulate: Batches in a step.
        optimizer: "adamw", or "muon" (Jordan et al. 2024), which needs fewer images and PyTorch 2.9.
        learning_rate: The peak learning rate.
        schedule: Learning rate after the warm-up: constant, or falling to zero linearly or along half a cosine.
        warmup: Steps in which it rises from zero.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm; None does not clip.
        resolution: Side of the training images in pixels; None is the model's own.
        seed: Seed of everything random: start weights, order, noise, timesteps.
        preserve_class: Prior preservation without class images: for the concept's own images, captioned without the
            trigger, the LoRA is to predict what the base model predicts (differential output preservation). Where
            guidance has unconditional rows, so it is for the same images with their empty caption.
        preserve_empty: The same for the empty caption alone, on which guidance stands.
        class_images: A folder with images of the class without the concept, for prior preservation, captioned like
            `images`. None with `class_count` 0, without `preserve_class` and `preserve_empty`: no prior preservation.
        class_prompts: The captions of class images that have none, and the prompts of those that the model makes.
        class_count: Missing class images are made by the model, up to this number, into `class_images` (or a folder
            beside `out`).
        class_steps: Denoising steps for them.
        prior_batch: Rows of the class added to a batch; None is as many as `batch_size`.
        prior_weight: Weight of their loss.
        min_snr: Gamma of min-SNR weighting (Hang et al. 2023); None is none.
        high_noise: The share of the rows that are noised the most, where shapes and places are decided; the others have
            any timestep.
        input_perturbation: Standard deviation of noise that is added to the input's noise, but not to what the network
            is to predict (Ning et al. 2023): images then forgive errors of earlier denoising steps.
        guidance: The guidance scale that the model is given in training, where it is an input (FLUX.1-dev, FLUX.2-dev);
            1 is none. With the scale that images are made with, the concept is learnt as it is drawn there.
        gradient_checkpointing: Recompute activations to save memory.
        compile: Compile the network's blocks (`torch.compile`): some minutes at first, then faster steps.
        mixed_precision: "no", "fp16" or "bf16"; the LoRA itself is float32.
        save_dtype: Precision of the file.
        checkpoint_every: Steps from checkpoint to checkpoint.
        sample_every: Steps from sample to sample; 0 is none.
        sample_prompts: What samples show; the first caption by default.
        sample_guidance: Classifier-free guidance of samples and of class images that are made.
        cpu: Train on the CPU, even if there is a GPU.
        threads: Threads on the CPU; None leaves it to PyTorch.
    """

    images: Path
    out: Path
    trigger: Word
    class_word: Word
    model: str
    prompt: Template = "a photo of {trigger} {class_word}"
    references: tuple[Path, ...] = ()
    tara: TaraTraining | None = None
    scope: Scope = "attention"
    rank: Annotated[int, Field(gt=0, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    dora: bool = False
    steps: Positive = 1000
    batch_size: Positive = 1
    accumulate: Positive = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    preserve_class: bool = False
    preserve_empty: bool = False
    class_images: Path | None = None
    class_prompts: Annotated[tuple[Template, ...], Field(min_length=1)] = ("a photo of {class_word}",)
    class_count: Annotated[int, Field(ge=0, le=10_000)] = 0
    class_steps: Positive = 25
    prior_batch: Positive | None = None
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    min_snr: Annotated[float, Field(gt=0)] | None = None
    high_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    input_perturbation: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance: Annotated[float, Field(ge=1, le=100)] = 1.0
    gradient_checkpointing: bool = False
    compile: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    checkpoint_every: Positive = 100
    sample_every: Annotated[int, Field(ge=0)] = 0
    sample_prompts: tuple[str, ...] = ()
    sample_guidance: float = 5.0
    cpu: bool = False
    threads: Positive | None = None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "Training":
        """A training with the defaults of one of `PRESETS`, which the given fields override.

        Raises:
            ValueError: For unknown presets and unusable values.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        fields = {**PRESETS[name], **overrides}
        if name in PLAYGROUNDS and "mixed_precision" not in overrides:
            on_gpu = torch.cuda.is_available() and not overrides.get("cpu")
            fields["mixed_precision"] = "bf16" if on_gpu or cpu_has_bf16() else "no"
        if fields.get("tara") is not None and "scope" not in overrides:
            fields["scope"] = "attention"  # where the paper has its LoRA
        others = any(overrides.get(name) for name in ("preserve_class", "preserve_empty", "references"))
        own = overrides.get("class_images") is not None or others
        if own and "class_count" not in overrides:
            fields["class_count"] = 0  # nothing is added to a folder of the user's own unless asked for
            if overrides.get("class_images") is not None and "class_prompts" not in overrides:
                fields.pop("class_prompts", None)  # the preset's prompts describe generated images
        made = cls(**fields)
        unread = [name for name in _OF_PRIOR if name in overrides and not (made.preserves or made.has_prior)]
        if unread:
            raise ValueError(
                f"{', '.join(unread)}: for the class, of which nothing is kept; give preserve_class, preserve_empty, "
                "class_images or class_count too"
            )
        if "sample_prompts" in overrides and not made.sample_every:
            raise ValueError("sample_prompts: for sample images, of which there are none; give sample_every too")
        return made

    @model_validator(mode="after")
    def _usable(self) -> Self:
        trigger, noun = spaced(self.trigger), spaced(self.class_word)
        if not trigger or not noun:
            raise ValueError("the trigger and the class word need letters")
        if trigger == noun:
            raise ValueError(
                f"the trigger and the class word are both {trigger!r}; choose a rare trigger such as 'sks'"
            )
        if find_words(noun, trigger):
            raise ValueError(f"the trigger {trigger!r} holds the class word {noun!r}; give the rare word alone")
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out must end with .safetensors, not {self.out.name!r}")
        if self.dora and self.tara is not None:
            raise ValueError("tara aligns the keys of plain LoRAs; leave dora out, or tara")
        if self.preserve_class and self.preserve_empty:
            raise ValueError("preserve_class keeps the empty caption, too; leave preserve_empty out, or it")
        if self.preserves and self.has_prior:
            name = "preserve_class" if self.preserve_class else "preserve_empty"
            raise ValueError(f"{name} needs no class images; leave class_images and class_count out, or it")
        if self.references and self.has_prior:
            raise ValueError(
                "images of the class have no reference images; keep the class with preserve_class, which needs none, "
                "and leave class_images and class_count out"
            )
        if self.warmup >= self.steps:
            raise ValueError(
                f"a warm-up of {self.warmup} steps leaves nothing of {self.steps} steps; "
                "set --warmup (in Python, warmup) below that"
            )
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision fp16 scales gradients for one optimizer, and muon takes AdamW beside it for what is "
                "no matrix; use bf16, or adamw"
            )
        if self.cpu and self.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16 needs a GPU; bf16 works on the CPU as well")
        return self

    @property
    def concept(self) -> Concept:
        """The concept that is learnt."""
        return Concept(name=self.out.stem, trigger=self.trigger, class_word=self.class_word)

    @property
    def method(self) -> str:
        """The method that the file names as its training."""
        return "dreambooth" if self.tara is None else "tara"

    @property
    def preserves(self) -> bool:
        """Whether predictions of the base model are kept for other captions of the concept's images."""
        return self.preserve_class or self.preserve_empty

    @property
    def has_prior(self) -> bool:
        """Whether there are class images."""
        return self.class_images is not None or self.class_count > 0

    @property
    def class_folder(self) -> Path:
        """The folder of class images."""
        return self.class_images or self.out.with_name(f"{self.out.stem}-class")

    @property
    def checkpoint(self) -> Path:
        """The file from which an interrupted training goes on."""
        return self.out.with_suffix(".checkpoint")

    def filled(self, template: str) -> str:
        """A template with trigger and class word, of which "a" before the class word becomes "an" where it has to."""
        if _article(self.class_word) == "an":
            template = _A_CLASS_WORD.sub(r"\g<0>n", template)
        return template.format(trigger=self.trigger, class_word=self.class_word)


_A_CLASS_WORD = re.compile(r"\ba(?= \{class_word\})", re.IGNORECASE)


def _article(noun: str) -> str:
    """The article of a noun, by its first letter."""
    return "an" if noun[0].lower() in "aeiou" else "a"


def _class_prompts() -> tuple[str, ...]:
    """One object each, every third one of the concept's own class: two objects would be taken for "no concept"."""
    prompts = []
    for i, name in enumerate(CLASSES):
        prompts.append(f"{_article(name)} {name} {PLACES[i % len(PLACES)]}")
        if i % 2:
            prompts.append(f"a {{class_word}} {PLACES[(i // 2) % len(PLACES)]}")
    return tuple(prompts)


def _small(model: str, **fields: Any) -> Mapping[str, Any]:
    """The preset of a small model: what all of them share, and fields of its own."""
    prompts = _class_prompts()
    return {
        "model": model, "prompt": "a {trigger} {class_word}", "optimizer": "muon", "learning_rate": 5e-3,
        "schedule": "cosine", "warmup": 20, "high_noise": 0.5, "class_prompts": prompts, "class_count": len(prompts),
        "class_steps": 15, "prior_batch": 2, "prior_weight": 0.5, "sample_guidance": 5.0, "save_dtype": "float16",
        **fields,
    }  # fmt: skip


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sd": {},
        "sdxl": {"learning_rate": 5e-5, "gradient_checkpointing": True, "mixed_precision": "bf16"},
        "transformer": {"rank": 16, "gradient_checkpointing": True, "mixed_precision": "bf16"},
        PLAYGROUND: _small(PLAYGROUND, scope="convolutions", rank=16, steps=800, batch_size=4),
        PLAYGROUND_FLUX: _small(
            PLAYGROUND_FLUX, scope="transformer", rank=8, steps=450, batch_size=6, learning_rate=1e-2, class_count=0
        ),
    }
)
"""Defaults by kind of model: Stable Diffusion 1.x and 2.x, SDXL, transformers, and the playgrounds."""
