"""Agreement of scores and human votes: verdicts on images of two concepts, by the thresholds of an evaluation."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from lora_compose.compose.evaluation.results import ImageScores
from lora_compose.compose.evaluation.scoring import open_scorer
from lora_compose.compose.evaluation.table import load


def judge_votes(folder: Path, images: Mapping[int, tuple[tuple[str, str], Image.Image]]) -> dict[int, str]:
    """The verdict on images of two concepts, by number: "both", "one" or "none" are present with their own identity.

    Encoder, detector and thresholds are those of an evaluation with scenes of these pairs.
    """
    evaluation = load(folder)
    suite = evaluation.suite
    limits = dict(zip(evaluation.thresholds["concept"], evaluation.thresholds["threshold"], strict=True))
    scenes = {frozenset(scene.concepts): scene for scene in suite.scenes}
    if suite.detector is None:
        raise ValueError(f"the evaluation in {folder} has no detector, so it cannot locate concepts")
    scorer = open_scorer(suite)
    verdicts = {}
    for number, (pair, image) in images.items():
        scene = scenes[frozenset(pair)]
        scores = scorer.score(image.convert("RGB"), scene)
        there = sum(_is_there(scores, name, limits[name]) for name in pair)
        verdicts[number] = ("none", "one", "both")[there]
    return verdicts


def _is_there(scores: ImageScores, name: str, threshold: float) -> bool:
    similarity = scores.concepts[name].similarity
    if not similarity or max(similarity, key=lambda other: similarity[other]) != name:
        return False
    return not similarity[name] < threshold  # without a threshold, being nearest is enough
