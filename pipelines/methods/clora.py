"""CLoRA: every LoRA acts where the attention to its concept's words is; no regions are needed.

Meral et al., "CLoRA: A Contrastive Approach to Compose Multiple LoRA Models", arXiv 2403.19776. N concepts make N + 1
branches of the same latents z. Branch 0 has no concept's LoRA and reads the prompt without triggers; branch n has the
LoRA and the trigger of concept n. All branches name all concepts by their class words, so each sees the whole image.

    groups:      the attention maps A of a concept's words in all branches belong together
    loss:        L = mean over pairs of maps of a group of -log(e^(s/t) / (e^(s/t) + sum over other groups e^(s'/t)))
    updates:     z <- z - alpha dL/dz, repeated at some steps
    masks:       M_n = union over the words of n in branch n of [A > theta max A]; M_0 = unclaimed cells
    fusion:      e = sum_n M_n e_n / sum_n M_n, of what the branches predict ("branches")

Beyond the paper, the masks can be the regions of one pass ("regions"): cells of M_n read the text of branch n and have
its LoRA, as in LoRA-Composer. That costs two rows per step, whatever the number of concepts, and concepts attend to
each other. `Clora.official` has the settings of the authors' code. `docs/methods/clora.md` measures the contribution of
each part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention import Gates, grid_at
from lora_compose.attention.device import to_device
from lora_compose.attention.masks import closed, coarse_mask, dilated, eroded, opened, smooth, thresholded
from lora_compose.pipelines.denoising.passes import AttentionMaps, Gradient, MapLoss, MapRequest, Pass
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.process import Needs, Process, Settings, check_choices, warn_unread
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.latent_update import StepRule, descend
from lora_compose.pipelines.methods.losses import contrast
from lora_compose.pipelines.methods.mapped_tokens import MappedTokens, check_words, map_tokens
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.region_pass import region_pass
from lora_compose.pipelines.scene.canvas import Step, steps_in
from lora_compose.pipelines.scene.regions import Regions
from lora_compose.pipelines.scene.rows import Rows
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.notes import warn_once
from lora_compose.pipelines.text.branches import Branch, branches_of
from lora_compose.pipelines.text.conditioning import Conditioning, join_branches, stack_texts
from lora_compose.pipelines.text.missing import Described

Fuse = Literal["regions", "branches"]
Uncond = Literal["shared", "each"]
Morphology = Literal["dilate", "erode", "open", "close"]
_CHANGES = {"dilate": dilated, "erode": eroded, "open": opened, "close": closed}


@dataclass(frozen=True)
class Clora(Settings):
    """Every LoRA acts where the model attends to its concept, and updates of the latents move concepts apart.

    `update_until`, `refine_at`, `mask_from` and `mask_until` are fractions of the steps, or step numbers if above 1.

    Attributes:
        fuse: "branches" takes the predictions of all branches, each under its mask, as published; "regions" runs one
            pass, in which every mask is a region with the text and the LoRA of its branch.
        uncond: Unconditional branches: "shared", one for all branches, without concepts; "each", one for each branch
            with its LoRA, as published. Has no effect with "regions".
        step_size: Size alpha of an update of the latents; 0 switches updates off.
        step_rule: "raw" multiplies the gradient, as published; "rms" a gradient of root mean square 1.
        update_until: Latents are updated before this point of the steps.
        refine_at: Steps with further updates.
        refinements: Number of further updates at those steps.
        temperature: t of the loss.
        threshold: theta; a cell belongs to the mask if the map is above this share of its maximum.
        smoothed: Whether maps are smoothed before the threshold.
        exclusive: Whether a cell in several masks goes to the concept whose map is highest there relative to its
            maximum; otherwise it is shared equally.
        morphology: Changes of the masks, in this order: "dilate", "erode", "open", "close", each by one cell.
        mask_from: Before this point of the steps all branches are averaged everywhere. For "branches".
        mask_until: After this point of the steps masks no longer change.
        isolate: Whether the cells of a mask see no other mask in self-attention. For "regions".
        whole: Updates as in the authors' code: full passes with conditional and unconditional branches, whose maps are
            averaged; the prediction from before the last update is reused. For "branches".
        branch_batch_size: Number of branches that are run together; None means all. Fewer need less memory and give the
            same result, but updates run every micro-batch twice.
        base_prompt: Prompt of branch 0, instead of the prompt without triggers. `Concept.prompt` is the prompt of a
            concept's own branch, and with uncond="each" `Concept.negative_prompt` is its negative prompt.
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
    morphology: Sequence[Morphology] = ()
    mask_from: float = 0.0
    mask_until: float = 0.5
    isolate: bool = False
    whole: bool = False
    branch_batch_size: int | None = None
    base_prompt: str | None = None
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    mask_words: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("step_size", "update_until", "mask_from", "mask_until", "refinements"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, and it is {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, not {self.threshold}")
        if any(not 0 <= part < math.inf for part in self.refine_at):
            raise ValueError(f"refine_at must be points of the steps, none negative, not {list(self.refine_at)}")
        if unknown := [change for change in self.morphology if change not in _CHANGES]:
            raise ValueError(f"morphology may be {', '.join(_CHANGES)}, not {', '.join(map(str, unknown))}")
        if self.branch_batch_size is not None and self.branch_batch_size < 1:
            raise ValueError(f"branch_batch_size must be at least 1, not {self.branch_batch_size}")
        if self.fuse == "regions" and (self.whole or self.uncond == "each" or self.mask_from > 0):
            raise ValueError('whole, uncond="each" and mask_from are for fuse="branches"')

    @classmethod
    def official(cls) -> "Clora":
        """The settings of the authors' notebook, as fractions of the steps, without its mistakes.

        Updates end at step 25 of 50, and steps 0, 10 and 20 have refinements, as in the paper.
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

    @property
    def needs(self) -> Needs:
        """Region attention where masks are regions, and gradients for updates."""
        updates = min(self.step_size, self.update_until) > 0
        return Needs(region_attention=self.fuse == "regions", gradients=updates)

    def check_concepts(self, concepts: Sequence[Described], prompts: Sequence[str] | None) -> None:
        """Every prompt needs the words that name each of several subjects in the branches of the others."""
        subjects = [i for i, each in enumerate(concepts) if not each.concept.is_style]
        if len(subjects) < 2:
            return
        if prompts is None:
            raise ValueError("clora makes a text for each branch, so it needs prompts, not prompt_embeds")
        self._branches(prompts, [each.concept for each in concepts], subjects)

    def _branches(self, prompts: Sequence[str], concepts: Sequence[Concept], subjects: Sequence[int]) -> list[Branch]:
        return branches_of(prompts, concepts, subjects, base_prompt=self.base_prompt, words=self.words)

    def start(self, session: Session) -> Process:
        """Encodes a text for every branch. A single subject is merged."""
        concepts, subjects = session.concepts, session.concepts.subjects
        whole = concepts.whole or concepts  # `words` may name concepts of other prompts
        check_words([whole.concepts[i].name for i in whole.subjects], words=self.words, mask_words=self.mask_words)
        if len(subjects) < 2:
            return Merge().start(session)
        self.check_concepts(concepts.loaded, session.prompts.texts)
        if any(concept.region for concept in concepts.concepts):
            warn_once("clora ignores regions and finds concepts by itself; method='lora-composer' uses regions")
        styles = [concepts.concepts[i] for i in concepts.styles]
        warn_unread(styles, styles, "a style has no branch, and acts in those of the subjects")
        branches = self._branches(session.prompts.texts or (), concepts.concepts, subjects)
        words = map_tokens(session, branches, self.mask_words)
        texts = [self._encode(session, branch) for branch in branches]
        joined = join_branches(texts, unconds=texts if self.uncond == "each" else texts[:1])
        gates = self._gates(session, branches, joined)
        prepared = session.denoiser.prepare(Pass(joined, gates, branch_batch_size=self.branch_batch_size))
        images = session.canvas.images if self.fuse == "regions" else 0
        by_image = [stack_texts(texts).of_image(image) for image in range(images)]
        return Contrasting(self, session, texts[0], prepared, words, by_image)

    def _encode(self, session: Session, branch: Branch) -> Conditioning:
        negative = None if branch.subject is None else session.concepts.concepts[branch.subject].negative_prompt
        if negative is not None and self.fuse == "branches" and self.uncond == "shared":
            warn_once("clora reads own negative prompts only where each branch has unconditional rows (uncond='each')")
        negatives = None if negative is None else [negative] * len(branch.prompts)
        weights = _weights(session, branch)
        return session.prompts.encode(weights, branch.prompts, negatives, branch.names, branch.mentions)

    def _gates(self, session: Session, branches: Sequence[Branch], text: Conditioning) -> Gates:
        """Gates for all tokens and cells: on the rows of each branch its own LoRA and the styles."""
        canvas = session.canvas
        live = torch.stack([_weights(session, branch) for branch in branches])
        unconds = live if self.uncond == "each" else torch.zeros(1, live.shape[1])
        rows = [live[row.branch] if row.conditional else unconds[row.branch] for row in text.roles.each]
        gate = torch.stack(rows).to(canvas.device)[:, None]
        return Gates(gate, dict.fromkeys(canvas.levels, gate), gate[:, 0], canvas.latent_grid)


def _weights(session: Session, branch: Branch) -> Tensor:
    """The weights of a branch's subject, if it has one, and of the styles. Shape: [concepts]."""
    return session.concepts.with_styles(() if branch.subject is None else (branch.subject,))


@dataclass
class Contrasting:
    """The process of CLoRA for one call.

    Attributes:
        text: The text of the base branch.
        branches: The pass of all branches.
        words: The mapped tokens, and the concept of each map.
        texts: By image, the branches' texts for region attention; empty with fuse="branches".
        masks: The mask of each subject, on the map grid; None before the first. Shape: [images, subjects, height,
            width].
        regions: By image, the pass with the masks as regions.
    """

    settings: Clora
    session: Session
    text: Conditioning
    branches: PreparedPass
    words: MappedTokens
    texts: Sequence[Conditioning]
    masks: Tensor | None = None
    regions: Sequence[PreparedPass] = ()

    @property
    def subjects(self) -> tuple[int, ...]:
        """Indices of the concepts that have a branch."""
        return self.session.concepts.subjects

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Warns of refinements that lie after the last update."""
        settings = self.settings
        last = math.ceil(steps_in(settings.update_until, first.count))
        late = [part for part in settings.refine_at if int(steps_in(part, first.count)) >= last]
        if late and settings.step_size > 0:
            warn_once(
                f"refine_at {late} lies after the last update (update_until={settings.update_until}) and is left out"
            )
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Updates the latents, makes masks from the maps before the last update, and predicts."""
        latents, gradient = self._update(latents, step)
        if self.settings.fuse == "branches":
            return latents, self._by_branches(latents, step, gradient)
        return latents, self._by_regions(latents, step, gradient)

    def _update(self, latents: Tensor, step: Step) -> tuple[Tensor, Gradient | None]:
        """All updates of a step, with what was found before the last one, if there are any."""
        settings, gradient = self.settings, None
        request = self._all_rows(step) if settings.whole else MapRequest(self.words.token_weights)
        updates, wants_masks = self._updates(step), settings.fuse == "regions" and self._masks_due(step)
        for left in reversed(range(updates)):
            readout = self._masks_of if wants_masks and not left else None
            wanted = MapLoss(request, self.loss, settings.whole, readout)
            gradient = self.session.denoiser.gradient(latents, step, self.branches, wanted)
            latents = descend(latents, gradient.direction, settings.step_size, settings.step_rule)
        return latents, gradient

    def _updates(self, step: Step) -> int:
        """Number of updates in a step."""
        settings = self.settings
        if settings.step_size == 0 or not step.within(settings.update_until) or step.second_order:
            return 0
        refined = step.index in (int(steps_in(part, step.count)) for part in settings.refine_at)
        return 1 + settings.refinements if refined else 1

    def loss(self, maps: AttentionMaps) -> Tensor:
        """The contrastive loss. Shape: [images]."""
        by_image = self._by_branch(maps).transpose(0, 1).flatten(1, 2)
        return contrast(by_image, self.words.groups, self.settings.temperature)

    def _by_branches(self, latents: Tensor, step: Step, gradient: Gradient | None) -> Tensor:
        """The mean of the branches' predictions under their masks, with guidance."""
        prediction, maps = (None, None) if gradient is None else (gradient.prediction, gradient.maps)
        if prediction is None:
            request = self._all_rows(step) if maps is None and self._masks_due(step) else None
            prediction = self.session.denoiser.predict(latents, step, self.branches, request)
            maps = maps or prediction.maps
        if maps is not None and self._masks_due(step):
            self.masks = self._masks_of(maps) > 0
        self._log_masks(step)
        shares = self._shares(step)
        uncond, cond = prediction.branches
        if len(uncond) == len(cond):
            uncond = (uncond * shares).sum(dim=0, keepdim=True)
        fused = torch.cat([*uncond, (cond * shares).sum(dim=0)]).to(prediction.model_output.dtype)
        rows = Rows.of(cond.shape[1], len(uncond))
        return self.session.guider.combine(replace(prediction, model_output=fused, rows=rows), step)

    def _shares(self, step: Step) -> Tensor:
        """The share of each branch in a cell. Shape: [branches, images, 1, height, width]."""
        branches, canvas = len(self.subjects) + 1, self.session.canvas
        if self.masks is None or step.within(self.settings.mask_from):
            return torch.full((branches, 1, 1, 1, 1), 1 / branches, device=canvas.device)
        unclaimed = ~self.masks.any(dim=1, keepdim=True)
        masks = F.interpolate(torch.cat([unclaimed, self.masks], dim=1).float(), canvas.latent_grid)
        return (masks / masks.sum(dim=1, keepdim=True)).transpose(0, 1)[:, :, None]

    def _by_regions(self, latents: Tensor, step: Step, gradient: Gradient | None) -> Tensor:
        """One pass per image, since each image has its own regions.

        New masks come to the host, which divides the grids by them; with those of an update it has not to wait again.
        """
        if self._masks_due(step):
            masks = None if gradient is None else gradient.readout
            if masks is None:
                request = MapRequest(self.words.token_weights)
                masks = self._masks_of(self.session.denoiser.maps(latents, step, self.branches, request)).cpu()
            self.masks = to_device(masks > 0, self.session.canvas.device)
            on_latents = F.interpolate(masks, self.session.canvas.latent_grid)
            self.regions = [self._region(image, mask) for image, mask in enumerate(on_latents)]
        self._log_masks(step)
        guided = []
        for image, region in enumerate(self.regions):
            prediction = self.session.denoiser.predict(latents[image : image + 1], step, region)
            guided.append(self.session.guider.combine(prediction, step))
        return torch.cat(guided)

    def _masks_of(self, maps: AttentionMaps) -> Tensor:
        """The masks that attention maps give: 1 inside. Shape: [images, subjects, height, width], fp32."""
        return self._subject_masks(self._by_branch(maps)[1:].transpose(0, 1)).float()

    def _log_masks(self, step: Step) -> None:
        if self.masks is not None:
            by_concept = [torch.ones_like(self.masks[:, 0])] * len(self.session.concepts.loaded)
            for i, mask in zip(self.subjects, self.masks.unbind(dim=1), strict=True):
                by_concept[i] = mask
            self.session.log.keep_masks(step.index, torch.stack(by_concept, dim=1))

    def _subject_masks(self, maps: Tensor) -> Tensor:
        """Masks of all subjects. Shape: [images, subjects, (maps,) height, width]; the result without maps."""
        maps, painted = smooth(maps) if self.settings.smoothed else maps, self._painted
        maps = maps if painted is None else maps * painted  # the maximum must be in the painted part, too
        masking = self.words.makes_mask[..., None, None]
        masks = (thresholded(maps, self.settings.threshold) & masking).any(dim=2)
        for change in self.settings.morphology:
            masks = _CHANGES[change](masks)
        if painted is not None:
            masks = masks & painted
        if not self.settings.exclusive:
            return masks
        heights = (maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-20) * masking).amax(dim=2)
        return masks & torch.zeros_like(masks).scatter_(1, heights.argmax(dim=1, keepdim=True), True)

    @cached_property
    def _painted(self) -> Tensor | None:
        """Cells of the map grid that are at least partly painted; None means all. Shape: [height, width], bool."""
        canvas = self.session.canvas
        if canvas.painted is None:
            return None
        return (coarse_mask(canvas.painted, canvas.map_level) > 0).to(canvas.device)

    def _region(self, image: int, masks: Tensor) -> PreparedPass:
        """Subject n's mask as region n. Shape of masks: [subjects, height, width] on the latent grid."""
        session, text = self.session, self.texts[image]
        regions = Regions.of_masks(self.subjects, masks, session.canvas.levels, threshold=1.0)
        spec = region_pass(session, text, regions, isolate=self.settings.isolate, image=image)
        # Text and text gates do not change with the masks, so keys and values are shared.
        return session.denoiser.prepare(spec, same_text_as=self.regions[image] if self.regions else None)

    def _masks_due(self, step: Step) -> bool:
        return self.masks is None or step.within(self.settings.mask_until)

    def _all_rows(self, step: Step) -> MapRequest:
        """The request for all rows. A shared unconditional branch has no maps; others have those of their branch."""
        of_branch = self.words.token_weights.unflatten(0, (-1, self.session.canvas.images))
        shared = self.settings.uncond == "shared"
        rows = [
            torch.zeros_like(of_branch[0, 0]) if shared and not row.conditional else of_branch[row.branch, row.image]
            for row in self._roles.each
            if step.guided or row.conditional
        ]
        return MapRequest(torch.stack(rows))

    def _by_branch(self, maps: AttentionMaps) -> Tensor:
        """By branch, [images, maps, height, width]; with `whole`, the mean of unconditional and conditional rows."""
        canvas, roles = self.session.canvas, self._roles
        if len(maps.text) < len(roles):
            roles = roles.select(roles.conditional)
        by_row = maps.text.transpose(1, 2).unflatten(2, grid_at(canvas.latent_grid, canvas.map_level))
        unconditional, conditional = (
            by_row[rows].unflatten(0, (-1, canvas.images)) for rows in (roles.unconditional, roles.conditional)
        )
        if self.settings.whole and len(unconditional) == len(conditional):
            return (unconditional + conditional) / 2
        return conditional

    @property
    def _roles(self) -> Rows:
        """The roles of the rows of all branches."""
        return self.branches.spec.text.roles
