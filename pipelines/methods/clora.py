"""CLoRA: every concept's LoRA where the attention to its words is; no layout is needed.

Meral et al., "CLoRA: A Contrastive Approach to Compose Multiple LoRA Models", arXiv 2403.19776. N concepts make N + 1
branches of the same latents z. Branch 0 has no concept's LoRA and reads the prompt without triggers; branch n has the
LoRA and the trigger of concept n. All of them name all concepts by their class words, so all see the whole picture.

    groups:      the attention maps A of a concept's words in all branches belong together
    loss:        L = mean over pairs of maps of a group of -log(e^(s/t) / (e^(s/t) + sum over other groups e^(s'/t)))
    updates:     z <- z - alpha dL/dz, repeated at some steps
    masks:       M_n = union over the words of n in branch n of [A > theta max A]; M_0 = what nobody claims
    fusion:      e = sum_n M_n e_n / sum_n M_n, of what the branches predict ("branches")

Beyond the paper, the masks can be the regions of one pass ("regions"): cells of M_n read the text of branch n and have
its LoRA, as in LoRA-Composer. That costs two rows, whatever the number of concepts, and lets concepts see each other.

`Clora.official` is what the authors' code does. `docs/methods/clora.md` shows what each part contributes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention import Gates, Layout, Partition, Recorder, grid_at
from lora_compose.attention.masks import closed, dilated, eroded, opened, strongest
from lora_compose.pipelines.branches import Branch, branches_of
from lora_compose.pipelines.casts import ByCast
from lora_compose.pipelines.conditioning import Conditioning, join_branches, stack_texts
from lora_compose.pipelines.engine import Engine, Gradient, Prediction
from lora_compose.pipelines.losses import contrast, smooth
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.process import Process, acting, say_once, say_unread
from lora_compose.pipelines.methods.region_gates import region_gates
from lora_compose.pipelines.regions import Regions
from lora_compose.pipelines.scene import Concept
from lora_compose.pipelines.tokens import Mention

Fuse = Literal["regions", "branches"]
Uncond = Literal["shared", "each"]
StepRule = Literal["raw", "rms"]
Change = Literal["dilate", "erode", "open", "close"]
_CHOICES = {"fuse": Fuse, "uncond": Uncond, "step_rule": StepRule}
_CHANGES = {"dilate": dilated, "erode": eroded, "open": opened, "close": closed}


@dataclass(frozen=True)
class Clora:
    """Every LoRA acts where the model looks for its concept, and concepts are moved apart; no layout is needed.

    Schedules are parts of the steps, or numbers of steps where they are above 1.

    Attributes:
        fuse: "branches" takes the predictions of all branches, each under its mask, as published; "regions" runs one
            pass, in which every mask is a region with the text and the LoRA of its branch.
        uncond: The uncond rows: "shared", one for all branches, without concepts; "each", one for each branch with its
            LoRA, as published. "regions" has no use for it.
        step_size: Size alpha of an update of the latents; 0 switches updates off.
        step_rule: "raw" multiplies the gradient, as published; "rms" a gradient of root mean square 1.
        update_until: Latents are updated before this part of the steps.
        refine_at: Steps with further updates.
        refinements: How many more these are.
        temperature: t of the loss.
        threshold: theta, the share of a map's maximum from which on a cell belongs to the mask.
        smoothed: Whether maps are smoothed before that.
        exclusive: Whether a cell that several concepts claim goes to the one whose map is highest there, relative to
            its maximum; otherwise it is theirs in equal parts.
        morphology: Changes of the masks, in this order: "dilate", "erode", "open", "close", each by one cell.
        mask_from: Before this part of the steps all branches are averaged everywhere. For "branches".
        mask_until: After this part of the steps masks stay as they are.
        isolate: Whether the cells of a mask see no other mask in self-attention. For "regions".
        whole: Updates as the authors do them: the UNet runs to its end, on both halves of guidance, whose maps are
            averaged, and what it has predicted before the last update is used after it. For "branches".
        branches_at_once: How many rows per image are run together; fewer need less memory and give the same numbers,
            and updates run twice. None is all.
        base_prompt: What branch 0 reads, instead of the prompt without triggers. `Concept.prompt` is what a concept's
            own branch reads, and `Concept.negative_prompt` its negative prompt where each branch has uncond rows.
        words: By name of a concept, the words that name it in all branches, instead of its trigger and class word.
        mask_words: By name of a concept, the words in its own branch that make its mask, instead of those.
    """

    fuse: Fuse = "regions"
    uncond: Uncond = "shared"
    step_size: float = 0.05
    step_rule: StepRule = "rms"
    update_until: float = 0.5
    refine_at: Sequence[float] = ()
    refinements: int = 20
    temperature: float = 0.5
    threshold: float = 0.3
    smoothed: bool = False
    exclusive: bool = True
    morphology: Sequence[Change] = ()
    mask_from: float = 0.0
    mask_until: float = 0.5
    isolate: bool = False
    whole: bool = False
    branches_at_once: int | None = None
    base_prompt: str | None = None
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    mask_words: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}")
        for name in ("step_size", "update_until", "mask_from", "mask_until", "refinements"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, and it is {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, not {self.threshold}")
        if any(not 0 <= part < math.inf for part in self.refine_at):
            raise ValueError(f"refine_at names parts of the steps, none of them negative, not {list(self.refine_at)}")
        if unknown := [change for change in self.morphology if change not in _CHANGES]:
            raise ValueError(f"morphology may be {', '.join(_CHANGES)}, not {', '.join(map(str, unknown))}")
        if self.branches_at_once is not None and self.branches_at_once < 1:
            raise ValueError(f"branches_at_once must be at least 1, not {self.branches_at_once}")
        if self.fuse == "regions" and (self.whole or self.uncond == "each" or self.mask_from > 0):
            raise ValueError('whole, uncond="each" and mask_from are for fuse="branches"')

    @classmethod
    def official(cls) -> "Clora":
        """What the authors' code does in their notebook, in parts of the steps, without its mistakes.

        The step at which updates end and those with refinement are the paper's 25, 0, 10 and 20 of 50.
        """
        return cls(
            fuse="branches",
            uncond="each",
            step_size=20.0,
            step_rule="raw",
            update_until=0.5,
            refine_at=(0.0, 0.2, 0.4),
            refinements=20,
            threshold=0.4,
            smoothed=False,
            exclusive=False,
            mask_until=1.0,
            whole=True,
        )

    def start(self, engine: Engine) -> Process:
        """Encodes a text for every branch. A single subject has nobody to be told from: its LoRA acts everywhere."""
        self._check_words([engine.concepts[i].name for i in engine.subjects])
        if engine.differ:
            return ByCast.start(engine, lambda part: self._with_words_of(part.concepts).start(part))
        subjects = engine.subjects
        if len(subjects) < 2:
            return Merge().start(engine)
        if engine.prompts is None:
            raise ValueError("clora makes a text for each branch, so it needs the prompt as text, not embeddings")
        if any(concept.region for concept in engine.concepts):
            say_once("clora finds out itself where concepts are; method='lora-composer' uses regions")
        styles = [concept for concept in engine.concepts if concept.is_style]
        say_unread(styles, styles, "a style has no branch, and acts in those of the subjects")
        branches = branches_of(
            engine.prompts, engine.concepts, subjects, base_prompt=self.base_prompt, words=self.words
        )
        words = self._words(engine, branches)
        texts = [self._encode(engine, branch) for branch in branches]
        joined = join_branches(texts, unconds=texts if self.uncond == "each" else texts[:1])
        joined = replace(joined, at_once=self.branches_at_once)
        by_image = [
            stack_texts(texts).of_image(image) for image in range(engine.images if self.fuse == "regions" else 0)
        ]
        return Contrasting(self, engine, subjects, joined, self._gates(engine, branches, joined), words, by_image)

    def _with_words_of(self, concepts: Sequence[Concept]) -> "Clora":
        """The same without words of others."""
        names = {concept.name for concept in concepts}
        words, mask_words = (
            {name: listed for name, listed in given.items() if name in names} for given in (self.words, self.mask_words)
        )
        return replace(self, words=words, mask_words=mask_words)

    def _check_words(self, subjects: Sequence[str]) -> None:
        for name, given in (("words", self.words), ("mask_words", self.mask_words)):
            if unknown := given.keys() - set(subjects):
                raise ValueError(f"{name} names {sorted(unknown)}; the subjects are {', '.join(subjects)}")
            if wrong := [concept for concept, listed in given.items() if isinstance(listed, str) or not listed]:
                raise ValueError(f"{name} of {wrong[0]!r} must be a list of words, not {given[wrong[0]]!r}")

    def _encode(self, engine: Engine, branch: Branch) -> Conditioning:
        own = None if branch.owner is None else engine.concepts[branch.owner].negative_prompt
        if own is not None and self.fuse == "branches" and self.uncond == "shared":
            say_once(
                "clora reads own negative prompts only where each branch has uncond rows of its own (uncond='each')"
            )
        negatives = None if own is None else [own] * len(branch.prompts)
        weights = _weights(engine, branch)
        return engine.encode(weights, branch.prompts, negatives, branch.names, branch.mentions)

    def _gates(self, engine: Engine, branches: Sequence[Branch], conditioning: Conditioning) -> Gates:
        """On every branch's rows its own LoRA and the styles, on all tokens and cells."""
        live = torch.cat([_weights(engine, branch) for branch in branches])
        unconds = live if self.uncond == "each" else torch.zeros(1, live.shape[1])
        parts = torch.cat([unconds[: conditioning.unconds], live])
        gate = parts.repeat_interleave(conditioning.images, dim=0).to(engine.device)[:, None]
        return Gates(gate, dict.fromkeys(engine.levels, gate), gate[:, 0], engine.latent_grid)

    def _words(self, engine: Engine, branches: Sequence[Branch]) -> "Words":
        """A map for every token that names a concept."""
        rows: list[dict[int, tuple[int, bool]]] = []  # by branch and image: token -> (concept, whether it makes masks)
        for branch in branches:
            named = engine.find(branch.prompts, branch.names, branch.mentions).phrase
            masking = self._masking(engine, branch, named)
            for prompt in range(len(branch.prompts)):
                _check_apart(named[prompt], branch.prompts[prompt], engine.concepts)
                found = {token: (concept, False) for token, concept in named[prompt].nonzero().tolist()}
                found |= {token: (found.get(token, (-1, False))[0], True) for token in masking[prompt]}
                rows += [found] * engine.images_per_prompt
        most, tokens = max(map(len, rows)), engine.token_masks.phrase.shape[1]
        readout, groups = torch.zeros(len(rows), tokens, most), torch.full((len(rows), most), -1)
        mine = torch.zeros(len(rows), most, dtype=torch.bool)
        for row, found in enumerate(rows):
            for column, (token, (concept, masks)) in enumerate(sorted(found.items())):
                readout[row, token, column], groups[row, column], mine[row, column] = 1, concept, masks
        by_branch = (len(branches), -1)
        return Words(
            readout.to(engine.device),
            groups.unflatten(0, by_branch).transpose(0, 1).flatten(1).to(engine.device),
            mine.unflatten(0, by_branch)[1:].transpose(0, 1).to(engine.device),
        )

    def _masking(self, engine: Engine, branch: Branch, named: Tensor) -> list[list[int]]:
        """The tokens that make the mask of a branch, by prompt."""
        if branch.owner is None:
            return [[] for _ in branch.prompts]
        name = engine.concepts[branch.owner].name
        if name in self.mask_words:
            mention = {name: Mention(tuple(self.mask_words[name]))}
            named = engine.find(branch.prompts, (), [mention] * len(branch.prompts)).phrase
        return [prompt[:, branch.owner].nonzero()[:, 0].tolist() for prompt in named]


