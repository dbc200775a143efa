"""Finding objects in images, and what becomes of findings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import BatchFeature, GroundingDinoProcessor, OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from components import tokenizer
from lora_compose.attention.masks import Box
from lora_compose.compose.evaluation import detectors
from lora_compose.compose.evaluation.detectors import (
    SHARED,
    Detection,
    WindowDetector,
    ZeroShotDetector,
    coarse_windows,
    distinct,
    make_detector,
    shared,
    word_of,
)
from lora_compose.compose.evaluation.encoders import Encoder, load_encoder
from lora_compose.compose.evaluation.scoring import Scorer, reference_crops, squared
from lora_compose.compose.evaluation.suite import ZeroShotConfig, read_suite
from lora_compose.compose.playground.assets import playground_model

BOXES = st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(1, 40), st.integers(1, 40)).map(
    lambda edges: (edges[0], edges[1], edges[0] + edges[2], edges[1] + edges[3])
)


def pixels(box: Box) -> np.ndarray:
    mask = np.zeros((130, 130), dtype=bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return mask


@given(BOXES, BOXES)
def test_overlap_counts_pixels(a: Box, b: Box) -> None:
    one, other = pixels(a), pixels(b)
    both = (one & other).sum()
    assert shared(a, b) == pytest.approx(both / min(one.sum(), other.sum()))


@given(st.lists(st.tuples(BOXES, st.floats(0, 1)), max_size=12))
def test_no_two_findings_are_the_same_object(found: list[tuple[Box, float]]) -> None:
    kept = distinct([Detection("cat", box, score) for box, score in found])
    assert all(shared(a.box, b.box) <= SHARED for i, a in enumerate(kept) for b in kept[:i])
    assert [one.score for one in kept] == sorted((one.score for one in kept), reverse=True)
    assert bool(kept) == bool(found)


def test_the_surest_word_wins_a_place() -> None:
    found = [
        Detection("cat", (0, 0, 40, 40), 0.6),
        Detection("dog", (2, 2, 44, 44), 0.9),
        Detection("cat", (80, 80, 120, 120), 0.5),
    ]
    assert [(one.word, one.score) for one in distinct(found)] == [("dog", 0.9), ("cat", 0.5)]


@pytest.mark.parametrize("size", [(128, 128), (192, 96), (64, 160), (512, 512)])
def test_windows_are_squares_that_cover_the_image(size: tuple[int, int]) -> None:
    windows = coarse_windows(size)
    seen = np.zeros(size[::-1], dtype=bool)
    for left, top, right, bottom in windows:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert right - left == bottom - top
        seen[top:bottom, left:right] = True
    assert seen.all()
    assert len(set(windows)) == len(windows) < 400


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real detection model with random weights."""
    folder = tmp_path_factory.mktemp("owl")
    words = tokenizer()
    same = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**same, "vocab_size": len(words), "max_position_embeddings": words.model_max_length}
    vision = {**same, "image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    config = OwlViTConfig(text_config=text, vision_config=vision, projection_dim=32)
    OwlViTForObjectDetection(config).save_pretrained(folder)
    images = OwlViTImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    OwlViTProcessor(images, words).save_pretrained(folder)
    return folder


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3)).astype("u1"))


def test_a_detection_model_finds_words_inside_the_image(owl: Path, image: Image.Image) -> None:
    found = ZeroShotDetector(str(owl), threshold=0.0).detect(image, ["cat", "dog", "cat"])
    assert found
    assert {one.word for one in found} <= {"cat", "dog"}
    for one in found:
        left, top, right, bottom = one.box
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 80
        assert 0 <= one.score <= 1


def test_what_a_detection_model_finds_is_compared_with_every_subject(owl: Path) -> None:
    suite, judge = read_suite("playground-quick"), load_encoder("playground:judge")
    scene = suite.scenes[0]
    references = {name: judge.images(reference_crops(suite.concept(name))) for name in scene.concepts}
    shown = Image.effect_noise((128, 128), 90).convert("RGB")
    words = [suite.concept(name).class_word for name in scene.concepts]
    detector = ZeroShotDetector(str(owl), threshold=0.0)
    scores = Scorer(suite, judge, detector, references).score(shown, scene)
    found = [score for score in scores.concepts.values() if score.box is not None]
    assert found
    for score in found:
        crop = judge.images([squared(shown.crop(score.box))])[0].tolist()
        for name, of_concept in references.items():
            cosines = [sum(a * b for a, b in zip(crop, one, strict=True)) for one in of_concept.tolist()]
            assert score.slot[name] == pytest.approx(sum(cosines) / len(cosines), abs=2e-5)
    assert scores.extra == len(detector.detect(shown, words)) - len(found)


