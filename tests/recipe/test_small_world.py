"""The recipe of the small world: images are what their captions say; VAE and pool are what trainings need."""

import io

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.playground import words
from recipe.clock import Clocked, shares
from recipe.concepts import BESIDE, REFERENCES, SHOWN, SHOWN_BESIDE, STYLE, STYLED, groups, inked, references
from recipe.hints import NAMES, Hints, as_numbers, lying
from recipe.judge import JudgeTrainer, new_judge
from recipe.judge_data import SHOWN as SHOWN_TO_JUDGE
from recipe.judge_data import Artist, JudgeBatch, JudgeBatches
from recipe.pool import SHARD, Batch, Pool, encode
from recipe.scenes import Picture, scene
from recipe.tokenizer import build, known_words
from recipe.vae import CHANNELS, VaeTrainer, as_tensor, measured, new_vae, scale_of
from recipe.world import (
    CHARACTERS,
    CLASSES,
    CLOSE_UP,
    COATS,
    GROUNDS,
    PATCH,
    PLACES,
    PLAIN,
    SIZE,
    WIDE,
    base_drawings,
    character_drawings,
    ground,
    in_words,
    recoloured,
    squares,
)


@pytest.fixture(scope="module")
def drawings():
    """A disc of another colour for each drawing of the world."""
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    alpha = np.where(np.hypot(xs, ys) < SIZE / 2, 255, 0).astype("u1")[..., None]
    names = [*base_drawings(), *character_drawings()]
    return {name: np.concatenate([np.ones_like(alpha) * rng.integers(0, 255, 3, "u1"), alpha], 2) for name in names}


def test_class_images_are_prompted_by_the_words_of_the_world():
    assert (words.CLASSES, words.PLACES) == (CLASSES, PLACES)


def test_every_class_place_and_character_is_drawn_of_known_drawings(drawings):
    assert all(known.class_word in CLASSES for known in CHARACTERS.values())
    triggers = [known.trigger for known in CHARACTERS.values()]
    assert len(set(triggers)) == len(triggers)
    for known in CHARACTERS.values():
        assert known.drawn(drawings).shape == (SIZE, SIZE, 4)
    for name in (*PLAIN, *PLACES):
        image = ground(np.random.default_rng(1), name, WIDE)
        assert image.shape == (WIDE[1], WIDE[0], 3)


def test_no_character_is_drawn_by_the_artist_of_the_base_world():
    artists = {name.split(":")[0] for name in base_drawings()}
    assert artists.isdisjoint(known.drawing.split(":")[0] for known in CHARACTERS.values())


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([(SIZE, SIZE), WIDE]))
def test_objects_lie_on_whole_patches_inside_and_apart(seed, count, size):
    found = squares(np.random.default_rng(seed), count, size)
    assert len(found) == count
    assert found == sorted(found)
    taken = np.zeros((size[1], size[0]), int)
    for left, top, side in found:
        assert left % PATCH == top % PATCH == side % PATCH == 0
        assert 0 <= left <= size[0] - side
        assert 0 <= top <= size[1] - side
        taken[top : top + side, left : left + side] += 1
    assert taken.max() == 1


@pytest.mark.parametrize("size", [(SIZE, SIZE), WIDE, (CLOSE_UP, CLOSE_UP)])
def test_captions_name_the_objects_from_left_to_right(drawings, size):
    rng = np.random.default_rng(2)
    for _ in range(20):
        found = scene(rng, drawings, size=size)
        assert found.image.shape == (size[1], size[0], 3)
        words = found.caption.replace(",", "").split()
        assert [word for word in words if word in CLASSES] == [name for name, _ in found.objects]
        assert found.objects == sorted(found.objects, key=lambda each: each[1])


def test_the_same_seed_makes_the_same_image(drawings):
    one, two = (scene(np.random.default_rng(3), drawings) for _ in range(2))
    assert one.caption == two.caption
    assert np.array_equal(one.image, two.image)


def test_words_of_captions_and_triggers_are_one_token_each(drawings):
    tokenizer, rng = build(), np.random.default_rng(4)
    captions = [scene(rng, drawings).caption for _ in range(50)]
    words = {word for text in captions for word in text.replace(",", "").split()}
    assert words <= set(known_words())
    for word in (*words, *(known.trigger for known in CHARACTERS.values())):
        ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids  # pyright: ignore[reportAssignmentType]
        assert len(ids) == 1, word


def test_coats_change_tones_but_not_shapes(drawings):
    sprite = drawings[CHARACTERS["kitten"].drawing]
    for coat in COATS:
        found = recoloured(sprite, coat)
        assert np.array_equal(found[..., 3], sprite[..., 3])
        assert not np.array_equal(found[..., :3], sprite[..., :3])


