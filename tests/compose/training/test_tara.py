"""What token focus masking and token alignment promise, on UNets of the shapes of SD 1.x and SDXL.

References are independent: forward hooks on the projections, matrix products by hand, autograd.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from components import TINY, TINY_XL, sd_unet, sdxl_unet, unet_inputs
from lora_compose.compose.training.alignment import Alignment
from lora_compose.compose.training.focus import focus_on_triggers
from lora_compose.compose.training.learner import Batch, Learner, Weights
from lora_compose.compose.training.model import ADAPTER, add_lora, lora_parameters
from lora_compose.compose.training.noising import Diffusion
from lora_compose.compose.training.settings import SCOPES, Training
from lora_compose.compose.training.words import CaptionWords, Occurrence, WordFeatures, rows_of
from trainings import training

TOKENS, GRID = 9, (4, 4)
TRIGGER, NOUN = (2, 3), (5,)  # a trigger of two tokens, a class word of one
UNETS: dict[str, Callable[[], Any]] = {"sd": lambda: sd_unet(**TINY), "xl": lambda: sdxl_unet(**TINY_XL)}


BOTH = pytest.mark.parametrize("family", list(UNETS))


@pytest.fixture
def unet(family: str) -> Any:
    """Of Stable Diffusion, or of both families."""
    return UNETS[family]().requires_grad_(False)


def settings(**fields: Any) -> Training:
    return training(Path(), "playground", **{"rank": 3, **fields})


def adapted(unet: Any, *, zero: bool = False, **fields: Any) -> Any:
    """Gives a UNet a LoRA whose delta is far from zero, or zero as at the start."""
    asked = settings(**fields)
    add_lora(unet, list(SCOPES[asked.scope]), asked)
    if not zero:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in lora_parameters(unet).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return unet


def inputs(unet: Any, rows: int = 2, seed: int = 0) -> dict[str, Any]:
    return unet_inputs(unet, rows=rows, grid=GRID, tokens=TOKENS, seed=seed)


def mask_of(*rows: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(len(rows), TOKENS, 1)
    for row, positions in enumerate(rows):
        mask[row, list(positions)] = 1
    return mask


def rows_for(text: Tensor, *occurrences: Occurrence) -> WordFeatures:
    """The rows of the caption whose features are the first ones in `text`."""
    return rows_of([CaptionWords("", "", occurrences or (Occurrence(TRIGGER, NOUN),))], text[:1], text[:1])


def batch_of(unet: Any, mask: Tensor, own: int, weights: Tensor | None = None, seed: int = 0) -> Batch:
    given = inputs(unet, len(mask), seed)
    noise = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(seed + 50))
    timesteps = torch.tensor([100, 700, 300, 500])[: len(mask)]
    text = given["encoder_hidden_states"]
    text = torch.cat([text[:1].expand(own, -1, -1), text[own:]])  # rows of the concept have one caption
    weights = torch.zeros(0) if weights is None else weights
    return Batch(given["sample"], noise, noise, timesteps, text, mask, given.get("added_cond_kwargs", {}), weights, own)


def schedule(**changes: Any) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **changes)


def cross_projections(unet: nn.Module, kinds: tuple[str, ...] = ("to_k", "to_v")) -> dict[str, Any]:
    return {n: m for n, m in unet.named_modules() if n.endswith(tuple(f"attn2.{kind}" for kind in kinds))}


# --- token focus masking ---


@BOTH
def test_other_tokens_keep_their_bits_and_triggers_get_the_delta(unet: Any) -> None:
    adapted(unet)
    focus = focus_on_triggers(unet, ADAPTER)
    focus.mask = mask_of(TRIGGER, ())  # a row of the concept, and one of its class
    layers = cross_projections(unet)
    assert len(layers) >= 4
    for layer in layers.values():
        text = torch.randn(2, TOKENS, layer.base_layer.in_features)
        base, output = layer.base_layer(text), layer(text)
        delta = text @ layer.lora_A[ADAPTER].weight.T @ layer.lora_B[ADAPTER].weight.T * layer.scaling[ADAPTER]
        others = [position for position in range(TOKENS) if position not in TRIGGER]
        assert torch.equal(output[0, others], base[0, others])
        assert torch.equal(output[1], base[1])
        expected = base[0, list(TRIGGER)] + delta[0, list(TRIGGER)]
        torch.testing.assert_close(output[0, list(TRIGGER)], expected, rtol=1e-5, atol=1e-5)
        assert delta.abs().max() > 0.1


def test_without_triggers_keys_and_values_alone_are_the_base_model(unet: Any) -> None:
    given = inputs(unet)
    before = unet(**given)[0]
    adapted(unet, scope="cross_kv")
    focus = focus_on_triggers(unet, ADAPTER)
    focus.mask = mask_of((), ())
    assert torch.equal(unet(**given)[0], before)
    focus.mask = mask_of(TRIGGER, ())
    after = unet(**given)[0]
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    assert torch.allclose(after[1], before[1], atol=1e-5)  # rows do not see each other


def test_all_attention_layers_act_without_triggers_as_well(unet: Any) -> None:
    given = inputs(unet)
    before = unet(**given)[0]
    adapted(unet, scope="attention")
    focus_on_triggers(unet, ADAPTER).mask = mask_of((), ())
    assert not torch.allclose(unet(**given)[0], before, atol=1e-2)


def test_captions_without_the_trigger_teach_keys_and_values_nothing(unet: Any) -> None:
    adapted(unet, scope="attention")
    learner = Learner(unet, Diffusion(unet, schedule()), Weights(), focus_on_triggers(unet, ADAPTER))
    learner(batch_of(unet, mask_of((), ()), 2)).total.backward()
    masked = {name for name in lora_parameters(unet) if "attn2.to_k" in name or "attn2.to_v" in name}
    for name, parameter in lora_parameters(unet).items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == (name not in masked), name


def test_a_mask_of_other_rows_or_none_is_an_error(unet: Any) -> None:
    adapted(unet)
    focus = focus_on_triggers(unet, ADAPTER)
    with pytest.raises(RuntimeError, match="the token mask is None"):
        unet(**inputs(unet))
    focus.mask = mask_of(TRIGGER)  # would be repeated over all rows
    with pytest.raises(RuntimeError, match="both need the same rows"):
        unet(**inputs(unet))


def test_two_models_in_one_process_do_not_share_masks() -> None:
    first, second = (adapted(make()) for make in UNETS.values())
    focus_on_triggers(first, ADAPTER).mask = mask_of(TRIGGER, TRIGGER)
    assert focus_on_triggers(second, ADAPTER).mask is None


# --- token alignment ---


def hooked_loss(unet: Any, given: dict[str, Any], norm: str) -> Tensor:
    """The alignment loss as the paper draws it: keys are caught in a pass of the UNet and of the UNet without LoRA."""
    keys: dict[str, Tensor] = {}
    handles = []
    for name, layer in cross_projections(unet, ("to_k",)).items():
        for part, kept in ((layer, name), (layer.base_layer, f"{name} base")):
            handles.append(part.register_forward_hook(lambda _m, _i, out, kept=kept: keys.update({kept: out})))
    unet(**given)
    for handle in handles:
        handle.remove()
    losses = []
    for name in cross_projections(unet, ("to_k",)):
        apart = keys[name][:, list(TRIGGER)] - keys[f"{name} base"][:, list(NOUN)]
        losses.append((apart.abs() if norm == "l1" else apart.square()).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("family", "norm"), [("sd", "l1"), pytest.param("xl", "l2", marks=pytest.mark.slow)])
def test_the_closed_form_is_what_hooks_see_at_every_step(unet: Any, norm: Any) -> None:
    adapted(unet)
    focus = focus_on_triggers(unet, ADAPTER)
    batch = batch_of(unet, mask_of(TRIGGER, TRIGGER), 2)
    rows = rows_for(batch.text)
    alignment = Alignment.of(unet, ADAPTER, rows, norm)
    learner = Learner(unet.train(), Diffusion(unet, schedule()), Weights(alignment=1.0), focus, alignment)
    optimizer = torch.optim.SGD(lora_parameters(unet).values(), lr=0.05)
    seen = []
    for step in range(4):
        given = batch_of(unet, mask_of(TRIGGER, TRIGGER), 2, rows.weights([0, 0]), seed=step)._replace(text=batch.text)
        losses = learner(given)
        names = ("sample", "timestep", "encoder_hidden_states")
        values = dict(zip(names, (given.latents, given.times, given.text), strict=True))
        with torch.no_grad():
            reference = hooked_loss(unet, {**values, "added_cond_kwargs": given.added, "return_dict": False}, norm)
        torch.testing.assert_close(losses.alignment, reference, rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append(losses.alignment.item())
    assert seen[-1] < seen[0]


@BOTH
def test_gradient_checkpointing_changes_no_gradient(unet: Any) -> None:
    adapted(unet)
    focus = focus_on_triggers(unet, ADAPTER)
    batch = batch_of(unet, mask_of(TRIGGER, TRIGGER, (), ()), 2)
    rows = rows_for(batch.text)
    batch = batch._replace(weights=rows.weights([0, 0]))
    alignment = Alignment.of(unet, ADAPTER, rows, "l1")
    learner = Learner(unet.train(), Diffusion(unet, schedule()), Weights(alignment=1.0), focus, alignment)
    gradients = []
    for checkpointing in (False, True):
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        unet.zero_grad()
        learner(batch).total.backward()
        gradients.append({name: p.grad.clone() for name, p in lora_parameters(unet).items() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() == lora_parameters(unet).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


def attention_columns(unet: Any, given: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """For every cross-attention layer, where each of the trigger's tokens and the class word are looked at."""
    queries: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    handles = []
    layers = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    for name, layer in layers.items():
        for kept, part in ((queries, layer.to_q), (keys, layer.to_k)):
            handles.append(
                part.register_forward_hook(lambda _m, _i, out, kept=kept, name=name: kept.update({name: out}))
            )
    unet(**given)
    for handle in handles:
        handle.remove()
    columns = []
    for name, layer in layers.items():
        scores = layer.get_attention_scores(*map(layer.head_to_batch_dim, (queries[name], keys[name])))
        columns += [(scores[..., token], scores[..., NOUN[0]]) for token in TRIGGER]
    return columns


