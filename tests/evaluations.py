"""Small evaluations with known numbers, as they are stored."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_compose.compose.evaluation.batches import Batch, batches
from lora_compose.compose.evaluation.metrics import present
from lora_compose.compose.evaluation.results import (
    FAILED,
    MADE,
    PLAN,
    BatchPlan,
    ConceptScore,
    Failed,
    ImageCost,
    ImageScores,
    Made,
    Planned,
    Scores,
    batch_folder,
    image_path,
)
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.files.images import Machine, read_pixels, read_record
from lora_compose.compose.files.stored import read, write

Found = tuple[float, float] | float | ConceptScore | Mapping[str, float] | None
Seen = Mapping[str, Found]
"""By concept: similarity to its own references and to all others'; or to its own alone; None if it was not found; or a
score as it is. By bystander: similarity to the references of each concept, of nothing if it was not found."""

SCORES = "scores-1.json"
BOXES = ((2, 8, 62, 120), (66, 8, 126, 120), (0, 0, 16, 16))


def suite(scenes: Mapping[str, tuple[str, ...]] | Sequence[Any] | None = None, **changes: Any) -> Suite:
    """Cat and dog, each with two kinds of LoRAs, and two methods besides merge. `scenes` may be concepts by name."""
    kinds = {"ordinary": "/loras/{}.safetensors", "tara": "/loras/{}-tara.safetensors"}
    triggers = {"cat": "sks", "dog": "zwx"}
    fields = {
        "name": "small",
        "model": "playground",
        "encoder": "playground:judge",
        "detector": {"kind": "windows"},
        "concepts": [
            {
                "name": name, "lora": {kind: path.format(name) for kind, path in kinds.items()}, "trigger": trigger,
                "class_word": name, "references": f"playground:{name}",
            }
            for name, trigger in triggers.items()
        ],
        "scenes": scenes if isinstance(scenes, Sequence) else [
            {"name": name, "prompt": " and ".join(f"a {triggers[c]} {c}" for c in concepts), "concepts": concepts}
            for name, concepts in (scenes or {"both": ("cat", "dog")}).items()
        ],
        "methods": ["merge", "regional", {"method": "tara", "lora": "tara"}],
        "seeds": [1, 2],
    }  # fmt: skip
    return Suite.model_validate(fields | changes)


def scores(concepts: tuple[str, ...], seen: Seen) -> ImageScores:
    """What was measured on an image of concepts."""
    of_concepts = {name: _score(concepts, name, seen[name]) for name in concepts}
    bystanders = {name: of for name, of in seen.items() if name not in concepts and isinstance(of, Mapping)}
    return ImageScores(clip_t=25.0, extra=0, concepts=of_concepts, bystanders=bystanders)


def success(similarity: np.ndarray, thresholds: np.ndarray) -> bool:
    """Whether every concept of an image is present, from its similarity matrix."""
    others = np.where(np.eye(len(similarity), dtype=bool), -np.inf, similarity).max(axis=1)
    found = np.asarray(~np.isnan(similarity).any(axis=1))
    return bool(present(found, np.diagonal(similarity), others, thresholds).all())


def _score(concepts: tuple[str, ...], name: str, found: Found) -> ConceptScore:
    if isinstance(found, ConceptScore):
        return found
    assert not isinstance(found, Mapping), "that is a bystander's"
    if found is None:
        return ConceptScore(whole=0.5)
    own, other = found if isinstance(found, tuple) else (found, 0.1)
    similarity = {one: own if one == name else other for one in concepts}
    box = BOXES[sorted(concepts).index(name)]
    return ConceptScore(box=box, detection=0.9, similarity=similarity, whole=0.5, placed=True, slot=similarity)


Measured = Callable[[Batch, int], Seen | str | None]
"""What is stored of an image: what was seen; or of its batch: why it failed, "unscored", or None for nothing yet."""


TRUTH = {"cat": {"cat": 0.9, "dog": 0.1}, "dog": {"cat": 0.1, "dog": 0.8}}
"""How alike the references are among themselves; without it, `store` writes scores of older versions."""


def store(
    out: Path, of: Suite, measured: Measured, draw: bool = False, truth: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """Stores an evaluation, with images if `draw`. `changes` are of what was made."""
    planned = []
    for batch in batches(of):
        arm = batch.arm
        key = f"{batch.scene.name}-{arm.name}-{arm.alone}-{batch.seeds[0]}".replace(" ", "_").replace(",", "")
        fields = {"scene": batch.scene.name, "arm": arm.name, "alone": arm.alone, "seeds": batch.seeds}
        planned.append(Planned(key=key, scores=SCORES, **fields))
        found = {seed: measured(batch, seed) for seed in batch.seeds}
        first = found[batch.seeds[0]]
        if isinstance(first, str) and first != "unscored":
            write(batch_folder(out, key) / FAILED, Failed(error=first, **fields))
        elif first is not None:
            write(batch_folder(out, key) / MADE, made(fields | changes))
        for seed, seen in found.items():
            if draw and isinstance(seen, Mapping):
                _draw(image_path(out, key, seed), seed)
        seen = {seed: scores(batch.scene.concepts, one) for seed, one in found.items() if isinstance(one, Mapping)}
        if seen:
            write(batch_folder(out, key) / SCORES, Scores(images=seen, truth=truth or {}))
    write(out / PLAN, BatchPlan(suite=of, batches=tuple(planned)))
    return out


def made(fields: Mapping[str, Any]) -> Made:
    """A batch; `composite` and `tara` cost twice the rows and seconds of the others."""
    factor = 2 if fields["arm"] in ("composite", "tara") else 1
    cost = ImageCost(
        rows_forward=50 * factor, rows_backward=0, flops=1e9 * factor, seconds=2.0 * factor, preparation_seconds=0.5,
        peak_bytes=2**20,
    )  # fmt: skip
    common = {"cost": cost, "versions": {"torch": "2"}, "machine": Machine(device="cpu", name="x86_64", threads=1)}
    return Made(**(common | dict(fields)))


def _draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (128, 128), (40 * seed % 256, 90, 160)).save(path)


def sanity(batch: Batch) -> Seen | None:
    """No LoRA: cat 0.3, dog 0.2. Alone: cat 0.7, dog 0.6; with TARA 0.5 each. So thresholds are 0.5 and 0.4."""
    if batch.arm.name == "no LoRA":
        return {"cat": (0.3, 0.25), "dog": (0.2, 0.1)}
    if batch.arm.name == "alone":
        return {"cat": (0.7, 0.2), "dog": (0.6, 0.2)}
    return {"cat": (0.5, 0.2), "dog": (0.5, 0.2)} if batch.arm.alone else None


def known(batch: Batch, seed: int) -> Seen:
    """Numbers that tests compute by hand."""
    methods: dict[tuple[str, int], Seen] = {
        ("merge", 1): {"cat": (0.6, 0.3), "dog": (0.3, 0.5)},
        ("merge", 2): {"cat": None, "dog": (0.5, 0.2)},
        ("regional", 1): {"cat": (0.7, 0.2), "dog": (0.45, 0.1)},
        ("regional", 2): {"cat": (0.49, 0.2), "dog": (0.6, 0.2)},
        ("tara", 1): {"cat": (0.5, 0.2), "dog": (0.4, 0.2)},
        ("tara", 2): {"cat": None, "dog": None},
    }
    return sanity(batch) or methods[batch.arm.name, seed]


def contents(out: Path) -> dict[str, Any]:
    """Everything in an evaluation's folder that does not tell of time and memory."""
    found: dict[str, Any] = {}
    for path in sorted((out / "batches").rglob("*.*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".png":
            found[name] = read_pixels(path).tobytes(), read_record(path)
        elif path.name == MADE:
            made = read(path, Made)
            assert made is not None
            found[name] = made.model_copy(update={"cost": made.cost.model_copy(update={
                "seconds": 0.0, "preparation_seconds": 0.0, "peak_bytes": None
            })})  # fmt: skip
        else:
            found[name] = path.read_bytes()
    return found