def test_findings_below_the_threshold_are_left_out(owl: Path, image: Image.Image) -> None:
    everything = ZeroShotDetector(str(owl), threshold=0.0).detect(image, ["cat"])
    limit = everything[0].score - 1e-3
    sure = make_detector(ZeroShotConfig(kind="zero-shot", model=str(owl), threshold=limit), None, "cpu").detect(  # pyright: ignore[reportArgumentType]
        image, ["cat"]
    )
    assert sure == [one for one in everything if one.score > limit]
    assert len(sure) < len(everything)


class Dino(GroundingDinoProcessor):
    """The processor of Grounding DINO, with a vocabulary of a few words."""

    VOCABULARY = ("[CLS]", "a", "cat", ".", "teddy", "bear", "[SEP]")

    def __init__(self) -> None:
        pass

    def __call__(self, *given: Any, **named: Any) -> Any:
        return BatchFeature({})

    def batch_decode(self, rows: Any) -> list[str]:
        return [" ".join(self.VOCABULARY[int(i)] for i in row) for row in rows]


def test_what_grounding_dino_names_by_parts_of_the_words_is_kept(
    image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the noun without its article, in small letters, and below the processor's own threshold for names."""
    probabilities = torch.zeros(1, 5, len(Dino.VOCABULARY) + 1)
    for row, tokens in enumerate(({1: 0.3, 2: 0.6}, {2: 0.5}, {1: 0.1, 2: 0.22}, {4: 0.3, 5: 0.4}, {3: 0.9})):
        for token, probability in tokens.items():
            probabilities[0, row, token] = probability
    boxes = torch.tensor([[[x, 0.5, 0.1, 0.1] for x in (0.1, 0.3, 0.5, 0.7, 0.9)]])
    ids = torch.arange(len(Dino.VOCABULARY))[None]
    output = SimpleNamespace(logits=torch.logit(probabilities), pred_boxes=boxes, input_ids=ids)

    class Model:
        def to(self, device: str) -> "Model":
            return self

        def eval(self) -> Any:
            return lambda **given: output

    monkeypatch.setattr(detectors.AutoProcessor, "from_pretrained", lambda source: Dino())
    monkeypatch.setattr(
        detectors.AutoModelForZeroShotObjectDetection, "from_pretrained", lambda source, use_safetensors: Model()
    )
    found = ZeroShotDetector("dino", threshold=0.2).detect(image, ["Cat", "teddy bear"])
    assert [(one.word, one.score) for one in found] == [
        ("Cat", 0.6), ("Cat", 0.5), ("teddy bear", 0.4), ("Cat", 0.22),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "word"),
    [("a bear", "bear"), ("a teddy bear", "teddy bear"), ("old cat.", "Old Cat"), ("a", None), ("teddy", None)],
)
def test_a_label_means_the_longest_word_that_is_in_it(label: str, word: str | None) -> None:
    assert word_of(label, ["bear", "teddy bear", "Old Cat", "!"]) == word


def test_a_folder_without_a_detection_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the detector .* cannot be opened"):
        ZeroShotDetector(str(tmp_path))


def test_windows_need_an_encoder_that_reads() -> None:
    with pytest.raises(ValueError, match="windows need an encoder that reads text, and images only does not"):
        WindowDetector(Encoder("images only", model=None, processor=None))


def test_a_finding_does_not_depend_on_the_order_of_the_words() -> None:
    judge = load_encoder("playground:judge")
    with Image.open(playground_model().parent / "references/bear/7.png") as image:
        shown = image.convert("RGB")
    detector = WindowDetector(judge, ("fox", "tree"))
    one, other = (detector.detect(shown, words) for words in (["bear", "dog"], ["dog", "bear"]))
    assert [(f.word, f.box) for f in one] == [(f.word, f.box) for f in other]
    assert [f.score for f in one] == pytest.approx([f.score for f in other], abs=1e-3)
