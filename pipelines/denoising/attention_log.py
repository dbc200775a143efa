"""Attention maps and masks of the steps that are recorded (`record_attention`)."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lora_compose.attention import coarser, grid_at, scatter_concepts
from lora_compose.pipelines.denoising.passes import MapRequest, Pass
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.text.conditioning import Conditioning


class AttentionLog:
    """Attention maps and masks of each concept, by step."""

    def __init__(self, canvas: Canvas, steps: Collection[int]) -> None:
        self.canvas = canvas
        self.steps = frozenset(steps)
        self._maps: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._masks: dict[int, list[tuple[list[int], Tensor]]] = {}
        self._draft: list[tuple[list[int], Tensor]] = []

    def of_set(self, columns: Sequence[int], concepts: int, images: Sequence[int]) -> "LogOfSet":
        """The log of one concept set: indices of its concepts among so many, and of its images in the batch."""
        return LogOfSet(self, columns, concepts, images)

    def request(self, step: int, text: Conditioning) -> MapRequest | None:
        """The maps to record in a pass; None if the step is not recorded."""
        if step not in self.steps or not text.phrase_mask.shape[-1]:
            return None
        words = text.phrase_mask
        return MapRequest(words / words.sum(dim=-2, keepdim=True).clamp(min=1))

    def take(self, step: int, spec: Pass, text: Conditioning, maps: Tensor) -> None:
        """Records a pass: the mean over the texts or branches in which a concept is named.

        Args:
            text: The text of the rows that were run.
            maps: Its attention maps, as requested. Shape: [(texts,) rows, cells, concepts].
        """
        rows = text.roles.conditional
        named = (text.phrase_mask[..., rows, :, :].sum(dim=-2) > 0).float()
        maps = maps[..., rows, :, :]
        maps = maps.reshape(-1, text.images, *maps.shape[-2:])
        named = named.reshape(-1, text.images, named.shape[-1])  # [texts or branches, images, concepts]
        mean = (maps * named[:, :, None]).sum(dim=0) / named.sum(dim=0).clamp(min=1)[:, None]
        level, canvas = self.canvas.map_level, self.canvas
        grid = grid_at(canvas.latent_grid, level)
        down, across = (slice(0, cells) for cells in canvas.latent_grid) if spec.window is None else spec.window
        images = slice(spec.image, None if spec.image is None else spec.image + 1)
        place = images, slice(None), coarser(down, level), coarser(across, level)
        whole = mean.new_zeros(canvas.images, mean.shape[-1], *grid)
        seen = mean.new_zeros(canvas.images, 1, *grid)
        seen[place] = 1
        whole[place] = mean.transpose(1, 2).unflatten(2, seen[place].shape[-2:])
        self.add(step, whole, seen)

    def add(self, step: int, maps: Tensor, seen: Tensor) -> None:
        """Adds maps of a pass, 0 outside the part of the canvas that was run; `seen` is 1 inside.

        Shapes: [images, concepts, height, width] and [images, 1, height, width].
        """
        self._maps.setdefault(step, []).append((maps, seen))

    def keep_masks(self, step: int, masks: Tensor, images: Sequence[int] | None = None) -> None:
        """Records a method's own masks of some or (None) all images, in place of those derived from the maps.

        On the map grid. Shape: [images, concepts, height, width], bool.
        """
        if step in self.steps:
            chosen = range(self.canvas.images) if images is None else images
            self._masks.setdefault(step, []).append((list(chosen), masks))

    def keep_draft(self, maps: Tensor, images: Sequence[int] | None = None) -> None:
        """Records the maps of some or (None) all images by which a method found the subjects before the first step.

        On the map grid; 0 for concepts that were not looked for. Shape: [images, concepts, height, width].
        """
        if self.steps:
            chosen = range(self.canvas.images) if images is None else images
            self._draft.append((list(chosen), maps.cpu()))

    def draft_maps(self) -> Tensor | None:
        """The maps of the draft; 0 for images without one. Shape: [images, concepts, height, width], fp32."""
        if not self._draft:
            return None
        whole = torch.zeros(self.canvas.images, *self._draft[0][1].shape[1:])
        for images, maps in self._draft:
            whole[images] = maps
        return whole

    def attention_maps(self) -> tuple[tuple[int, ...], Tensor] | None:
        """The recorded steps and their maps. Shape: [steps, images, concepts, height, width], fp32."""
        if not self._maps:
            return None
        steps = tuple(sorted(self._maps))
        return steps, torch.stack([_mean_where_seen(self._maps[step]) for step in steps])

    def masks(self) -> Tensor | None:
        """The masks of all recorded steps. Shape: [steps, images, concepts, height, width], bool."""
        recorded = self.attention_maps()
        if recorded is None:
            return None
        steps, maps = recorded
        masks = masks_of(maps)
        for step, of_step in zip(steps, masks, strict=True):
            for images, kept in self._masks.get(step, ()):
                of_step[images] = kept.to(of_step.device)
        return masks


class LogOfSet(AttentionLog):
    """The log of one concept set, kept in that of all concepts and images."""

    def __init__(self, whole: AttentionLog, columns: Sequence[int], concepts: int, images: Sequence[int]) -> None:
        prompts = len(images) // whole.canvas.images_per_prompt
        super().__init__(whole.canvas.of_prompts(prompts), whole.steps)
        self._whole = whole
        self._columns = list(columns)
        self._concepts = concepts
        self._images = list(images)

    def add(self, step: int, maps: Tensor, seen: Tensor) -> None:
        """Adds maps of a pass of the set's images."""
        self._whole.add(step, self._in_batch(self._by_all_concepts(maps)), self._in_batch(seen))

    def keep_masks(self, step: int, masks: Tensor, images: Sequence[int] | None = None) -> None:
        """Masks of the set's concepts and images."""
        batch = self._images if images is None else [self._images[image] for image in images]
        self._whole.keep_masks(step, self._by_all_concepts(masks), batch)

    def keep_draft(self, maps: Tensor, images: Sequence[int] | None = None) -> None:
        """Maps of the set's concepts and images."""
        batch = self._images if images is None else [self._images[image] for image in images]
        self._whole.keep_draft(self._by_all_concepts(maps), batch)

    def _by_all_concepts(self, maps: Tensor) -> Tensor:
        return scatter_concepts(maps.movedim(1, -1), self._columns, self._concepts).movedim(-1, 1)

    def _in_batch(self, maps: Tensor) -> Tensor:
        in_batch = maps.new_zeros(self._whole.canvas.images, *maps.shape[1:])
        in_batch[self._images] = maps
        return in_batch


def _mean_where_seen(passes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    total = torch.stack([maps for maps, _ in passes]).sum(dim=0)
    return total / torch.stack([seen for _, seen in passes]).sum(dim=0).clamp(min=1)


def masks_of(maps: Tensor) -> Tensor:
    """The mask of each concept: cells where its map, divided by its maximum, is above 0.5 and above all others.

    No cell belongs to two concepts. Shape: [..., concepts, height, width], bool.
    """
    relative = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    highest = relative.argmax(dim=-3, keepdim=True)
    is_highest = torch.zeros_like(relative, dtype=torch.bool).scatter_(-3, highest, True)
    return is_highest & (relative >= 0.5)
