"""FreeFuse: the base model shows in the first steps where each subject is, and every LoRA acts there.

For subject i of n, with token positions of its trigger and class word, on the grid of one transformer block:

    without LoRAs   s_i = attention of the cells to its words, mean over heads and tokens
                    P_i = the tenth of the cells with the largest  n s_i - sum_{j != i} s_j
                    m_i = softmax over cells q of  mean over p in P_i of <H_p, H_q> / temperature
    masks           a balanced argmax of the m_i: every cell belongs to one subject
    restart         from the same noise. LoRA i acts on the cells of its mask, and the scores of cross-attention are
                    raised between a mask and its own words, lowered between it and the words of other subjects

H is the output of self-attention. FreeFuse, arXiv 2510.23515, as in the authors' code for SDXL. What differs:
`docs/methods/freefuse.md`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention import Backbone, Gates, grid_at
from lora_compose.pipelines.denoising.passes import AttentionMaps, MapRequest, Pass
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.process import (
    ActingRows,
    FixedPasses,
    Process,
    Settings,
    acting_rows,
    check_choices,
    constant_gates,
    one_text,
)
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.drafted import drafted
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.region_bias import region_bias
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.support.notes import warn_once
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.missing import Described, missing_trigger
from lora_compose.pipelines.text.tokens import is_named


@dataclass(frozen=True)
class FreeFuse(Settings):
    """Every LoRA acts where the base model puts its subject, and cells are drawn to the words of their subject.

    Attributes:
        length: Fraction of the steps that run without LoRAs, at least one step; above 1 a number of steps. The last of
            them stops after the block that is read.
        words: The words that show where a subject is: its "class_word", which the base model knows, or the "phrase" of
            trigger and class word. The biases are for both.
        share: Fraction of the cells that stand for a subject, at least one cell.
        temperature: Divides similarities before the softmax; None makes their standard deviation over the cells 1,
            since features have another size in each model. 1000 in the authors' code for SDXL.
        own_bias: Added to the scores between cells of a mask and the words of its subject.
        other_bias: Added to the scores between cells of a mask and the words of other subjects.
        rows: Where LoRAs and biases act under guidance: "all", as in the authors' code, or "cond_only", on conditional
            rows.
    """

    length: float = 1 / 3
    words: Literal["class_word", "phrase"] = "class_word"
    share: float = 0.1
    temperature: float | None = None
    own_bias: float = 1.0
    other_bias: float = -1.0
    rows: ActingRows = "all"

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.length < math.inf:
            raise ValueError(f"length must be positive, not {self.length}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if not (math.isfinite(self.own_bias) and math.isfinite(self.other_bias)):
            raise ValueError(f"own_bias and other_bias must be finite, not {self.own_bias} and {self.other_bias}")

    @classmethod
    def official(cls) -> "FreeFuse":
        """The settings of the authors' code for SDXL."""
        return cls(words="phrase", temperature=1000.0)

    @classmethod
    def official_flux(cls) -> "FreeFuse":
        """The settings of the authors' code for FLUX.1, whose 28 steps are drafted up to the fifth."""
        return cls(length=5 / 28, words="phrase", temperature=4000.0, own_bias=2.0, other_bias=-4.0)

    def check_concepts(self, concepts: Sequence[Described], prompts: Sequence[str] | None) -> None:
        """Every prompt needs the words of each subject."""
        subjects = [each for each in concepts if not each.concept.is_style]
        if len(subjects) < 2 or prompts is None:
            return
        every = [each.concept for each in subjects]
        lacking = [each for each in subjects if not all(is_named(each.concept, prompt, every) for prompt in prompts)]
        if lacking:
            raise _wordless(lacking, prompts)

    def start(self, session: Session) -> Process:
        """Finds the words of every subject in the prompt. A single subject is merged."""
        concepts = session.concepts
        self.check_concepts(concepts.loaded, session.prompts.texts)
        if len(concepts.subjects) < 2:
            return Merge().start(session)
        if any(concept.region for concept in concepts.concepts):
            warn_once("freefuse ignores regions and finds subjects by itself; method='regional' uses regions")
        text = one_text(session, concepts.weights_of(range(len(concepts.loaded))))
        subjects, conditional = list(concepts.subjects), text.conditional()
        phrases, triggers = conditional.phrase_mask[..., subjects], conditional.trigger_mask[..., subjects]
        lacking = (phrases.sum(dim=1) == 0).any(dim=0).tolist()
        wordless = [concepts.loaded[i] for i, lacks in zip(concepts.subjects, lacking, strict=True) if lacks]
        if wordless:
            raise _wordless(wordless, session.prompts.texts or ())
        words = phrases
        if self.words == "class_word":
            nouns = phrases - triggers  # 0 where token positions are given, or the prompt has no class word
            words = torch.where((nouns > 0).any(dim=1, keepdim=True), nouns, phrases)
        styles = constant_gates(session, concepts.with_styles(()))
        return Fusing(self, session, session.denoiser.prepare(Pass(text, styles)), phrases, words)


