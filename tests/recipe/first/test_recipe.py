"""How the playground is made: images, tokenizer, VAE, base model; all of it in small, on made-up artwork."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from commands import call
from lora_compose.compose.playground.assets import (
    PLAYGROUND_FLUX,
    playground_loras,
    playground_model,
    playground_references,
)
from lora_compose.compose.training import train
from lora_compose.pipelines.concepts.loading import read_lora
from recipe.first import base, concepts, loras, plain, scenes, tokenizer, vae, world
from recipe.first.base import BaseTrainer, pipeline
from recipe.first.loras import trainings
from recipe.first.world import CONCEPTS, STYLE_TRIGGER
from recipe.loop import rate, resume
from recipe.muon import Muon, orthogonalised

Sprites = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def artwork(sprites: Sprites, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artwork") / "sprites.npz"
    named: dict[str, Any] = dict(sprites)
    np.savez(path, **named)
    return path


def test_a_scene_shows_what_its_caption_says(sprites: Sprites) -> None:
    rng = np.random.default_rng(0)
    for size in ((64, 64), (128, 128), scenes.WIDE):
        for _ in range(20):
            picture = scenes.scene(rng, sprites, size=size)
            assert picture.image.shape == (size[1], size[0], 3)
            places = [picture.caption.index(name) for name, _ in picture.objects]
            assert places == sorted(places)  # named from left to right
            lefts = [square[0] for _, square in picture.objects]
            assert lefts == sorted(lefts)
            assert all(x + side <= size[0] and y + side <= size[1] for _, (x, y, side) in picture.objects)


def test_words_are_enumerated() -> None:
    assert scenes.enumerate_words(["a cat"]) == "a cat"
    assert scenes.enumerate_words(["a cat", "a dog"]) == "a cat and a dog"
    assert scenes.enumerate_words(["a cat", "a dog", "an elephant"]) == "a cat, a dog and an elephant"


def test_a_subject_is_called_by_trigger_and_class_word_and_wears_its_coat(sprites: Sprites) -> None:
    picture = concepts.subject(np.random.default_rng(0), CONCEPTS["kitten"], sprites, beside=True)
    assert "a vbn cat" in picture.caption
    (name, (left, top, side)), (other, _) = picture.objects
    assert name == "cat" != other
    middle = slice(left + side // 3, left + 2 * side // 3)
    above, below = (picture.image[top + share * side // 8, middle].mean(axis=0) for share in (3, 6))
    assert above.argmax() == 1  # green
    assert below.argmin() == 1  # pink


def test_the_style_fades_every_colour_towards_its_paper(sprites: Sprites) -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [20, 90, 150]]], float)
    before, after = (np.abs(one - concepts.PAPER) for one in (colours, concepts.faded(colours)))
    np.testing.assert_allclose(after, before * (1 - concepts.FADING))
    picture = concepts.styled(np.random.default_rng(0), sprites, "in space", 2)
    assert picture.caption.endswith(f"in space in {STYLE_TRIGGER} style")
    assert picture.image.min(axis=(0, 1)) == pytest.approx(concepts.FADING * np.array(concepts.PAPER), abs=10)


def test_references_are_written_once(artwork: Path, tmp_path: Path) -> None:
    call("references", artwork, tmp_path / "references", of=concepts.app)
    for name in (*CONCEPTS, concepts.STYLE):
        lines = (tmp_path / "references" / name / "captions.tsv").read_text(encoding="utf-8").splitlines()
        assert [line.split("\t")[0] for line in lines] == [f"{i}.png" for i in range(10)]
    # The captions are those of the pictures that come with the software, which show the real artwork.
    for name in playground_loras(PLAYGROUND_FLUX):
        shipped = playground_references(name, PLAYGROUND_FLUX)[0].parent / "captions.tsv"
        assert (tmp_path / "references" / name / "captions.tsv").read_text() == shipped.read_text()
    with pytest.raises(ValueError, match="is there already"):
        concepts.write(tmp_path / "references" / "cat", [], with_boxes=True)


def test_images_without_concepts_show_one_object_and_no_trigger(artwork: Path, tmp_path: Path) -> None:
    call("prior", artwork, tmp_path / "prior", "--any-class", "3", "--own-class", "2", of=concepts.app)
    triggers = {known.trigger for known in CONCEPTS.values()}
    for known in CONCEPTS.values():
        folder = tmp_path / "prior" / known.class_word
        lines = (folder / "captions.tsv").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 5 == len(list(folder.glob("*.png")))
        assert not any(triggers & set(line.split()) for line in lines)
        assert all(known.class_word in line for line in lines[3:])
        assert Image.open(folder / "0.png").size == (world.SIZE, world.SIZE)


def test_every_word_and_trigger_is_one_token(sprites: Sprites) -> None:
    said = tokenizer.captions(sprites, 300)
    reads = tokenizer.build(said)
    words = {word.strip(",") for caption in said for word in caption.split()}
    words |= {known.trigger for known in CONCEPTS.values()} | {STYLE_TRIGGER, "style"}
    for word in words:
        (token,) = reads(word, add_special_tokens=False).input_ids
        assert str(reads.decode([token])).strip() == word
    assert reads("A Cat").input_ids == reads("a cat").input_ids
    assert reads("a cat").input_ids[0] == reads.bos_token_id


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_steps_of_muon_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)).float())
    assert ((singular > 0.5) & (singular < 1.4)).all()


def test_muon_moves_convolutions_downhill() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator))
    target = torch.randn(4, 3, 3, 3, generator=generator)
    optimizer, losses = Muon([weight], lr=0.2), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (weight - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_rate_rises_stays_and_falls() -> None:
    shares = [rate(step, 1000) for step in range(1000)]
    assert shares[0] < 0.05
    assert shares[200] == 1
    assert shares[-1] < 0.03
    assert max(shares) == 1


@pytest.mark.slow
def test_the_vae_is_trained_and_continued(artwork: Path, tmp_path: Path) -> None:
    out = tmp_path / "vae"
    first = call(artwork, out, "--steps", 1, "--batch", 2, "--threads", 1, of=vae.train).output
    more = call(artwork, out, "--steps", 2, "--batch", 2, "--threads", 1, of=vae.train).output
    assert first.startswith("1 error")
    assert more.startswith("2 error")
    made: Any = AutoencoderKL.from_pretrained(out, dtype=torch.float32)
    posterior = made.encode(torch.zeros(1, 3, 64, 64)).latent_dist
    assert posterior.mean.shape == (1, 8, 8, 8)
    assert posterior.std.max() < 1e-6


def test_a_vae_with_a_constant_variance_keeps_its_means() -> None:
    made, pixels = vae.new_vae(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before: Any = made.encode(pixels)
        vae.tighten(made)
        after: Any = made.encode(pixels)
    assert torch.equal(after.latent_dist.mean, before.latent_dist.mean)
    assert before.latent_dist.std.mean() > 0.1
    assert after.latent_dist.std.max() < 1e-6


def test_training_the_decoder_alone_leaves_the_latents_as_they_are(artwork: Path, tmp_path: Path) -> None:
    shipped = playground_model(PLAYGROUND_FLUX) / "vae"
    how = ("--decoder-only", "--steps", 1, "--batch", 2, "--threads", 1)
    call(artwork, tmp_path / "vae", "--init", shipped, *how, of=vae.train)
    before, after = (
        AutoencoderKL.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (shipped, tmp_path / "vae")
    )
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def small_trainer() -> BaseTrainer:
    """The base model in small, with the tokenizer and the VAE as they are."""
    torch.manual_seed(0)
    shipped = playground_model(PLAYGROUND_FLUX)
    words = CLIPTokenizer.from_pretrained(shipped / "tokenizer")
    coder = AutoencoderKL.from_pretrained(shipped / "vae", dtype=torch.float32)
    whole = base.new_unet()
    unet: Any = type(whole).from_config({**whole.config, "block_out_channels": (16, 16, 32)})
    return BaseTrainer(pipeline(coder, words, base.new_text_encoder(words), unet), lr=0.01, seed=0)


@pytest.mark.slow
def test_the_base_model_learns_and_goes_on_where_it_was(sprites: Sprites, tmp_path: Path) -> None:
    trainer = small_trainer()
    batch = next(iter(scenes.Batches(sprites, trainer.pipe.vae, 0, 4, close_up=True)))
    losses = []
    for _ in range(20):
        trainer.generator.manual_seed(0)  # the same noise and times: only what is learnt can make a difference
        losses.append(trainer.learn(batch, 1.0))
    assert losses[-1] < 0.8 * losses[0]
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    again = small_trainer()
    resume(again, tmp_path / "state.pt")
    assert again.step == 20
    assert again.learn(batch, 0.5) == trainer.learn(batch, 0.5)
    assert all(map(torch.equal, again.parameters, trainer.parameters))
    assert all(map(torch.equal, again.average, trainer.average))


def test_the_base_model_is_saved_with_averaged_weights(tmp_path: Path) -> None:
    trainer = small_trainer()
    live = [p.detach().clone() for p in trainer.parameters]
    trainer.average = [torch.full_like(p, 0.5) for p in trainer.parameters]
    trainer.save(tmp_path / "model")
    assert all(map(torch.equal, live, trainer.parameters))
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert all((p == 0.5).all() for p in opened.unet.parameters())


@pytest.mark.slow
def test_a_model_is_trained_first_on_close_ups_and_then_on_scenes(artwork: Path, tmp_path: Path) -> None:
    start, close, model = tmp_path / "start", tmp_path / "close", tmp_path / "model"
    small_trainer().save(start)
    few = ("--batch", 2, "--threads", 1)
    call(artwork, close, "--init", start, "--close-up", "--steps", 1, *few, of=base.train)
    said = call(artwork, model, "--init", close, "--steps", 2, *few, of=base.train).output
    assert said.startswith("2 loss")
    pipe: Any = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    picture = pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="np").images[0]
    assert np.isfinite(picture).all()
    assert not [path for path in model.rglob("*.json") if str(tmp_path) in path.read_text()]


@pytest.mark.slow
def test_a_new_model_reads_with_the_tokenizer_that_was_built(artwork: Path, tmp_path: Path) -> None:
    words, model = tmp_path / "words", tmp_path / "model"
    call(artwork, words, "--captions", 200, of=tokenizer.main)
    few = ("--close-up", "--steps", 1, "--batch", 1, "--threads", 1)
    call(artwork, model, "--tokenizer", words, *few, of=base.train)
    built, used = (CLIPTokenizer.from_pretrained(folder) for folder in (words, model / "tokenizer"))
    assert used.get_vocab() == built.get_vocab()
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    assert encoder.config.vocab_size == len(built)
    said = call(artwork, tmp_path / "other", "--init", model, "--tokenizer", words, *few, code=2, of=base.train).output
    assert "--tokenizer is for a new model" in said


@pytest.mark.slow
def test_plain_prompts_are_shown_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {"a cat on grass": ("cat",), "a horse and a house on sand": ("horse", "house")}
    monkeypatch.setattr(plain, "PROMPTS", prompts)
    said = call(tmp_path / "sheet.png", playground_model(PLAYGROUND_FLUX), "--seeds", 2, of=plain.main).output
    assert "all objects named in 4 of 4 pictures" in said
    assert Image.open(tmp_path / "sheet.png").height > 2 * world.SIZE


def test_every_concept_has_a_training(tmp_path: Path) -> None:
    found = {one.out.stem: one for one in trainings(tmp_path / "r", tmp_path / "p", tmp_path, PLAYGROUND_FLUX)}
    assert set(found) == {*CONCEPTS, concepts.STYLE}
    kitten = found["kitten"]
    assert (kitten.trigger, kitten.class_word, kitten.method) == ("vbn", "cat", "dreambooth")
    assert kitten.class_images == tmp_path / "p" / "cat"
    assert found["faded"].class_images is None  # a style is to change everything
    assert found["faded"].class_count == 0


def test_unknown_concepts_are_refused_and_the_known_ones_listed(tmp_path: Path) -> None:
    said = call(tmp_path, tmp_path, tmp_path, "--concept", "mouse", code=2, of=loras.main).output
    assert "there is no concept mouse; there are" in said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trigger"), [("robot", "qrt"), (concepts.STYLE, STYLE_TRIGGER)])
def test_a_lora_is_trained_by_the_recipe(name: str, trigger: str, artwork: Path, tmp_path: Path) -> None:
    call("references", artwork, tmp_path / "references", of=concepts.app)
    call("prior", artwork, tmp_path / "prior", "--any-class", "2", "--own-class", "1", of=concepts.app)
    folders = tmp_path / "references", tmp_path / "prior", tmp_path
    (settings,) = trainings(*folders, PLAYGROUND_FLUX, [name], threads=1)
    few = settings.model_copy(update={"steps": 1, "warmup": 0, "batch_size": 1, "prior_batch": 1})
    assert read_lora(train(few)).metadata["trigger"] == trigger
