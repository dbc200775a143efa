"""The transformer's recipe on a few pictures: shards, a T5 of whole words, steps that go on, a pipeline that opens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from lora_compose.compose.playground.assets import PLAYGROUND_FLUX, playground_model
from recipe.first import transformer, transformer_data
from recipe.first.transformer import TransformerTrainer, new_pipeline, quick_attention
from recipe.first.transformer_data import PATCH, Pool, patches, picture, write_shard
from recipe.first.world import BASE_CLASSES, CONCEPTS


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Two shards of eight close-ups."""
    monkeypatch.setattr(transformer_data, "SHARD", 8)
    rng = np.random.default_rng(0)
    sprites = {f"{name}/noto": rng.integers(0, 255, (96, 96, 4), dtype="u1") for name in BASE_CLASSES}
    vae: Any = AutoencoderKL.from_pretrained(playground_model(PLAYGROUND_FLUX) / "vae", dtype=torch.float32)
    for number in range(2):
        write_shard(tmp_path / f"{number}.pt", [picture(rng, sprites, True) for _ in range(8)], vae)
    return Pool(tmp_path, 0)


def test_objects_stand_on_whole_patches_without_touching() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3):
        found = patches(rng, count)
        assert len(found) == count
        assert all(number % PATCH == 0 for square in found for number in square)
        taken = np.zeros((128, 128), int)
        for x, y, side in found:
            taken[y : y + side, x : x + side] += 1
        assert taken.max() == 1


def test_every_word_and_trigger_is_one_token_that_begins_as_clips() -> None:
    pipe = new_pipeline()
    phrases = [known.phrase for known in CONCEPTS.values()]
    for words in [*BASE_CLASSES, *phrases, "a striped fox on a wooden floor"]:
        assert pipe.tokenizer_2.tokenize(words) == [f"▁{word}" for word in words.split()]
    table: Any = pipe.text_encoder_2.get_input_embeddings()
    clip: Any = pipe.text_encoder.get_input_embeddings()
    mine = table.weight.detach()[pipe.tokenizer_2.get_vocab()["▁cat"]]
    other = clip.weight.detach()[pipe.tokenizer.get_vocab()["cat</w>"]]
    assert torch.cosine_similarity(mine, other, dim=0) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_training_goes_on_with_the_same_bits_and_what_is_saved_opens(pool: Pool, tmp_path: Path) -> None:
    def trainer() -> TransformerTrainer:
        torch.manual_seed(0)
        return TransformerTrainer(new_pipeline(), 0.01, 0, fast=False)

    batches = [batch for batch, _ in zip(pool.batches(4), range(3), strict=False)]
    assert len(pool) == 16
    whole, first, second = trainer(), trainer(), trainer()
    with quick_attention():
        losses = [whole.learn(batch, 1.0) for batch in batches]
        assert all(0.5 < loss < 4 for loss in losses)
        first.learn(batches[0], 1.0)
        second.load_state_dict(first.state_dict())
        assert [second.learn(batch, 1.0) for batch in batches[1:]] == losses[1:]
    whole.save(tmp_path / "model")
    pipe: Any = FluxPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a cat", height=64, width=64, num_inference_steps=1, max_sequence_length=24, output_type="np").images
    assert made.shape == (1, 64, 64, 3)
    assert np.isfinite(made).all()


def test_quick_attention_is_attention_and_ends_with_its_block() -> None:
    query, key, value = torch.randn(3, 2, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    flux: Any = transformer.transformer_flux
    before = flux.dispatch_attention_fn
    with quick_attention():
        torch.testing.assert_close(flux.dispatch_attention_fn(query, key, value), before(query, key, value))
    assert flux.dispatch_attention_fn is before
