"""The inputs of layers are measured as a LoRA alone, and then the merged LoRA, makes them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

import merging_reference as reference
from components import State, seeded, tiny_pipeline
from lora_compose.attention import LoraFactors
from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.merging import Changes, MergeLayer, Merger, Moments, make_merger
from lora_compose.pipelines.merging.calibration import calibrate, prompt_of
from lora_compose.pipelines.merging.changes import Name
from lora_compose.pipelines.merging.iteris import IterIs, iteris
from pairs import slow_but
from reference import dense
from small_world import STYLE

PROMPTS = ("a cat", "a dog on grass")
LAYERS: tuple[Name, ...] = (
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"),
    ("unet", "conv_in"),
    ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
    ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"),
)
Weights = Mapping[Name, Tensor]


def layer_of(pipe: Any, name: Name) -> nn.Module:
    return getattr(pipe, name[0]).get_submodule(name[1])


def changes_of(pipe: Any) -> dict[Name, list[LoraFactors]]:
    numbers = seeded()
    made: dict[Name, list[LoraFactors]] = {}
    for name in LAYERS:
        outputs, *sides = layer_of(pipe, name).get_parameter("weight").shape
        ups = [(outputs, rank, *(1 for _ in sides[1:])) for rank in (2, 3)]
        downs = [(rank, *sides) for rank in (2, 3)]
        made[name] = [
            LoraFactors(torch.randn(down, generator=numbers), torch.randn(up, generator=numbers))
            for up, down in zip(ups, downs, strict=True)
        ]
    return made


def columns(layer: nn.Module, seen: Sequence[Tensor]) -> np.ndarray:
    rows = [F.unfold(x, 3, padding=1).movedim(1, -1) if isinstance(layer, nn.Conv2d) else x for x in seen]
    return torch.cat([x.flatten(0, -2) for x in rows]).double().T.numpy()


class Watched:
    """A plain pipeline whose weights can be changed, with the inputs of its layers and of its models."""

    def __init__(self) -> None:
        self.pipe: Any = tiny_pipeline(StableDiffusionPipeline)
        self.before = {name: layer_of(self.pipe, name).get_parameter("weight").detach().clone() for name in LAYERS}

    def with_weights(self, changes: Weights) -> None:
        with torch.no_grad():
            for name, change in changes.items():
                weight = layer_of(self.pipe, name).get_parameter("weight")
                weight.copy_(self.before[name] + change.reshape(weight.shape).to(weight))

    def seen(self, run: Any) -> dict[Name, np.ndarray]:
        found: dict[Name, list[Tensor]] = {name: [] for name in LAYERS}
        with ExitStack() as stack:
            for name in LAYERS:
                keep = partial(lambda kept, module, inputs: kept.append(inputs[0].clone()), found[name])
                stack.callback(layer_of(self.pipe, name).register_forward_pre_hook(keep).remove)
            run()
        return {name: columns(layer_of(self.pipe, name), found[name]) for name in LAYERS}

    def image(self, prompt: str) -> list[tuple[nn.Module, Any, Any]]:
        """Makes an image; the calls of its models."""
        calls: list[tuple[nn.Module, Any, Any]] = []
        with ExitStack() as stack:
            for model in (self.pipe.text_encoder, self.pipe.unet):
                hook = model.register_forward_pre_hook(
                    lambda module, inputs, named: calls.append((module, inputs, named)), with_kwargs=True
                )
                stack.callback(hook.remove)
            self.pipe(prompt, num_inference_steps=2, guidance_scale=1.0, output_type="latent", generator=seeded(3))
        return calls

    @torch.no_grad()
    def again(self, calls: Sequence[tuple[nn.Module, Any, Any]]) -> None:
        for model, inputs, named in calls:
            model(*inputs, **named)


@pytest.mark.parametrize("rounds", slow_but([2], [1, 2]))
def test_iteris_compares_each_lora_with_the_merged_model_of_the_round_before(rounds: int) -> None:
    pipe = tiny_pipeline()
    changes = changes_of(pipe)
    state = State(pipe)
    merger = IterIs(rounds=rounds)
    parts: list[float] = []
    moments = calibrate(pipe, changes, PROMPTS, merger, steps=2, seed=3, on_progress=parts.append)
    state.assert_unchanged()
    assert parts == pytest.approx([(i + 1) / (2 * rounds) for i in range(2 * rounds)])

    plain = Watched()
    whole = {name: [dense(one).flatten(1) for one in changes[name]] for name in LAYERS}
    merged: dict[Name, np.ndarray] = {}
    for number in range(rounds):
        alone: list[dict[Name, np.ndarray]] = []
        with_merged: list[dict[Name, np.ndarray]] = []
        for k, prompt in enumerate(PROMPTS):
            plain.with_weights({name: whole[name][k] for name in LAYERS})
            calls: list[Any] = []
            alone.append(plain.seen(lambda prompt=prompt, calls=calls: calls.extend(plain.image(prompt))))
            if number:
                plain.with_weights({name: torch.from_numpy(change) for name, change in merged.items()})
                with_merged.append(plain.seen(lambda calls=calls: plain.again(calls)))
        seen = with_merged or alone
        merged = {
            name: reference.iteris(
                [one.double().numpy() for one in whole[name]],
                [by[name] for by in alone],
                [by[name] for by in seen],
                merger.ridge,
            )
            for name in LAYERS
        }
    for name in LAYERS:
        found = dense(iteris(changes[name], moments[name], 1e-2)).double().numpy()
        error = np.linalg.norm(found - merged[name]) / np.linalg.norm(merged[name])
        assert error < 1e-3, name


class Answer(Merger):
    """A merger whose result is known, so that a second round measures what its layers read."""

    needs_model = True
    rounds = 2

    def __init__(self, result: Mapping[Name, LoraFactors]) -> None:
        self.result = result

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        results = iter(self.result.values())
        return lambda changes, moments: next(results)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["dog", STYLE])
def test_on_the_playground_iteris_comes_nearer_to_each_lora_alone_than_ssr(style: str) -> None:
    """The squared error of the layers' outputs, relative to what each LoRA alone adds to them, on its own image."""
    pipe = StableDiffusionPipeline.from_pretrained(playground_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    given = [Given(name, read_lora(playground_lora(name))) for name in ("cat", style)]
    layers, prompts = match_files(given, pipe).changes, [prompt_of(one.file) for one in given]
    errors: dict[str, float] = {}
    for name in ("cat", "ssr", "iteris"):
        merger = make_merger(name)
        moments = calibrate(pipe, layers, prompts, merger) if merger.needs_model else {}
        merge = merger.start([*layers.values()])
        result = {layer: merge(changes, moments.get(layer)) for layer, changes in layers.items()}
        seen = calibrate(pipe, layers, prompts, Answer(result))
        errors[name] = float(np.mean([relative_error(layers[layer], result[layer], seen[layer]) for layer in seen]))
    print(style, errors)
    assert errors["iteris"] < errors["ssr"] < errors["cat"]


def relative_error(changes: Sequence[LoraFactors], result: LoraFactors, moments: Moments) -> float:
    """The mean over LoRAs of |W y - W_k x|^2 / |W_k x|^2, W being the result in the rows of all A's."""
    downs = torch.cat([one.down.flatten(1) for one in changes]).double()
    rows = torch.linalg.lstsq(downs.T, result.down.flatten(1).double().T).solution.T
    w = result.scale * result.up.flatten(1).double() @ rows
    errors, start = [], 0
    for k, one in enumerate(changes):
        own = slice(start, start := start + one.rank)
        w_k = torch.zeros_like(w)
        w_k[:, own] = one.scale * one.up.flatten(1).double()
        sent = (w_k @ moments.alone[k] @ w_k.T).trace()
        both = (w @ moments.cross[k].T @ w_k.T).trace()
        errors.append(float(((w @ moments.merged[k] @ w.T).trace() - 2 * both + sent) / sent))
    return float(np.mean(errors))
