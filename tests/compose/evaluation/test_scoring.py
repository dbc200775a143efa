"""From an image to its scores, with the judge, on images put together by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_compose.compose.evaluation.detectors import Detection, make_detector
from lora_compose.compose.evaluation.encoders import Encoder, load_encoder
from lora_compose.compose.evaluation.results import ImageScores
from lora_compose.compose.evaluation.scoring import Scorer, reference_crop, reference_crops, reference_files, squared
from lora_compose.compose.evaluation.suite import Suite, SuiteConcept, SuiteScene, WindowsConfig, read_suite
from lora_compose.compose.playground.assets import playground_references
from small_world import LEFT, RIGHT, SIZE, STYLE, STYLE_WORDS, words

HALVES = {"bear": LEFT, "dog": RIGHT}
SIDE, TOP = SIZE * 5 // 12, SIZE * 5 // 16
FIRST, SECOND = SIZE // 24, SIZE * 13 // 24
"""Left edges of objects that stand beside each other."""
HERE, THERE = ((left, TOP, left + SIDE, TOP + SIDE) for left in (FIRST, SECOND))


@pytest.fixture(scope="module")
def suite() -> Suite:
    return read_suite("playground-quick")


@pytest.fixture(scope="module")
def judge() -> Encoder:
    return load_encoder("playground:judge")


def scene(names: tuple[str, ...] = ("bear", "dog"), **options: Any) -> SuiteScene:
    prompt = " and ".join({"bear": "a xlo bear", "dog": "a zwx dog"}[name] for name in names)
    return SuiteScene(name="pair", prompt=f"{prompt} on a white background", concepts=names, **options)


@pytest.fixture(scope="module")
def scorer(suite: Suite, judge: Encoder) -> Scorer:
    references = {name: judge.images(reference_crops(suite.concept(name))) for name in ("bear", "dog")}
    assert isinstance(suite.detector, WindowsConfig)
    return Scorer(suite, judge, make_detector(suite.detector, judge, "cpu"), references)


def pasted(*where: tuple[str, int, int]) -> Image.Image:
    """Concepts, cut from a reference on white, at places."""
    image = Image.new("RGB", (SIZE, SIZE), (250, 250, 250))
    for name, left, top in where:
        crop = reference_crop(playground_references(name)[0])
        image.paste(crop.resize((SIDE, SIDE)), (left, top))
    return image


PAIR = ("bear", FIRST, TOP), ("dog", SECOND, TOP)


@pytest.fixture(scope="module")
def pair(scorer: Scorer) -> ImageScores:
    """Scores of both concepts, each in its region."""
    return scorer.score(pasted(*PAIR), scene(regions=HALVES))


def test_concepts_are_found_where_they_are(pair: ImageScores) -> None:
    bear, dog = pair.concepts["bear"], pair.concepts["dog"]
    assert bear.similarity["bear"] > bear.similarity["dog"]
    assert dog.similarity["dog"] > dog.similarity["bear"]
    assert bear.placed is True
    assert dog.placed is True
    assert pair.extra == 0


def test_concepts_on_the_wrong_side_are_not_in_place(scorer: Scorer) -> None:
    scores = scorer.score(pasted(("bear", SECOND, TOP), ("dog", FIRST, TOP)), scene(regions=HALVES))
    assert [scores.concepts[name].placed for name in ("bear", "dog")] == [False, False]


def test_what_is_not_there_is_not_found(scorer: Scorer) -> None:
    scores = scorer.score(pasted(("bear", FIRST, TOP)), scene())
    assert scores.concepts["dog"].box is None
    assert scores.concepts["dog"].similarity == {}
    assert scores.concepts["bear"].box is not None


def test_a_second_one_is_one_too_many(scorer: Scorer) -> None:
    scores = scorer.score(pasted(("bear", 0, 0), ("bear", SECOND, 0), ("dog", TOP, SIZE - SIDE)), scene())
    assert scores.extra == 1


def beside(word: str, **options: Any) -> SuiteScene:
    """A bear, and a subject without a LoRA."""
    prompt = f"a xlo bear and a {word} on a white background"
    return SuiteScene(name="beside", prompt=prompt, concepts=("bear",), bystanders={"other": word}, **options)


def test_a_bystander_is_looked_for_by_its_class_word_and_compared_with_the_concepts(
    scorer: Scorer, pair: ImageScores
) -> None:
    both = scorer.score(pasted(*PAIR), beside("dog"))
    assert both.bystanders == {"other": {"bear": pair.concepts["dog"].similarity["bear"]}}
    assert both.concepts["bear"].box == pair.concepts["bear"].box
    assert both.extra == 0
    assert scorer.score(pasted(PAIR[0]), beside("dog")).bystanders == {"other": {}}
    assert pair.bystanders == {}


def test_a_bystander_of_the_class_of_a_concept_gets_what_is_least_like_it(suite: Suite, judge: Encoder) -> None:
    """Three bears are detected, two of which are dogs; one alone says nothing."""
    places = [(0, 0, 48, 48), (76, 0, 124, 48), (40, 76, 88, 124)]

    class Bears:
        def detect(self, image: Image.Image, words: Any) -> list[Detection]:
            assert words == ["bear", "bear"]
            return [Detection("bear", box, 0.9) for box in places]

    scorer = Scorer(suite, judge, Bears(), {"bear": judge.images(reference_crops(suite.concept("bear")))})
    image = pasted(("dog", 0, 0), ("bear", 76, 0), ("bear", 40, 76))
    scores = scorer.score(image, beside("bear"))
    dog = scorer.score(pasted(("dog", 0, 0), ("dog", 76, 0), ("dog", 40, 76)), beside("bear"))
    assert scores.concepts["bear"].box in places[1:]
    assert scores.bystanders["other"] == dog.bystanders["other"]
    assert scores.bystanders["other"]["bear"] < scores.concepts["bear"].similarity["bear"]
    assert scores.extra == 1
    places[:] = places[1:]
    assert scorer.score(image, beside("bear")).bystanders["other"]["bear"] > scores.bystanders["other"]["bear"] + 0.1
    placed = scorer.score(pasted(("bear", 76, 0)), beside("bear", regions={
        "bear": (0, 64, 128, 128), "other": (64, 0, 128, 64),
    })).concepts["bear"]  # fmt: skip
    assert placed.box == places[0], "by likeness"
    assert placed.slot != placed.similarity, "by place it is the other one"
    places[:] = places[:1]
    alone = scorer.score(pasted(("cat", 76, 0)), beside("bear"))
    assert alone.concepts["bear"].similarity["bear"] < 0, "it is the concept's, as unlike as it is"
    assert alone.bystanders == {"other": {}}


def test_without_a_detector_the_region_of_a_bystander_is_cut_out(suite: Suite, scorer: Scorer, judge: Encoder) -> None:
    blind = Scorer(suite.model_copy(update={"detector": None}), judge, None, scorer.references)
    tight = {"bear": (8, 40, 56, 88), "other": (72, 40, 120, 88)}
    scores = blind.score(pasted(("bear", 8, 40), ("dog", 72, 40)), beside("dog", regions=tight))
    taken = blind.score(pasted(("bear", 8, 40), ("bear", 72, 40)), beside("dog", regions=tight))
    assert scores.bystanders["other"]["bear"] < taken.bystanders["other"]["bear"]


def test_without_a_detector_the_regions_are_cut_out(suite: Suite, scorer: Scorer, judge: Encoder) -> None:
    blind = Scorer(suite.model_copy(update={"detector": None}), judge, None, scorer.references)
    tight = {"bear": HERE, "dog": THERE}
    scores = blind.score(pasted(("bear", FIRST, TOP), ("dog", SECOND, TOP)), scene(regions=tight))
    assert {name: score.box for name, score in scores.concepts.items()} == tight
    assert all(score.placed is None and score.detection is None for score in scores.concepts.values())
    assert scores.extra is None
    swapped = blind.score(pasted(("dog", FIRST, TOP), ("bear", SECOND, TOP)), scene(regions=tight))
    assert swapped.concepts["bear"].similarity["dog"] > swapped.concepts["bear"].similarity["bear"]


def test_two_concepts_of_one_class_get_one_finding_each(suite: Suite, judge: Encoder) -> None:
    """A detector that calls both of them animals; likeness distinguishes them."""

    class Animals:
        def detect(self, image: Image.Image, words: Any) -> list[Detection]:
            return [Detection("animal", THERE, 0.9), Detection("animal", HERE, 0.8)]

    concepts = tuple(suite.concept(name).model_copy(update={"class_word": "animal"}) for name in ("bear", "dog"))
    references = {one.name: judge.images(reference_crops(one)) for one in concepts}
    scorer = Scorer(suite.model_copy(update={"concepts": concepts}), judge, Animals(), references)
    scores = scorer.score(pasted(("bear", FIRST, TOP), ("dog", SECOND, TOP)), scene())
    assert scores.concepts["bear"].box == HERE
    assert scores.concepts["dog"].box == THERE


@pytest.mark.parametrize(
    "seen",
    [pytest.param(("old animal",) * 2, marks=pytest.mark.slow), ("Animal", "Animal"), ("old animal", "Animal")],
    ids=" and ".join,
)
def test_class_words_that_end_in_one_noun_are_one_class(suite: Suite, judge: Encoder, seen: tuple[str, ...]) -> None:
    """A detector takes both for old animals, or neither: which of them is old is for the references to say."""
    places = {"bear": (8, 40, 56, 88), "dog": (72, 40, 120, 88)}
    word_of = {"bear": "Animal", "dog": "old animal"}

    class Animals:
        def detect(self, image: Image.Image, words: Any) -> list[Detection]:
            assert words == [*word_of.values()]
            return [Detection(word, box, 0.9) for word, box in zip(seen, places.values(), strict=True)]

    concepts = tuple(suite.concept(name).model_copy(update={"class_word": word}) for name, word in word_of.items())
    references = {one.name: judge.images(reference_crops(one)) for one in concepts}
    scorer = Scorer(suite.model_copy(update={"concepts": concepts}), judge, Animals(), references)
    scores = scorer.score(pasted(("bear", 8, 40), ("dog", 72, 40)), scene())
    assert {name: score.box for name, score in scores.concepts.items()} == places
    assert scores.extra == 0


def test_two_of_one_class_in_each_others_places_keep_their_places_in_the_confusion_matrix(
    suite: Suite, judge: Encoder
) -> None:
    class Animals:
        def detect(self, image: Image.Image, words: Any) -> list[Detection]:
            return [Detection("animal", THERE, 0.9), Detection("animal", HERE, 0.8)]

    concepts = tuple(suite.concept(name).model_copy(update={"class_word": "animal"}) for name in ("bear", "dog"))
    references = {one.name: judge.images(reference_crops(one)) for one in concepts}
    scorer = Scorer(suite.model_copy(update={"concepts": concepts}), judge, Animals(), references)
    turned = pasted(("dog", FIRST, TOP), ("bear", SECOND, TOP))
    scores = scorer.score(turned, scene(regions=HALVES)).concepts
    assert scores["bear"].box == THERE  # by likeness
    assert scores["bear"].slot == scores["dog"].similarity  # by place
    assert scores["dog"].slot == scores["bear"].similarity
    free = scorer.score(turned, scene()).concepts
    assert free["bear"].slot == free["bear"].similarity


def test_the_place_does_not_choose_among_several_of_a_single_subject(suite: Suite, judge: Encoder) -> None:
    class Bears:
        def detect(self, image: Image.Image, words: Any) -> list[Detection]:
            return [Detection("bear", HERE, 0.9), Detection("bear", THERE, 0.8)]

    scorer = Scorer(suite, judge, Bears(), {"bear": judge.images(reference_crops(suite.concept("bear")))})
    found = scorer.score(pasted(("dog", FIRST, TOP), ("bear", SECOND, TOP)), scene(("bear",), regions={"bear": LEFT}))
    assert found.concepts["bear"].box == THERE
    assert found.concepts["bear"].slot == found.concepts["bear"].similarity


def test_the_references_are_compared_among_themselves(scorer: Scorer) -> None:
    bears, dogs = (scorer.references[name].tolist() for name in ("bear", "dog"))
    cosines = [sum(a * b for a, b in zip(one, other, strict=True)) for one in bears for other in dogs]
    truth = scorer.truth(scene())
    assert truth["bear"]["dog"] == truth["dog"]["bear"] == pytest.approx(np.mean(cosines), abs=2e-5)
    assert truth["bear"]["bear"] > truth["bear"]["dog"] < truth["dog"]["dog"]


def test_the_prompt_is_compared_without_triggers(pair: ImageScores, judge: Encoder) -> None:
    told = float(judge.images([pasted(*PAIR)]) @ judge.texts(["a bear and a dog on a white background"]).T)
    assert pair.clip_t == pytest.approx(max(0, 100 * told), abs=1e-2)


def test_images_are_padded_to_squares() -> None:
    wide = squared(Image.new("RGB", (60, 20), "red"))
    assert wide.size == (60, 60)
    assert wide.getpixel((30, 30)) == (255, 0, 0)
    assert wide.getpixel((30, 5)) == (128, 128, 128)
    assert squared(Image.new("RGB", (7, 7), "red")).size == (7, 7)


def concept(references: Any) -> SuiteConcept:
    return SuiteConcept(name="bear", lora="x.safetensors", trigger="xlo", class_word="bear", references=references)


def test_a_folder_of_references_holds_images_only(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in reference_files(concept(str(tmp_path)))] == ["a.jpg", "b.png"]


def test_an_empty_folder_of_references_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="concept 'bear': no image in"):
        reference_files(concept(str(tmp_path)))


def test_an_unreadable_reference_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"concept 'bear': the reference image '.*a.png' cannot be read"):
        reference_crops(concept(str(tmp_path)))


def test_references_are_rotated_as_their_exif_data_say(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert np.asarray(reference_crop(tmp_path / "a.jpg")).shape == (40, 40, 3)


def test_what_is_transparent_in_a_reference_is_white(tmp_path: Path) -> None:
    cut_out = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    cut_out.putpixel((3, 3), (0, 0, 255, 255))
    cut_out.save(tmp_path / "a.png")
    pixels = np.asarray(reference_crop(tmp_path / "a.png"))
    assert pixels[3, 3].tolist() == [0, 0, 255]
    assert pixels[0, 0].tolist() == [255, 255, 255]


def test_a_style_is_not_looked_for_but_its_colours_are_kept(scorer: Scorer, judge: Encoder) -> None:
    style = SuiteConcept(
        name=STYLE,
        lora=f"playground:{STYLE}",
        trigger=words(STYLE)[0],
        class_word="style",
        references=f"playground:{STYLE}",
        role="style",
    )
    both = Scorer(
        scorer.suite.model_copy(update={"concepts": (*scorer.suite.concepts, style)}), judge, scorer.detector,
        {**scorer.references, STYLE: judge.images(reference_crops(style))},
    )  # fmt: skip
    seen = pasted(("bear", FIRST, TOP))
    styled = SuiteScene(name="styled", prompt=f"a xlo bear in {STYLE_WORDS}", concepts=(STYLE, "bear"))
    scores = both.score(seen, styled)
    plain = scorer.score(seen, scene(("bear",)))
    assert scores.concepts["bear"] == plain.concepts["bear"]
    pixels = np.asarray(seen) / 255
    assert scores.concepts[STYLE].colours == pytest.approx([*pixels.mean((0, 1)), *pixels.std((0, 1))], abs=1e-5)
    assert scores.concepts[STYLE].box is None
    assert scores.extra == 0