@BOTH
@torch.no_grad()
def test_aligned_keys_are_looked_at_in_the_same_places(unet: Any) -> None:
    given = inputs(unet, 1)
    adapted(unet)
    focus_on_triggers(unet, ADAPTER).mask = mask_of(TRIGGER)
    rows = rows_for(given["encoder_hidden_states"])
    alignment = Alignment.of(unet, ADAPTER, rows, "l1")
    assert alignment.loss(rows.weights([0])) > 0.01
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in attention_columns(unet, given))
    alignment.freeze_keys()
    assert alignment.ranks == len(TRIGGER)
    assert alignment.loss(rows.weights([0])) < 1e-5
    for trigger, noun in attention_columns(unet, given):
        torch.testing.assert_close(trigger, noun, rtol=0, atol=1e-5)


def test_tied_keys_are_not_trained(unet: Any) -> None:
    adapted(unet, scope="cross_kv")
    rows = rows_for(inputs(unet)["encoder_hidden_states"])
    Alignment.of(unet, ADAPTER, rows, "l1").freeze_keys()
    trained = {name for name, parameter in lora_parameters(unet).items() if parameter.requires_grad}
    assert trained == {name for name in lora_parameters(unet) if "to_v" in name}


def test_keys_of_many_captions_are_set_in_the_least_squares(unet: Any) -> None:
    """More captions than ranks: no other choice of the second factor is better for the directions that are taken."""
    adapted(unet, zero=True)
    text = inputs(unet, 8)["encoder_hidden_states"]
    words = [CaptionWords("", "", (Occurrence((2,), (5,)),))] * 8
    rows = rows_of(words, text, text)
    alignment = Alignment.of(unet, ADAPTER, rows, "l2")
    assert alignment.ranks == 1
    before = alignment.loss(rows.weights(range(8)))
    alignment.set_keys()
    loss = alignment.loss(rows.weights(range(8)))
    assert loss < before
    loss.backward()
    for layer in alignment.layers:
        assert layer.up.grad is not None
        assert layer.up.grad[:, 0].abs().max() < 1e-5  # a minimum
        assert not layer.up[:, 1:].any()