def _wordless(lacking: Sequence[Described], prompts: Sequence[str]) -> ValueError:
    names = ", ".join(each.concept.name for each in lacking)
    return ValueError(
        f"freefuse finds each subject by its words, and has none of {names}: {missing_trigger(lacking[0], prompts)}"
    )


@dataclass
class Fusing:
    """The process of FreeFuse for one call.

    Attributes:
        base: The pass without LoRAs of subjects.
        phrases: 1 at the trigger and class word of each subject. Shape: [images, tokens, subjects].
        words: 1 at the tokens that show where it is. The same shape.
        masks: The masks of all concepts on the map grid. Shape: [images, concepts, height, width], bool.
        passes: The process that denoises the images.
    """

    settings: FreeFuse
    session: Session
    base: PreparedPass
    phrases: Tensor
    words: Tensor
    masks: Tensor | None = None
    passes: FixedPasses | None = None

    @property
    def text(self) -> Conditioning:
        """The text that callbacks see."""
        return self.base.spec.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Finds the masks; the latents stay as they are."""
        canvas, concepts = self.session.canvas, self.session.concepts
        maps = self._maps(latents, first)
        assert maps.output is not None, "the request names a layer"
        similarities = similarity(maps.text, maps.output, self.settings.share, self.settings.temperature)
        masks = balanced(similarities.unflatten(2, grid_at(canvas.latent_grid, canvas.map_level)).cpu())
        self.masks = masks.new_ones(len(masks), len(concepts.loaded), *masks.shape[2:], dtype=torch.bool)
        self.masks[:, list(concepts.subjects)] = masks.bool()
        masks = masks.to(canvas.device)
        self.passes = FixedPasses(self.session, [[(self._masked(masks), 1.0)]])
        return latents

    def _maps(self, latents: Tensor, first: Step) -> AttentionMaps:
        """Attention to each subject, and the output of self-attention, in the last of the steps without LoRAs."""
        session, words = self.session, self.words / self.words.sum(dim=1, keepdim=True)
        layer, output_layer = block_read(session.canvas.backbone)
        request = MapRequest(words, layers=(layer,), output_layer=output_layer)
        steps = drafted(session, latents, first, self.base, request, self.settings.length, of_last=True)
        (maps,) = steps.maps
        return maps

    def _masked(self, masks: Tensor) -> Pass:
        """The pass with LoRAs and biases. Shape of the masks: [images, subjects, height, width]."""
        session, text, settings = self.session, self.text, self.settings
        concepts, canvas, branches = session.concepts, session.canvas, text.rows // text.images
        shares = {
            level: F.interpolate(masks, grid_at(canvas.latent_grid, level), mode="bilinear").flatten(2).transpose(1, 2)
            for level in canvas.levels
        }
        weights = concepts.weights_of(range(len(concepts.loaded))).to(canvas.device)
        weights = acting_rows(text, settings.rows).to(canvas.device) * weights
        image: dict[int, Tensor] = {}
        # In one sequence text is changed like the image, so no LoRA changes the words of other subjects.
        tokens, modulation = weights.new_ones(1), None
        if canvas.backbone.joint is not None:
            tokens, modulation = self._own_tokens(weights), weights[:, 0] * self._styles(weights)
        for level, share in shares.items():
            by_concept = share.new_ones(*share.shape[:2], len(concepts.loaded))
            by_concept[..., list(concepts.subjects)] = share
            image[level] = weights * by_concept.repeat(branches, 1, 1)
        on_all = settings.rows == "all"
        bias = region_bias(text, shares, self.phrases, settings.own_bias, settings.other_bias, on_all_rows=on_all)
        gates = Gates(weights * tokens, image, weights[:, 0], canvas.latent_grid, modulation=modulation)
        return Pass(text, gates, text_bias=bias)

    def _own_tokens(self, weights: Tensor) -> Tensor:
        """0 at the words of other subjects. Shape: [rows, tokens, concepts]."""
        others = self.phrases.sum(dim=2, keepdim=True) - self.phrases
        gates = weights.new_ones(*others.shape[:2], weights.shape[-1])
        gates[..., list(self.session.concepts.subjects)] = 1 - others.clamp(max=1)
        return gates.repeat(self.text.rows // self.text.images, 1, 1)

    def _styles(self, weights: Tensor) -> Tensor:
        """1 for concepts that act everywhere. Shape: [concepts]."""
        return torch.tensor([float(concept.is_style) for concept in self.session.concepts.concepts]).to(weights.device)

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """One pass with LoRAs and biases."""
        assert self.passes is not None, "prepare comes before the first step"
        assert self.masks is not None, "prepare comes before the first step"
        self.session.log.keep_masks(step.index, self.masks)
        return self.passes.step(latents, step)


def block_read(backbone: Backbone) -> tuple[str, str]:
    """The attention layers that show where subjects are: one for attention to words, one for the output at the cells.

    On UNets the fourth block of the up path on the map grid, or the last where there are fewer. On SDXL that is
    `up_blocks.0.attentions.0.transformer_blocks.3`, which the authors chose; on SD 1.x and 2.x the third. On
    transformers the last block of the first kind, of FLUX the last one with two streams, as in the authors' code.
    """
    by_block = {name.removesuffix(".attn1"): name for name in backbone.self_map_layers}
    if backbone.joint is not None:
        kind = backbone.word_layers[0].partition(".")[0]
        *_, layer = (name for name in backbone.word_layers if name.startswith(f"{kind}."))
        return layer, layer
    known = [name for name in backbone.map_layers if name.removesuffix(".attn2") in by_block]
    up = [name for name in known if name.startswith("up_")]
    layer = up[min(3, len(up) - 1)] if up else known[-1]
    return layer, by_block[layer.removesuffix(".attn2")]


def similarity(attention: Tensor, features: Tensor, share: float, temperature: float | None) -> Tensor:
    """How alike cells are to those that attend most to a subject, compared with the others.

    Args:
        attention: Attention of the cells to the words of each subject. Shape: [images, cells, subjects].
        features: Shape: [images, cells, channels].
        share: Fraction of the cells that stand for a subject, at least one cell.
        temperature: Divides similarities; None makes their standard deviation over cells 1, root mean square over the
            subjects of an image.

    Returns:
        The mean over the cells is 1. Shape: [images, subjects, cells].
    """
    cells, subjects = attention.shape[1:]
    contrast = (subjects + 1) * attention - attention.sum(dim=2, keepdim=True)
    best = contrast.topk(max(1, int(share * cells)), dim=1).indices
    stand = torch.zeros_like(contrast).scatter(1, best, 1.0 / best.shape[1])
    alike = stand.transpose(1, 2) @ features @ features.transpose(1, 2)
    if temperature is None:
        spread = alike.var(dim=2, correction=0).mean(dim=1)[:, None, None].sqrt()
        alike = alike / spread.clamp(min=torch.finfo(alike.dtype).tiny)
    else:
        alike = alike / temperature
    return cells * torch.softmax(alike, dim=2)


_SDXL_CELLS = 1024
"""Cells of the block at 1024 pixels, for which the authors' weights were chosen: there a map has the mean 1 / 1024."""
_NEARNESS = _VOTES = 3e-5 * _SDXL_CELLS
_WIDTH = 1.3
_MOMENTUM = 0.2
_ROUNDS = 15


