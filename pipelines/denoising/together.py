"""The concepts that act on the same positions, where their changes add up."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.scene.regions import region_mask
from lora_compose.pipelines.scene.scene import BoxOrMask


@dataclass(frozen=True)
class Together:
    """Concepts that act on the same positions.

    Attributes:
        columns: Their indices in the concept set.
        otherwise: What can be done about it other than to lower their weights or to limit them.
        layers: The layers in which they do; None is all.
        limit: The most that they may change a layer together, as a multiple of the largest change of one alone at
            weight 1; None is no limit.
        has_limit: Whether the method has such a setting.
    """

    columns: Sequence[int]
    otherwise: str = ""
    layers: Collection[str] | None = None
    limit: float | None = None
    has_limit: bool = False


def each_subject(concepts: ConceptSet, overlapping: Collection[tuple[int, ...]] = ()) -> list[Together]:
    """Each subject with all styles, and with the subjects that act on the same positions (`overlapping`)."""
    if len(concepts.subjects) < 2:
        return [Together(range(len(concepts.loaded)))]
    alone = [(i,) for i in concepts.subjects if not any(i in group for group in overlapping)]
    apart = ", or give each a region that does not overlap the others"
    return [
        Together((*subjects, *concepts.styles), apart if len(subjects) > 1 else "")
        for subjects in (*overlapping, *alone)
        if len(subjects) > 1 or concepts.styles
    ]


def limited(groups: Iterable[Together], limit: float | None) -> list[Together]:
    """The groups of a method that has a limit."""
    return [replace(group, limit=limit, has_limit=True) for group in groups]


def of_one_text(concepts: ConceptSet, canvas: Canvas) -> Together:
    """All concepts in layers without cells, where they act together whatever their regions: on a text that all read."""
    sites = canvas.backbone.sites
    return Together(
        range(len(concepts.loaded)),
        layers={name for name, site in sites.items() if {"text", "row"}.issuperset(site.parts)},
    )


def overlapping(regions: Mapping[int, BoxOrMask | None], canvas: Canvas) -> list[tuple[int, ...]]:
    """The subjects on one cell of the canvas, for each set that is in no other; a region of None is all of it."""
    if not regions:
        return []
    masks = [region_mask(region, canvas.image_size, canvas.latent_grid) > 0.5 for region in regions.values()]
    columns = torch.stack(masks).flatten(1).unique(dim=1).T.tolist()
    every = {tuple(i for i, inside in zip(regions, column, strict=True) if inside) for column in columns}
    return [group for group in sorted(every) if group and not any(set(group) < set(other) for other in every)]
