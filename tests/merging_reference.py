"""Mergers on whole changes, in numpy and straight from their formulas: nothing is shared with the package."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

Array = np.ndarray


def rank_of(change: Array) -> int:
    values = np.linalg.svd(change, compute_uv=False)
    return int((values > 1e-6 * values[0]).sum()) if values[0] else 0


def svd(change: Array) -> tuple[Array, Array, Array]:
    rank = rank_of(change)
    u, s, vh = np.linalg.svd(change, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def cut(change: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(change, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def in_common_space(changes: Sequence[Array]) -> tuple[Array, list[Array]]:
    """KnOTS: the singular value decomposition of the changes side by side."""
    u, s, vh = np.linalg.svd(np.concatenate(changes, axis=1), full_matrices=False)
    kept = s > 1e-6 * s[0]
    coefficients = s[kept, None] * vh[kept]
    return u[:, kept], np.split(coefficients, len(changes), axis=1)


def ties(changes: Sequence[Array], density: float) -> Array:
    u, coefficients = in_common_space(changes)
    trimmed = []
    for c in coefficients:
        smallest_kept = np.sort(np.abs(c).ravel())[::-1][: int(density * c.size)][-1]
        trimmed.append(np.where(np.abs(c) >= smallest_kept, c, 0))
    stacked = np.stack(trimmed)
    sign = np.where(stacked.sum(0) >= 0, 1, -1)
    agreeing = np.sign(stacked) == sign
    return u @ ((stacked * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1))


def dare(changes: Sequence[Array], kept: Sequence[Array], density: float) -> Array:
    """What is left of the entries in the common basis, larger by what was dropped.

    Args:
        changes: Of the LoRAs.
        kept: For each, which entries stay; of the shape of its coefficients.
        density: The share that is expected to stay.
    """
    u, coefficients = in_common_space(changes)
    return u @ sum(c * mask / density for c, mask in zip(coefficients, kept, strict=True))


def lego(changes: Sequence[Array], k: int) -> Array:
    """The best of all partitions of the units, as whole matrices, into at most k clusters; both reweightings."""
    units = [
        value * np.outer(left, right)
        for u, s, v in map(svd, changes)
        for left, value, right in zip(u.T, s, v.T, strict=True)
    ]
    best = min(partitions(len(units), k), key=lambda labels: _spread(units, labels))
    merged = np.zeros_like(units[0])
    for label in set(best):
        members = [unit for unit, own in zip(units, best, strict=True) if own == label]
        u, _, vh = np.linalg.svd(sum(members))
        merged += np.mean([np.linalg.norm(unit) for unit in members]) * np.outer(u[:, 0], vh[0])
    return np.sqrt(len(units) / len(changes) / len(set(best))) * merged


def partitions(units: int, k: int) -> Iterator[tuple[int, ...]]:
    """All ways to label units with at most k labels, each once."""
    for labels in product(range(k), repeat=units):
        if all(label <= max(labels[:i], default=-1) + 1 for i, label in enumerate(labels)):
            yield labels


def _spread(units: Sequence[Array], labels: Sequence[int]) -> float:
    total = 0.0
    for label in set(labels):
        members = np.stack([unit for unit, own in zip(units, labels, strict=True) if own == label])
        total += ((members - members.mean(0)) ** 2).sum()
    return total


def orthogonalised(columns: Array) -> Array:
    """The polar factor by the inverse square root of the Gram matrix."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > 1e-10
    return columns @ (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def tsv(changes: Sequence[Array]) -> Array:
    us, ss, vs = zip(*map(svd, changes), strict=True)
    left, right = orthogonalised(np.concatenate(us, 1)), orthogonalised(np.concatenate(vs, 1))
    return left @ np.diag(np.concatenate(ss)) @ right.T


def np_lora(subject: Array, style: Array, strength: float, energy: float) -> Array:
    _, s, v = svd(style)
    k = next(k for k in range(len(s) + 1) if (s[:k] ** 2).sum() >= (energy - 1e-9) * (s**2).sum())
    v = v[:, :k]
    return subject @ (np.eye(len(v)) - strength / (1 + strength) * v @ v.T) + style


def k_lora(pairs: Sequence[tuple[Array, Array]], ranks: tuple[int, int], steps: int = 200_000) -> list[Array]:
    """The comparison of every step, and the mean over the steps."""
    ratios = [np.abs(subject).sum() / np.abs(style).sum() for subject, style in pairs]
    middle = sorted(ratios)[len(ratios) // 2]
    level = np.mean([ratio for ratio in ratios if middle / 10 <= ratio <= 10 * middle])
    merged = []
    for pair in pairs:
        one, other = (np.sort(np.abs(change).ravel())[::-1][: ranks[0] * ranks[1]].sum() for change in pair)
        wins = np.mean(one / level > other * (1.5 * (np.arange(steps) + 0.5) / steps + 0.5))
        merged.append(wins * pair[0] + (1 - wins) * pair[1])
    return merged


def soups(changes: Sequence[Array], inputs: Sequence[Array], ridge: float) -> Array:
    """Numbers by least squares on the outputs, stacked; the pull to 1 as further equations.

    Args:
        changes: Of the LoRAs.
        inputs: Columns, by LoRA.
        ridge: As a share of the mean of H's diagonal.
    """
    columns = [np.concatenate([(change @ x).ravel() for x in inputs]) for change in changes]
    wanted = np.concatenate([(change @ x).ravel() for change, x in zip(changes, inputs, strict=True)])
    n = len(changes)
    pull = np.sqrt(ridge * sum(column @ column for column in columns) / n)
    system = np.concatenate([np.stack(columns, 1), pull * np.eye(n)])
    return np.linalg.lstsq(system, np.concatenate([wanted, np.full(n, pull)]), rcond=None)[0]


def iteris(changes: Sequence[Array], alone: Sequence[Array], merged: Sequence[Array], ridge: float) -> Array:
    """One round by least squares, in orthonormal coordinates of what each LoRA reads.

    Args:
        changes: Of the LoRAs.
        alone: Columns, by LoRA, while it alone acts.
        merged: The same of the merged model, column by column.
        ridge: The pull to the sum, as a share of the norm of the weighted moments.
    """
    us, ss, vs = zip(*map(svd, changes), strict=True)
    down = np.concatenate([v.T for v in vs])
    offsets = np.cumsum([0, *map(len, ss)])
    read, sent, moments = [], [], np.zeros((len(down), len(down)))
    for k, (change, x, y) in enumerate(zip(changes, alone, merged, strict=True)):
        energy = ((change @ x) ** 2).sum() / x.shape[1]
        weight = (change**2).sum() / energy / x.shape[1]
        own = np.zeros((len(down), x.shape[1]))
        own[offsets[k] : offsets[k + 1]] = (down @ x)[offsets[k] : offsets[k + 1]]
        read.append(np.sqrt(weight) * down @ y)
        sent.append(np.sqrt(weight) * own)
        moments += read[-1] @ read[-1].T
    pull = np.sqrt(ridge * np.linalg.norm(moments)) * np.eye(len(down))
    router = np.linalg.lstsq(np.concatenate([*read, pull], 1).T, np.concatenate([*sent, pull], 1).T, rcond=None)[0].T
    return np.concatenate([u * s for u, s in zip(us, ss, strict=True)], 1) @ router @ down


def ssr(changes: Sequence[Array], inputs: Sequence[Array], ridge: float) -> Array:
    """The router by least squares on its inputs, in orthonormal coordinates of what each LoRA reads."""
    us, ss, vs = zip(*map(svd, changes), strict=True)
    down = np.concatenate([v.T for v in vs])
    z = [down @ x for x in inputs]
    offsets = np.cumsum([0, *map(len, ss)])
    wanted = []
    for k, one in enumerate(z):
        own = np.zeros_like(one)
        own[offsets[k] : offsets[k + 1]] = one[offsets[k] : offsets[k + 1]]
        wanted.append(own)
    size = np.sqrt(ridge * sum(x.shape[1] for x in inputs))
    read = np.concatenate([*z, size * np.eye(len(down))], 1)
    sent = np.concatenate([*wanted, size * np.eye(len(down))], 1)
    router = np.linalg.lstsq(read.T, sent.T, rcond=None)[0].T
    return np.concatenate([u * s for u, s in zip(us, ss, strict=True)], 1) @ router @ down
