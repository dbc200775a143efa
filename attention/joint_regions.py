"""Region attention of transformers, which attend to text and image in one sequence.

Text 0 describes the whole image, and text n region n. With R(x) the regions of a cell x,

    a cell x          attends to text 0, to the texts of R(x), and to all cells (isolated: to cells x' with R(x) & R(x')
                      not empty, or R(x) or R(x') empty)
    text 0            to itself and to all cells
    text n, n > 0     to itself and to the cells of region n

so texts never attend to each other. Positions that attend to the same positions form a group, and each group is one
call of the model's own attention: no mask of positions x positions is needed. Padding belongs to text 0, or to no
region, and so do cells of reference images that lie in no region of the image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_compose.attention.device import RowIndex, row_index, to_device
from lora_compose.attention.sites import Site, SitePart

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of queries, keys and values, with a mask that is True where keys are seen."""


SiteParts = tuple[SitePart, ...]
"""The parts of an attention layer's sequence, in order."""


class PositionKind(NamedTuple):
    """The part to which a position belongs, and its texts.

    Attributes:
        part: Text or image; cells of reference images are image.
        texts: Index of the text that a token belongs to, or of the texts of the regions that contain a cell.
    """

    part: SitePart
    texts: frozenset[int]


@dataclass(frozen=True, eq=False)
class PositionGroup:
    """Positions (`queries`, by index) that attend to the same positions (`keys`)."""

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class JointRegions:
    """Region attention of one forward pass: which positions attend to which.

    Attributes:
        groups: Groups by the parts of the attention layer's sequence. Layers with other parts attend as in the base
            model.
        unconditional: True for unconditional rows, in any order; they attend as in the base model.
        base: Positions of unconditional rows: text 0 and the image; None if that is their whole sequence.
        hidden: True at padding inside the texts. Shape: [rows, positions].
        positions: Position of each token in its own text, for models that rotate text by it. Shape: [tokens].
        reach: Number of positions from the first to the last of these.
        rows: The unconditional rows, and the others; None where there are none.
    """

    groups: Mapping[SiteParts, Sequence[PositionGroup]]
    unconditional: tuple[bool, ...]
    base: Mapping[SiteParts, PositionGroup] | None = None
    hidden: Mapping[SiteParts, Tensor] | None = None
    positions: Tensor | None = None
    reach: int = 0
    rows: tuple[RowIndex | None, RowIndex | None] = field(init=False)

    def __post_init__(self) -> None:
        device = next(iter(self.groups.values()))[0].queries.device
        unconditional = [i for i, row in enumerate(self.unconditional) if row]
        others = [i for i, row in enumerate(self.unconditional) if not row]
        # Not a cached property: its lock would break the graphs of `torch.compile`.
        object.__setattr__(self, "rows", (row_index(unconditional, device), row_index(others, device)))

    @classmethod
    def of(
        cls,
        site: Site,
        membership: Tensor,
        lengths: Sequence[int],
        unconditional: Sequence[bool],
        *,
        isolate: bool,
        hidden: Tensor | None = None,
        references: Tensor | None = None,
        positions: Tensor | None = None,
        device: torch.device | None = None,
    ) -> "JointRegions":
        """Groups the positions of a model's sequences.

        Args:
            membership: True where a region covers a cell. Shape: [cells, regions], on the CPU.
            lengths: Tokens of text 0, and of the text of each region.
            unconditional: True for unconditional rows, by row.
            isolate: Whether cells do not attend to cells of other regions.
            hidden: True at padding inside the texts. Shape: [rows, tokens].
            references: True where a region covers a cell of a reference image, of all that the site has, in order; None
                means none, or the image's own, as the site says. Shape: [cells of references, regions].
            positions: Position of each token in its own text; None means that no text has lost any. Shape: [tokens].
        """
        text = [PositionKind("text", frozenset({n})) for n, length in enumerate(lengths) for _ in range(length)]
        text += [PositionKind("text", frozenset({0}))] * (site.padded(len(text)) - len(text))
        image = _image_kinds(membership)
        image += [PositionKind("image", frozenset())] * (site.padded(len(image)) - len(image))
        if references is None and site.reference_cells is not None:
            references = membership.new_zeros(site.reference_cells, membership.shape[1])
        of: Mapping[SitePart, Sequence[PositionKind]] = {
            "text": text, "image": image, "reference": image if references is None else _image_kinds(references)
        }  # fmt: skip
        alone: tuple[SiteParts, SiteParts] = ("text",), ("image",)
        sequences = {parts: [kind for part in parts for kind in of[part]] for parts in (*alone, site.parts)}
        groups = {parts: _groups(kinds, isolate, device) for parts, kinds in sequences.items()}
        if not isolate:
            del groups["image",]  # all cells attend to all
        base: dict[SiteParts, PositionGroup] | None = None
        masks: dict[SiteParts, Tensor] | None = None
        if site.multiple == 1:  # otherwise rows have lengths of their own
            base = {parts: _base(kinds, device) for parts, kinds in sequences.items()}
        if hidden is not None:
            none = {part: hidden.new_zeros(len(hidden), len(kinds)) for part, kinds in of.items()}
            none["text"] = torch.nn.functional.pad(hidden, (0, len(text) - hidden.shape[1]))
            masks = {parts: torch.cat([none[part] for part in parts], dim=1) for parts in sequences}
        reach = max(lengths) if positions is None else int(positions.max()) + 1  # read once, not in every pass
        if positions is None:
            positions = to_device(torch.cat([torch.arange(length) for length in lengths]), device)
        return cls(groups, tuple(unconditional), base, masks, positions, reach)

    def select(self, rows: slice | Sequence[int]) -> "JointRegions":
        """The regions of some rows: a slice, or indices in a new order."""
        indices = range(len(self.unconditional))[rows] if isinstance(rows, slice) else rows
        hidden = (
            None
            if self.hidden is None
            else {name: masked[rows if isinstance(rows, slice) else list(rows)] for name, masked in self.hidden.items()}
        )
        return replace(self, unconditional=tuple(self.unconditional[i] for i in indices), hidden=hidden)

    def attend(
        self, attend: Attend, parts: SiteParts, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one layer. Shapes: [rows, positions, heads, channels].

        Args:
            mask: True where keys are seen, or numbers that are added to the scores; None means that all are seen.
                Shape: [rows or 1, 1, positions or 1, positions].
        """
        groups = self.groups.get(parts)
        if groups is None:
            return attend(query, key, value, mask)
        out, (unconditional, others) = torch.zeros_like(query), self.rows
        if unconditional is not None:
            base = None if self.base is None else self.base[parts]
            _into(out, attend, [base], query, key, value, mask, unconditional)
        if others is not None:
            if (seen := self._seen(parts, key.shape[1])) is not None:
                seen = seen[:, None, None]
                mask = seen if mask is None else seen_too(mask, seen)
            _into(out, attend, groups, query, key, value, mask, others)
        return out

    def allowed(self, parts: SiteParts, positions: int) -> Tensor:
        """True where a position attends to another, for recording maps. Shape: [rows, positions, positions]."""
        device = self.groups[parts][0].queries.device
        of_base, of_groups = torch.zeros(2, positions, positions, dtype=torch.bool, device=device)
        for group in self.groups[parts]:
            of_groups[group.queries[:, None], group.keys] = True
        of_base[:, slice(None) if self.base is None else self.base[parts].keys] = True
        allowed = of_groups.expand(len(self.unconditional), -1, -1).clone()
        unconditional, others = self.rows
        if unconditional is not None:
            allowed[unconditional] = of_base
        if others is not None and (seen := self._seen(parts, positions)) is not None:
            allowed[others] &= seen[others][:, None]
        return allowed

    def _seen(self, parts: SiteParts, positions: int) -> Tensor | None:
        """False at padding inside the texts; None if there is none. Shape: [rows, positions]."""
        if self.hidden is None:
            return None
        seen = ~self.hidden[parts]
        return torch.nn.functional.pad(seen, (0, positions - seen.shape[1]), value=True)


def seen_too(mask: Tensor, seen: Tensor) -> Tensor:
    """A mask, of either kind, that hides what another one of True and False hides as well."""
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)


def _into(
    out: Tensor,
    attend: Attend,
    groups: Sequence[PositionGroup | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rows: RowIndex,
) -> None:
    """Writes the attention of some rows; a group of None is the whole sequence."""
    query, key, value = query[rows], key[rows], value[rows]
    if mask is not None and len(mask) > 1:
        mask = mask[rows]
    for group in groups:
        if group is None:
            out[rows] = attend(query, key, value, mask)
            continue
        queries, keys = group.queries, group.keys
        seen = None if mask is None else (mask if mask.shape[-2] == 1 else mask[..., queries, :])[..., keys]
        attended = attend(query[:, queries], key[:, keys], value[:, keys], seen)
        out[rows if isinstance(rows, slice) else rows[:, None], queries] = attended


def _image_kinds(membership: Tensor) -> list[PositionKind]:
    rows = membership.tolist()  # at once: a tensor for each cell would take a tenth of a second
    return [PositionKind("image", frozenset(n for n, inside in enumerate(row, 1) if inside)) for row in rows]


def _groups(kinds: Sequence[PositionKind], isolate: bool, device: torch.device | None) -> Sequence[PositionGroup]:
    present = list(dict.fromkeys(kinds))
    alike: dict[tuple[PositionKind, ...], set[PositionKind]] = {}
    for kind in present:
        alike.setdefault(tuple(other for other in present if _sees(kind, other, isolate)), set()).add(kind)
    return [
        PositionGroup(_where(kinds, queries, device), _where(kinds, set(seen), device))
        for seen, queries in alike.items()
    ]


def _sees(kind: PositionKind, other: PositionKind, isolate: bool) -> bool:
    if kind.part == other.part == "image":
        return not isolate or not kind.texts or not other.texts or bool(kind.texts & other.texts)
    if kind.part == other.part:
        return kind.texts == other.texts
    return 0 in kind.texts | other.texts or bool(kind.texts & other.texts)


def _base(kinds: Sequence[PositionKind], device: torch.device | None) -> PositionGroup:
    positions = _where(kinds, {kind for kind in kinds if kind.part == "image" or 0 in kind.texts}, device)
    return PositionGroup(positions, positions)


def _where(kinds: Sequence[PositionKind], wanted: set[PositionKind], device: torch.device | None) -> Tensor:
    return to_device(torch.tensor([i for i, kind in enumerate(kinds) if kind in wanted]), device)
