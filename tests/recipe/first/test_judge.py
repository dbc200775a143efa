"""The playground's recipe, on made-up artwork, and its judge, on images it has not seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import call
from lora_compose.attention.masks import Box
from lora_compose.compose.evaluation.confusion import inside
from lora_compose.compose.evaluation.detectors import WindowDetector, shared
from lora_compose.compose.evaluation.encoders import Encoder, load_encoder
from lora_compose.compose.evaluation.scoring import reference_crop
from lora_compose.compose.playground.assets import (
    PLAYGROUND_FLUX,
    playground_judge,
    playground_loras,
    playground_references,
)
from recipe.first import world
from recipe.first.judge import app, nearest
from recipe.first.judge_data import (
    SIDE,
    Artist,
    Batches,
    Label,
    describe,
    is_held_out,
    name_of,
    names,
)
from recipe.first.world import BASE_CLASSES, CONCEPTS, PALE, Coat, dress, place, squares


@pytest.fixture
def artist(sprites: dict[str, np.ndarray]) -> Artist:
    return Artist(sprites, seed=0)


@pytest.fixture(scope="module")
def judge() -> Encoder:
    return load_encoder(f"{PLAYGROUND_FLUX}:judge")


def colour(picture: np.ndarray) -> np.ndarray:
    return picture[40:56, 40:56, :3].reshape(-1, 3).mean(axis=0)


def test_objects_stay_in_the_image_and_apart() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3):
        for _ in range(50):
            found = squares(rng, count)
            assert len(found) == count
            assert all(x >= 0 and y >= 0 and max(x, y) + side <= world.SIZE for x, y, side in found)
            boxes = [(x, y, x + side, y + side) for x, y, side in found]
            assert all(shared(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])


def test_what_sticks_out_is_cut_off(sprites: dict[str, np.ndarray]) -> None:
    image = np.zeros((64, 64, 3))
    place(image, sprites["cat/noto"], (40, -20, 48))
    place(image, sprites["cat/noto"], (200, 0, 48))
    assert image[:28, 40:].any()
    assert not image[:, :40].any()
    assert not image[28:].any()


def test_a_coat_has_its_colours_and_keeps_the_outline(sprites: dict[str, np.ndarray]) -> None:
    sprite = sprites["bear/noto"]
    blue = dress(sprite, Coat(None, world.HUES["blue"]))
    assert colour(blue).argmax() == 2
    assert (blue[..., 3] == sprite[..., 3]).all()
    halves = dress(sprite, Coat("half", world.HUES["red"], PALE))
    assert halves[20, 48, 0] > 1.5 * halves[20, 48, 2]
    assert np.ptp(halves[80, 48, :3].astype(int)) < 5


def test_the_same_seed_gives_the_same_batch(sprites: dict[str, np.ndarray]) -> None:
    one, again = (next(iter(Batches(sprites, 3, None))) for _ in range(2))
    assert torch.equal(one.pixels, again.pixels)
    assert one.captions == again.captions


def test_a_caption_is_right_about_its_image(artist: Artist) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        for label in artist.identities():
            assert describe(rng, label).true_of(label)
            assert describe(rng, Label("part", label.name, label.vendor, label.coat)).name == label.name


def test_captions_are_wrong_about_other_coats_and_classes() -> None:
    rng = np.random.default_rng(0)
    striped = Label("whole", "cat", "noto", Coat("stripes", 115), "on grass")
    others = [
        Label("whole", "dog", "noto", Coat("stripes", 115), "on grass"),
        Label("part", "cat", "noto", Coat("stripes", 115), "on grass"),
        Label("nothing"),
    ]
    for _ in range(50):
        caption = describe(rng, striped)
        assert not any(caption.true_of(other) for other in others)
        spotted = Label("whole", "cat", "noto", Coat("dots", 60, 28), "on grass")
        assert caption.true_of(spotted) == (not caption.colours and not caption.pattern)


def test_the_concepts_of_the_playground_are_never_shown(artist: Artist) -> None:
    labels = [label for _ in range(300) for label in artist.identities()]
    assert not [label for label in labels if is_held_out(*label.identity)]
    coats = [known for known in CONCEPTS.values() if known.coat]
    assert all(is_held_out(known.class_word, known.artist, known.coat) for known in coats)
    assert not is_held_out("bird", "fluent3d", None)


def test_every_crop_has_a_name() -> None:
    known = names(BASE_CLASSES)
    assert known[name_of(Label("whole", "fox"), BASE_CLASSES)] == "a fox"
    assert known[name_of(Label("part", "fox"), BASE_CLASSES)] == "a part of a fox"
    assert known[name_of(Label("nothing"), BASE_CLASSES)] == "nothing"
    assert name_of(Label("scene", text="a fox on grass"), BASE_CLASSES) == -1


def test_a_batch_fits_together(artist: Artist, sprites: dict[str, np.ndarray]) -> None:
    batch = next(iter(Batches(sprites, 0, None)))
    pictures = len(batch.captions)
    assert batch.pixels.shape == (pictures, 3, SIDE, SIDE)
    assert -1 <= batch.pixels.min() < batch.pixels.max() <= 1
    assert batch.truth.diagonal().all()  # every caption is right about its own picture
    told = batch.identity[batch.identity >= 0]
    assert (torch.bincount(told) == 2).all()  # two views of every identity


@pytest.mark.slow
def test_the_judge_is_trained_continued_and_opened(sprites: dict[str, np.ndarray], tmp_path: Path) -> None:
    named: dict[str, Any] = dict(sprites)
    np.savez(tmp_path / "sprites.npz", **named)
    arguments = "train", tmp_path / "sprites.npz", tmp_path / "judge", "--steps"
    call(*arguments, 1, of=app)
    more = call(*arguments, 2, of=app)
    assert "1 captions" in more.output
    assert "0 captions" not in more.output
    encoder = load_encoder(str(tmp_path / "judge"))
    found = encoder.images([Image.new("RGB", (70, 70), "red")]) @ encoder.texts(["a cat"]).T
    assert found.shape == (1, 1)


def test_the_judge_is_small() -> None:
    files = list(playground_judge(PLAYGROUND_FLUX).iterdir())
    assert sum(file.stat().st_size for file in files) < 20 * 2**20


def references() -> list[tuple[str, Path]]:
    known = playground_loras(PLAYGROUND_FLUX)
    return [(name, path) for name in known for path in playground_references(name, PLAYGROUND_FLUX)]


def test_the_judge_knows_the_concepts_by_their_references(judge: Encoder) -> None:
    crops = judge.images([reference_crop(path) for _, path in references()])
    right = nearest(crops, [name for name, _ in references()])
    assert np.mean(right) >= 0.98


def test_the_judge_names_the_classes(judge: Encoder) -> None:
    crops = judge.images([reference_crop(path) for _, path in references()])
    words = judge.texts([world.article(name) for name in BASE_CLASSES])
    named = [BASE_CLASSES[i] for i in (crops @ words.T).argmax(1)]
    assert (
        np.mean([one == CONCEPTS[name].class_word for one, (name, _) in zip(named, references(), strict=True)]) >= 0.95
    )


def recorded(path: Path) -> tuple[int, int, int, int]:
    lines = (path.parent / "captions.tsv").read_text(encoding="utf-8").splitlines()
    left, top, side = map(int, lines[int(path.stem)].split("\t")[2].split())
    return left, top, left + side, top + side


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    parts = inside(a, b), inside(b, a)
    return 0.0 if 0 in parts else 1 / (1 / parts[0] + 1 / parts[1] - 1)


def found_in(judge: Encoder, paths: Sequence[tuple[str, Path]]) -> list[bool]:
    detector = WindowDetector(judge, BASE_CLASSES)
    hits = []
    for name, path in paths:
        with Image.open(path) as image:
            found = detector.detect(image.convert("RGB"), [CONCEPTS[name].class_word])
        hits.append(bool(found) and overlap(found[0].box, recorded(path)) > 0.4)
    return hits


@pytest.mark.slow
def test_the_judge_finds_the_concepts_in_their_references(judge: Encoder) -> None:
    hits = found_in(judge, references()[::2])
    assert np.mean(hits) >= 0.9


def test_the_judge_finds_nothing_where_nothing_is(judge: Encoder) -> None:
    detector = WindowDetector(judge, BASE_CLASSES)
    rng = np.random.default_rng(0)
    for _ in range(4):
        image, _ = world.background(rng)
        assert not detector.detect(Image.fromarray(image.clip(0, 255).astype("u1")), ["cat", "dog"])