def balanced(maps: Tensor) -> Tensor:
    """Divides the cells between subjects, each of which gets about as many.

    In each round the subjects that have too many cells lose a little everywhere. Nearness to the centre of a subject's
    cells, and the neighbours of a cell, count for little, and decide where maps do not.

    Args:
        maps: A map of each subject, with the mean 1. Shape: [images, subjects, height, width].

    Returns:
        1 at the cells of a subject; each cell belongs to one. Shape: as the maps.
    """
    subjects, height, width = maps.shape[1:]
    down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width) * _WIDTH, indexing="ij")
    neighbours = torch.full((subjects, 1, 3, 3), 1 / 8)
    neighbours[..., 1, 1] = 0
    span = (maps.amax(dim=(1, 2, 3)) - maps.amin(dim=(1, 2, 3))).clamp(min=1e-4 * _SDXL_CELLS)
    handicap, soft, scores = torch.zeros(len(maps), subjects, 1, 1), _relative(maps, (2, 3)), maps
    for i in range(_ROUNDS):
        soft = (1 - _MOMENTUM) * _relative(scores - handicap, 1) + _MOMENTUM * soft
        mass = soft.sum(dim=(2, 3), keepdim=True) + 1e-6
        y, x = ((soft * axis).sum(dim=(2, 3), keepdim=True) / mass for axis in (down, across))
        count = _one_hot(scores - handicap).sum(dim=(2, 3), keepdim=True)
        pace = 0.01 * 0.95**i * span[:, None, None, None]
        handicap = handicap + pace * torch.sign(count - height * width / subjects)
        votes = F.conv2d(soft, neighbours, padding=1, groups=subjects)
        scores = maps - handicap + _VOTES * votes - _NEARNESS * ((down - y).square() + (across - x).square())
    return _one_hot(scores)


def _relative(scores: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    low, high = scores.amin(dim=dim, keepdim=True), scores.amax(dim=dim, keepdim=True)
    return (scores - low) / (high - low + 1e-8 * _SDXL_CELLS)


def _one_hot(scores: Tensor) -> Tensor:
    return F.one_hot(scores.argmax(dim=1), scores.shape[1]).movedim(-1, 1).to(scores.dtype)