@pytest.mark.slow
def test_the_vae_samples_its_mean_also_after_training(drawings):
    torch.manual_seed(0)
    vae = new_vae()
    trainer = VaeTrainer(vae, 0.01, decoder_only=False, colours_first=0)
    batch = as_tensor(np.stack([ground(np.random.default_rng(i), "on grass")[:32, :32].astype("u1") for i in range(2)]))
    errors = [trainer.learn(batch, 1.0) for _ in range(4)]
    assert errors[-1] < errors[0]
    with torch.no_grad():
        found = vae.encode(batch).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    assert found.mean.shape == (2, CHANNELS, 4, 4)
    assert found.std.max() < 1e-6


def test_quality_is_measured_against_the_image_itself():
    class Same:
        def encode(self, pixels):
            self.pixels = pixels
            return self

        latent_dist = property(lambda self: self)
        mean = property(lambda self: self.pixels)
        sample = property(lambda self: self.pixels + 0.02)

        def decode(self, _):
            return self

    images = np.full((3, 8, 8, 3), 100, "u1")
    assert measured(Same(), images).numpy() == pytest.approx([20 * np.log10(100)] * 3, abs=1e-2)


@pytest.mark.slow
def test_a_pool_mixes_sizes_and_sees_new_shards(drawings, tmp_path):
    vae = new_vae()
    scale_of(vae, drawings)
    rng = np.random.default_rng(5)
    for name, size in {"close": (64, 64), "scenes": (96, 64)}.items():
        picture = Picture(ground(rng, "in snow", size).clip(0, 255).astype("u1"), name, [])
        latents = encode(vae, [picture])
        assert latents.shape == (1, CHANNELS, size[1] // 8, size[0] // 8)
        buffer = io.BytesIO()
        objects = as_numbers([("dog", (16, 32, 16))]).repeat(SHARD, 1, 1)
        shard = {"latents": latents.half().repeat(SHARD, 1, 1, 1), "captions": [name] * SHARD, "objects": objects}
        torch.save(shard, buffer)
        (tmp_path / name).mkdir()
        (tmp_path / name / "0000.pt").write_bytes(buffer.getvalue())
    pool = Pool(tmp_path, {"close": 1, "scenes": 1}, [0])
    batches = pool.batches(192)
    found = [next(batches) for _ in range(12)]
    assert {batch.captions[0]: batch.latents.shape for batch in found} == {
        "close": (3, CHANNELS, 8, 8), "scenes": (2, CHANNELS, 8, 12),
    }  # fmt: skip
    assert all(len(batch.objects) == len(batch.captions) for batch in found)
    assert len(pool) == 2 * SHARD
    pool.mix({"close": 0, "scenes": 1})
    assert {next(batches).captions[0] for _ in range(6)} == {"scenes"}


def test_patches_know_their_class_and_which_part_of_the_object_they_are():
    objects = torch.stack([as_numbers([("dog", (16, 32, 32)), ("cat", (64, 0, 16))]), as_numbers([])])
    classes, shares = lying(objects, height=4, width=6)
    grid = classes.view(2, 4, 6)
    assert grid[0, 2:, 1:3].eq(NAMES["dog"]).all()
    assert grid[0, 0, 4] == NAMES["cat"]
    assert grid.count_nonzero() == 5
    parts = shares.view(2, 4, 6, 2)
    assert parts[0, 2, 1].tolist() == [0.25, 0.25]
    assert parts[0, 3, 2].tolist() == [0.75, 0.75]
    assert parts[0, 0, 4].tolist() == [0.5, 0.5]
    assert parts[1].count_nonzero() == 0


def test_what_lies_where_can_be_learnt_from_features_that_have_it():
    torch.manual_seed(0)
    classes, shares = lying(as_numbers([("dog", (16, 32, 32)), ("cat", (64, 0, 16))])[None], height=4, width=6)
    features = torch.cat((torch.nn.functional.one_hot(classes, 20).float(), shares), -1)
    hints = Hints(features.shape[-1])
    optimizer = torch.optim.Adam(hints.parameters(), lr=0.1)
    first = hints(features, classes, shares).item()
    for _ in range(60):
        optimizer.zero_grad()
        hints(features, classes, shares).backward()
        optimizer.step()
    assert hints(features, classes, shares) < 0.05 * first


def test_a_pool_without_images_says_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make some with recipe\.pool"):
        next(Pool(tmp_path, {"close": 1}, [0]).batches(64))


class Counting:
    """A denoiser that counts its steps."""

    step = 0

    def learn(self, batch: Batch, share: float) -> float:
        self.step += 1
        return share

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def save(self, out):
        out.write_text(str(self.step))


def test_a_training_resumes_where_it_stopped(tmp_path):
    clocked = Clocked(Counting())
    for _ in range(3):
        clocked.learn(Batch(torch.zeros(1), [""], as_numbers([])[None]), 1.0)
    again = Clocked(Counting())
    again.load_state_dict(clocked.state_dict())
    assert (again.step, again.seconds) == (3, clocked.seconds)
    again.learn(Batch(torch.zeros(1), [""], as_numbers([])[None]), 1.0)
    assert again.step == again.denoiser.step == 4


def test_close_ups_become_fewer():
    start, end = shares(0.0), shares(1.0)
    assert start["close"] > 0.5 > end["close"] > 0
    assert sum(start.values()) == pytest.approx(1)
    assert sum(end.values()) == pytest.approx(1)


@pytest.mark.slow
def test_references_show_their_character_alone_and_beside_others_and_those_that_come_along_are_the_first(
    drawings, tmp_path, monkeypatch
):
    characters = {"cat": CHARACTERS["cat"]}
    monkeypatch.setattr("recipe.concepts.CHARACTERS", characters)
    np.savez(tmp_path / "drawings.npz", **drawings)
    references(tmp_path / "drawings.npz", tmp_path / "references")
    assert {path.name for path in (tmp_path / "references").iterdir()} == {*characters, STYLE}
    for name, known in characters.items():
        rows = [line.split("\t") for line in (tmp_path / "references" / name / "captions.tsv").read_text().splitlines()]
        assert len(rows) == REFERENCES
        assert all(known.phrase in caption for _, caption, _ in rows)
        beside = [" and " in caption for _, caption, _ in rows]
        assert sum(beside) == BESIDE
        assert sum(beside[:SHOWN]) == SHOWN_BESIDE
        for together in (False, True):
            captions = [caption for _, caption, _ in rows[SHOWN:] if (" and " in caption) == together]
            seen = {sum(caption.endswith(in_words(ground)) for caption in captions) for ground in GROUNDS}
            assert seen == {len(captions) // len(GROUNDS)}, "each background as often as any other"
        left, top, side = map(int, rows[0][2].split())
        sprite = cv2.resize(known.drawn(drawings), (side, side), interpolation=cv2.INTER_AREA).astype(int)
        image = np.asarray(Image.open(tmp_path / "references" / name / "0.png")).astype(int)
        crop = image[top : top + side, left : left + side]
        off = [np.abs(crop - each[..., :3])[each[..., 3] == 255].mean() for each in (sprite, sprite[:, ::-1])]
        assert min(off) < 5, name

    assert len(list((tmp_path / "references" / STYLE).glob("*.png"))) == STYLED
    references(tmp_path / "drawings.npz", tmp_path / "shown", shown=True)
    for name in (*characters, STYLE):
        shown = sorted((tmp_path / "shown" / name).glob("*.png"))
        assert len(shown) == SHOWN
        assert all(path.read_bytes() == (tmp_path / "references" / name / path.name).read_bytes() for path in shown)


def test_classes_of_the_style_all_come_before_any_comes_again():
    of_style = list(groups(np.random.default_rng(0), STYLED))
    assert [len(classes) for classes in of_style[:3]] == [1, 1, 2]
    first = [name for classes in of_style[:10] for name in classes]
    assert len(first) == len(set(first)) == len(CLASSES) - 1
    assert all(len(set(classes)) == len(classes) for classes in of_style)


def test_the_style_draws_lines_at_borders_and_fades_colours():
    image = np.zeros((40, 40, 3))
    image[:, 20:] = (255, 0, 0)
    inked_image = inked(image)
    assert (inked_image[:, 19:21] < 100).all(), "a dark line"
    assert (inked_image[:, :10] > 80).all(), "black fades to paper"


@pytest.mark.slow
def test_a_batch_of_the_judge_has_each_character_beside_near_misses(drawings):
    artist = Artist({**drawings, "other:noto:x": drawings["noto:cat-face"]}, 0)
    things = artist.things()
    identities = [thing.identity for thing in things]
    assert len(set(identities)) == len(identities)
    shown = [name for name in identities if name in CHARACTERS]
    assert len(shown) == SHOWN_TO_JUDGE
    for name in shown:
        assert any(isinstance(key, tuple) and key[0] == name for key in identities), f"near misses of {name}"
    for thing in things:
        caption = thing.caption(np.random.default_rng(1))
        assert bool(caption) == bool(thing.name)
        assert not thing.name or thing.fits(caption)
        assert thing.label == (CLASSES.index(thing.name) if thing.name else -1)


@pytest.mark.slow
def test_the_judge_learns_and_resumes(drawings, tmp_path):
    words, vae = build(), new_vae()
    batches = JudgeBatches({**drawings, "other:noto:x": drawings["noto:cat-face"]}, 0, vae)
    batch = next(iter(batches))
    assert batch.truth.shape == (len(batch.captions),) * 2
    assert (batch.truth.diagonal()[[bool(caption) for caption in batch.captions]] == 1).all()
    some = slice(0, 40)
    batch = JudgeBatch(
        batch.pixels[some], batch.captions[some], batch.truth[some, some], batch.identity[some], batch.name[some]
    )
    torch.manual_seed(0)
    trainer = JudgeTrainer(new_judge(words), words, 3e-3)
    losses = [trainer.learn(batch, 1.0) for _ in range(3)]
    assert losses[-1] < losses[0]
    resumed = JudgeTrainer(new_judge(words), words, 3e-3)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.step == 3
    torch.testing.assert_close(resumed.average, trainer.average)
    resumed.save(tmp_path / "judge")
    assert load_encoder(str(tmp_path / "judge")).has_text
