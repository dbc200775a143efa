"""Prior preservation by the base model's own predictions, for captions about the class of the concept's images."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from components import TINY, sd_unet, unet_inputs
from lora_compose.compose.training import train
from lora_compose.compose.training.focus import focus_on_triggers
from lora_compose.compose.training.learner import Batch, Learner, Weights
from lora_compose.compose.training.model import ADAPTER, add_lora, lora_parameters, without_lora
from lora_compose.compose.training.noising import Diffusion
from lora_compose.compose.training.settings import SCOPES
from trainings import TARA, paint_folder, sd_pipeline, training

OWN, CLASS = slice(0, 1), slice(1, None)
SCHEDULE = DDPMScheduler()


def adapted(*, zero: bool = False, **fields: Any) -> tuple[Any, Any]:
    """A UNet, and the same with a LoRA, which changes nothing or much."""
    plain = sd_unet(**TINY).requires_grad_(False)
    unet = copy.deepcopy(plain)
    add_lora(unet, list(SCOPES["attention"]), training(Path(), "playground", rank=3, **fields))
    if not zero:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in lora_parameters(unet).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return plain, unet


def batch_of(unet: Any) -> Batch:
    """A row of the concept and two of its class."""
    given = unet_inputs(unet, rows=3, grid=(4, 4), tokens=9, seed=0)
    noise = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(50))
    mask = torch.zeros(3, 9, 1)
    mask[OWN, 2] = 1
    times = torch.tensor([100, 700, 300])
    text = given["encoder_hidden_states"]
    return Batch(given["sample"], noise, noise, times, text, mask, {}, torch.zeros(0), 1)


def predicted(unet: Any, batch: Batch, rows: slice) -> Tensor:
    noisy = SCHEDULE.add_noise(batch.latents, batch.input_noise, batch.times)[rows]  # pyright: ignore[reportArgumentType]
    return unet(noisy, batch.times[rows], batch.text[rows]).sample


@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rows_of_the_class_are_compared_with_the_base_model(dora: bool) -> None:
    plain, unet = adapted(dora=dora)
    batch = batch_of(unet)
    losses = Learner(unet, Diffusion(unet, SCHEDULE), Weights(prior=0.7), preserves=True)(batch)
    expected = F.mse_loss(predicted(unet, batch, CLASS), predicted(plain, batch, CLASS))
    torch.testing.assert_close(losses.concept, F.mse_loss(predicted(unet, batch, OWN), batch.noise[OWN]))
    torch.testing.assert_close(losses.prior, expected)
    torch.testing.assert_close(losses.total, losses.concept + 0.7 * expected)
    assert expected > 1e-3
    weights = [weight for weight in lora_parameters(unet).values() if weight.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(losses.prior, weights), torch.autograd.grad(expected, weights))


def test_perturbed_noise_is_what_the_network_sees_and_not_what_it_predicts() -> None:
    plain, unet = adapted()
    batch = batch_of(unet)
    perturbed = batch._replace(input_noise=batch.noise + 0.1 * batch.noise.flip(0))
    losses = Learner(unet, Diffusion(unet, SCHEDULE), Weights(), preserves=True)(perturbed)
    torch.testing.assert_close(losses.concept, F.mse_loss(predicted(unet, perturbed, OWN), batch.noise[OWN]))
    expected = F.mse_loss(predicted(unet, perturbed, CLASS), predicted(plain, perturbed, CLASS))
    torch.testing.assert_close(losses.prior, expected)
    assert not torch.equal(predicted(unet, perturbed, OWN), predicted(unet, batch, OWN))


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_that_changes_nothing_has_nothing_to_correct(dora: bool) -> None:
    _, unet = adapted(zero=True, dora=dora)
    losses = Learner(unet, Diffusion(unet, SCHEDULE), Weights(), preserves=True)(batch_of(unet))
    assert losses.prior <= (1e-10 if dora else 0), "a DoRA divides by a norm that it has computed"
    losses.prior.backward()
    for name, weight in lora_parameters(unet).items():
        assert weight.grad is None or float(weight.grad.abs().max()) <= (1e-4 if dora else 0), name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    _, unet = adapted()
    unet.train()
    learner, batch = Learner(unet, Diffusion(unet, SCHEDULE), Weights(), preserves=True), batch_of(unet)
    weights = list(lora_parameters(unet).values())
    expected = torch.autograd.grad(learner(batch).total, weights)
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(learner(batch).total, weights), expected)


def test_token_masks_hold_beside_the_base_model() -> None:
    plain, unet = adapted()
    batch = batch_of(unet)
    focus = focus_on_triggers(unet, ADAPTER)
    losses = Learner(unet, Diffusion(unet, SCHEDULE), Weights(), focus, preserves=True)(batch)
    focus.mask = batch.mask[CLASS]
    torch.testing.assert_close(losses.prior, F.mse_loss(predicted(unet, batch, CLASS), predicted(plain, batch, CLASS)))


def test_what_is_trained_stays_so_also_after_a_failure() -> None:
    plain, unet = adapted()
    batch = batch_of(unet)
    lora_parameters(unet)[next(iter(lora_parameters(unet)))].requires_grad_(False)
    trained = [weight.requires_grad for weight in lora_parameters(unet).values()]
    before = predicted(unet, batch, CLASS)

    def fail() -> None:
        with without_lora(unet):
            assert torch.equal(predicted(unet, batch, CLASS), predicted(plain, batch, CLASS))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(predicted(unet, batch, CLASS), before)
    assert [weight.requires_grad for weight in lora_parameters(unet).values()] == trained


@pytest.mark.parametrize(("kept", "caption"), [("preserve_class", "a photo of cat"), ("preserve_empty", "")])
def test_a_training_changes_what_is_kept_less(tmp_path: Path, kept: str, caption: str) -> None:
    paint_folder(tmp_path / "images")
    sd_pipeline().save_pretrained(tmp_path / "model")
    plain: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    batch = batch_of(plain.unet)
    with torch.no_grad():
        text = plain.encode_prompt(caption, "cpu", 1, False)[0].expand(3, -1, -1)
        batch = batch._replace(text=text)
        before = predicted(plain.unet, batch, slice(None))
        changes = []
        for preserve in (False, True):
            out = tmp_path / f"{preserve}.safetensors"
            fields: dict[str, Any] = {"steps": 8, "prior_weight": 10.0, kept: preserve, "tara": TARA}
            with torch.enable_grad():
                train(training(tmp_path, tmp_path / "model", out=out, **fields))
            plain.load_lora_weights(out)
            changes.append(F.mse_loss(predicted(plain.unet, batch, slice(None)), before))
            plain.unload_lora_weights()
    assert changes[1] < 0.5 * changes[0]