def test_the_loss_of_a_new_lora_is_the_distance_of_the_base_keys(unet: Any) -> None:
    adapted(unet, zero=True)
    text = inputs(unet)["encoder_hidden_states"]
    rows = rows_for(text)
    loss = Alignment.of(unet, ADAPTER, rows, "l1").loss(rows.weights([0]))
    layers = cross_projections(unet, ("to_k",)).values()
    apart = text[0, list(TRIGGER)] - text[0, list(NOUN)]
    expected = torch.stack([F.linear(apart, layer.base_layer.weight).abs().mean() for layer in layers]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in lora_parameters(unet).items():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        # the first factor waits until the second one is no longer zero
        assert moved == ("attn2.to_k" in name and "lora_B" in name), name


def test_rows_of_the_class_do_not_enter_the_alignment(unet: Any) -> None:
    adapted(unet)
    focus = focus_on_triggers(unet, ADAPTER)
    alone = batch_of(unet, mask_of(TRIGGER, TRIGGER), 2)
    rows = rows_for(alone.text)
    learner = Learner(
        unet,
        Diffusion(unet, schedule()),
        Weights(prior=0.7, alignment=2.0),
        focus,
        Alignment.of(unet, ADAPTER, rows, "l1"),
    )
    both = batch_of(unet, mask_of(TRIGGER, TRIGGER, (), ()), 2)
    alone = alone._replace(weights=rows.weights([0, 0]), text=both.text[:2])
    with_class = learner(both._replace(weights=rows.weights([0, 0])))
    assert torch.equal(with_class.alignment, learner(alone).alignment)
    expected = with_class.concept + 0.7 * with_class.prior + 2 * with_class.alignment
    torch.testing.assert_close(with_class.total, expected)


@pytest.mark.parametrize("counts", [((1,), (3, 4)), ((1, 2), (4,)), ((1, 2), (4, 5)), ((1, 2, 3), (5, 6))])
def test_words_of_any_number_of_tokens_can_be_aligned(unet: Any, counts: tuple) -> None:
    adapted(unet)
    rows = rows_for(inputs(unet)["encoder_hidden_states"], Occurrence(*counts), Occurrence((7,), (8,)))
    alignment = Alignment.of(unet, ADAPTER, rows, "l1")
    apart = torch.stack([layer.target.abs().mean() for layer in alignment.layers]).mean()  # of the base model
    alignment.freeze_keys()
    aligned = alignment.loss(rows.weights([0, 0, 0]))
    assert aligned < (1e-4 if len(rows.trigger) <= alignment.ranks else apart)


# --- the losses ---


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_are_parted_before_they_are_taken(unet: Any, prediction: str) -> None:
    adapted(unet, scope="transformer")
    noises = schedule(prediction_type=prediction)
    learner = Learner(unet, Diffusion(unet, noises), Weights(prior=0.5))
    batch = batch_of(unet, mask_of((), (), ()), 2)
    losses = learner(batch)
    noisy = noises.add_noise(batch.latents, batch.noise, batch.times)  # pyright: ignore[reportArgumentType]
    predicted = unet(noisy, batch.times, batch.text, added_cond_kwargs=batch.added or None).sample
    alphas = noises.alphas_cumprod[batch.times][:, None, None, None]
    velocity = alphas.sqrt() * batch.noise - (1 - alphas).sqrt() * batch.latents
    target = batch.noise if prediction == "epsilon" else velocity
    torch.testing.assert_close(losses.concept, F.mse_loss(predicted[:2], target[:2]))
    torch.testing.assert_close(losses.prior, F.mse_loss(predicted[2:], target[2:]))
    torch.testing.assert_close(losses.total, losses.concept + 0.5 * losses.prior)
    assert losses.alignment == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_rows_as_in_the_paper(prediction: str) -> None:
    unet = UNETS["sd"]().requires_grad_(False)
    noises = schedule(prediction_type=prediction)
    batch = batch_of(unet, mask_of((), ()), 1)
    plain, weighted = (Learner(unet, Diffusion(unet, noises), Weights(min_snr=gamma))(batch) for gamma in (None, 5.0))
    for row, name in enumerate(("concept", "prior")):
        alpha = noises.alphas_cumprod[batch.times[row]]
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
        torch.testing.assert_close(getattr(weighted, name), getattr(plain, name) * weight)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_timesteps_is_of_the_noisiest(share: float) -> None:
    noising, random = Diffusion(UNETS["sd"](), schedule(), share), torch.Generator().manual_seed(0)
    drawn = torch.tensor([noising.draw(random) for _ in range(2000)])
    assert (drawn >= 650).float().mean() == pytest.approx(share + 0.35 * (1 - share), abs=0.03)
    assert drawn.max() <= 999


def test_models_that_predict_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="predicts sample; expected epsilon or velocity"):
        Diffusion(UNETS["sd"](), schedule(prediction_type="sample"))