def _weights(engine: Engine, branch: Branch) -> Tensor:
    """The weights of a branch's owner, if it has one, and of the styles. Shape: [1, concepts]."""
    owner = () if branch.owner is None else (branch.owner,)
    return acting(engine, [owner] * len(branch.prompts))


def _check_apart(named: Tensor, prompt: str, concepts: Sequence[Concept]) -> None:
    """Raises ValueError if a token names two concepts. Shape of named: [tokens, concepts]."""
    for row in named:
        if row.sum() > 1:
            both = " and ".join(concept.name for concept, mine in zip(concepts, row, strict=True) if mine)
            raise ValueError(f"the same word of {prompt!r} names {both}; clora tells concepts apart by their words")


@dataclass(frozen=True, eq=False)
class Words:
    """Which tokens get a map, and what for.

    Attributes:
        readout: One token for every map, by branch and image. Shape: [branches * images, tokens, maps].
        groups: The concept whose map it is; -1 for none. Shape: [images, branches * maps].
        mine: Whether it makes the mask of the branch. Shape: [images, subjects, maps].
    """

    readout: Tensor
    groups: Tensor
    mine: Tensor


@dataclass
class Contrasting:
    """The process of CLoRA for one call.

    Attributes:
        settings: The settings.
        engine: Runs the UNet.
        subjects: Indices of the concepts that have a branch.
        conditioning: All branches.
        gates: Whose LoRA acts on the rows of which branch.
        words: Which maps are whose.
        texts: By image, the branches' texts, among which regions choose; none for fusing branches.
        masks: Where each subject is, on the map grid; None before the first. Shape: [images, subjects, height, width].
        regions: By image, the masks as regions.
    """

    settings: Clora
    engine: Engine
    subjects: tuple[int, ...]
    conditioning: Conditioning
    gates: Gates
    words: Words
    texts: Sequence[Conditioning]
    masks: Tensor | None = None
    regions: "Sequence[InRegions]" = ()

    def prepare(self, latents: Tensor) -> Tensor:
        """Says which refinements there will not be."""
        settings = self.settings
        late = [part for part in settings.refine_at if self._at(part) >= self._until(settings.update_until)]
        if late and settings.step_size > 0:
            say_once(
                f"refine_at {late} lies after the last update (update_until={settings.update_until}) and is left out"
            )
        return latents

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Updates; masks from the maps of before the last of them; then the prediction."""
        latents, maps, prediction = self._update(latents, t)
        if self.settings.fuse == "branches":
            return latents, self._by_branches(latents, t, maps, prediction)
        return latents, self._by_regions(latents, t, maps)

    def _update(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None, Prediction | None]:
        """All updates of a step, with the maps and the prediction of before the last one, if there are any."""
        settings, found, recorder = self.settings, None, None
        for _ in range(self._updates):
            recorder = self._recorder(self._all_rows if settings.whole else self.words.readout)
            found = self.engine.gradient(
                latents, t, self.conditioning, self.gates, recorder, self.loss, whole=settings.whole
            )
            latents = (latents - settings.step_size * self._direction(found)).to(latents.dtype)
        if found is None or recorder is None:
            return latents, None, None
        return latents, self._maps(recorder).detach(), found.prediction

    @property
    def _updates(self) -> int:
        """How many updates this step has."""
        settings, step = self.settings, self.engine.step
        if settings.step_size == 0 or step >= self._until(settings.update_until) or self.engine.second_pass:
            return 0
        refined = step in map(self._at, settings.refine_at)
        return 1 + settings.refinements if refined else 1

    def _direction(self, found: Gradient) -> Tensor:
        if self.settings.step_rule == "raw":
            return found.direction
        return found.direction / found.direction.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)

    def loss(self, recorder: Recorder) -> Tensor:
        """The contrastive loss. Shape: [images]."""
        maps = self._maps(recorder).transpose(0, 1).flatten(1, 2)
        return contrast(maps, self.words.groups, self.settings.temperature)

    def _by_branches(self, latents: Tensor, t: Tensor, maps: Tensor | None, prediction: Prediction | None) -> Tensor:
        """The mean of what the branches predict, each under its mask, for both halves of guidance."""
        if prediction is None:
            recorder = self._recorder(self._all_rows) if maps is None and self._masks_due else None
            prediction = self.engine.unet(latents, t, self.conditioning, self.gates, record=recorder)
            maps = maps if recorder is None else self._maps(recorder)
        self._keep(maps)
        shares = self._shares()
        uncond, cond = prediction.parts
        if len(uncond) == len(cond):
            uncond = (uncond * shares).sum(dim=0, keepdim=True)
        fused = torch.cat([*uncond, (cond * shares).sum(dim=0)]).to(prediction.model_output.dtype)
        return self.engine.guide(replace(prediction, model_output=fused, unconds=len(uncond)))

    def _shares(self) -> Tensor:
        """How much of a cell is whose branch's. Shape: [branches, images, 1, height, width]."""
        branches = len(self.subjects) + 1
        if self.masks is None or self.engine.step < self._until(self.settings.mask_from):
            return torch.full((branches, 1, 1, 1, 1), 1 / branches, device=self.engine.device)
        unclaimed = ~self.masks.any(dim=1, keepdim=True)
        masks = F.interpolate(torch.cat([unclaimed, self.masks], dim=1).float(), self.engine.latent_grid)
        return (masks / masks.sum(dim=1, keepdim=True)).transpose(0, 1)[:, :, None]

    def _by_regions(self, latents: Tensor, t: Tensor, maps: Tensor | None) -> Tensor:
        """One pass, for every image its own, since every image has other regions."""
        if maps is None and self._masks_due:
            recorder = self._recorder(self.words.readout)
            self.engine.observe(latents, t, self.conditioning, self.gates, recorder)
            maps = self._maps(recorder)
        self._keep(maps)
        guided = []
        for image, region in enumerate(self.regions):
            here = latents[image : image + 1]
            prediction = self.engine.unet(here, t, region.text, region.gates, region.layout, image=image)
            guided.append(self.engine.guide(prediction))
        return torch.cat(guided)

    def _keep(self, maps: Tensor | None) -> None:
        """Takes masks from maps while they still change."""
        if maps is not None and self._masks_due:
            self.masks = self._found(maps[1:].transpose(0, 1))
            if self.settings.fuse == "regions":
                masks = F.interpolate(self.engine.found(self.masks).float(), self.engine.latent_grid)
                self.regions = [self._region(text, mask) for text, mask in zip(self.texts, masks, strict=True)]
        if self.masks is not None:
            by_concept = [torch.ones_like(self.masks[:, 0])] * len(self.engine.concepts)
            for i, mask in zip(self.subjects, self.masks.unbind(dim=1), strict=True):
                by_concept[i] = mask
            self.engine.keep_masks(torch.stack(by_concept, dim=1))

    def _found(self, maps: Tensor) -> Tensor:
        """Masks of all subjects.

        Args:
            maps: Of the subjects' own branches. Shape: [images, subjects, maps, height, width].

        Returns:
            Shape: [images, subjects, height, width], bool.
        """
        maps = smooth(maps) if self.settings.smoothed else maps
        mine = self.words.mine[..., None, None]
        masks = (strongest(maps, self.settings.threshold) & mine).any(dim=2)
        for change in self.settings.morphology:
            masks = _CHANGES[change](masks)
        if not self.settings.exclusive:
            return masks
        heights = (maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-20) * mine).amax(dim=2)
        return masks & torch.zeros_like(masks).scatter_(1, heights.argmax(dim=1, keepdim=True), True)

    def _region(self, text: Conditioning, masks: Tensor) -> "InRegions":
        """Subject n's mask as region n. Shape of masks: [subjects, height, width] on the latent grid."""
        regions = Regions.of_masks(self.subjects, masks, self.engine.levels, threshold=1.0)
        partitions = {
            level: Partition.of(cells.flatten(0, 1), self.engine.device) for level, cells in regions.cells.items()
        }
        gates = region_gates(self.engine, text, regions)
        if self.regions:  # the same text gates, so that keys and values are kept for the whole call
            gates = replace(gates, text=self.regions[0].gates.text)
        return InRegions(text, gates, Layout(partitions, inject=True, isolate=self.settings.isolate))

    @property
    def _masks_due(self) -> bool:
        return self.masks is None or self.engine.step < self._until(self.settings.mask_until)

    def _at(self, part: float) -> int:
        """The step at a part of all steps; above 1 it is the number of a step."""
        return int(_share(part, self.engine))

    def _until(self, part: float) -> int:
        """The first step after a part of all steps; above 1 it is a number of steps."""
        return math.ceil(_share(part, self.engine))

    @cached_property
    def _all_rows(self) -> Tensor:
        """The readout with the uncond rows in front: empty for shared ones, as of their branch for those of each."""
        readout = self.words.readout
        unconds = readout if self.settings.uncond == "each" else torch.zeros_like(readout[: self.engine.images])
        return torch.cat([unconds, readout])

    def _recorder(self, readout: Tensor) -> Recorder:
        rows = readout if self.engine.guided else readout[-len(self.words.readout) :]
        return Recorder(self.engine.map_layers, rows)

    def _maps(self, recorder: Recorder) -> Tensor:
        """The maps of all branches; of both halves of guidance where updates see both.

        Returns:
            Shape: [branches, images, maps, height, width].
        """
        grid, branches = grid_at(self.engine.latent_grid, self.engine.map_level), len(self.subjects) + 1
        maps = recorder.mean().transpose(1, 2).unflatten(2, grid).unflatten(0, (-1, self.engine.images))
        if self.settings.whole and len(maps) == 2 * branches:
            return (maps[:branches] + maps[branches:]) / 2
        return maps[-branches:]


@dataclass(frozen=True, eq=False)
class InRegions:
    """What the pass of one image needs.

    Attributes:
        text: Text 0 for what nobody claims, text 1 + n for subject n.
        gates: Every LoRA in its region.
        layout: The regions.
    """

    text: Conditioning
    gates: Gates
    layout: Layout


def _share(part: float, engine: Engine) -> float:
    """A part of all steps, free of what floating point adds to 0.28 * 25; above 1 it is a number of steps."""
    return round(part * len(engine.timesteps), 6) if part <= 1 else part
