"""Measures the inputs of a model's layers while one LoRA alone acts, for mergers that need them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_compose.attention import LoraFactors
from lora_compose.attention.device import uncompiled
from lora_compose.attention.fitting import shape_of
from lora_compose.attention.lora_bank import base_layer
from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.formats.models import models_by_part
from lora_compose.pipelines.merging.changes import Name
from lora_compose.pipelines.merging.merger import Changes, Merger, Moments


def prompt_of(file: LoraFile, called: str = "") -> str:
    """A prompt for a LoRA, called so in messages, from its trigger and class word. ValueError if it has no trigger."""
    if not file.trigger:
        raise ValueError(
            f"{called or file.path.name} does not say its trigger; give lora-compose merge a text that shows what it "
            "has learned: --prompt, once for each file, in their order"
        )
    return f"a photo of {file.trigger} {file.class_word or ''}".strip()


def calibrate(
    pipe: Callable[..., Any],
    layers: Mapping[Name, Changes],
    prompts: Sequence[str],
    merger: Merger,
    *,
    steps: int = 10,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> Mapping[Name, Moments]:
    """Generates one image with each LoRA alone, without guidance, and measures the inputs of the layers.

    In every round of the merger but the first, each forward pass is run a second time with what the last round has
    merged: prompts x steps x (2 rounds - 1) rows of the model in all.

    Args:
        pipe: A pipeline of diffusers; it is left as it was found.
        layers: By layer of it, the change by every LoRA.
        seed: Of the start noise, the same for all.
        on_progress: Called with the finished fraction.

    Returns:
        By layer, the moments of the last round, in fp64 on the CPU.
    """
    merge = merger.start(list(layers.values()))
    changed = {name: total for name, changes in layers.items() if (total := sum(change.rank for change in changes))}
    latest: dict[Name, Moments] = {}
    for number in range(merger.rounds):
        merged = {name: merge(layers[name], moments) for name, moments in latest.items()}
        sums = {name: Moments.zeros(len(prompts), ranks) for name, ranks in changed.items()}
        for k, prompt in enumerate(prompts):
            with _measuring(pipe, layers, sums, k, merged):
                pipe(
                    prompt=prompt, num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
                    generator=torch.Generator().manual_seed(seed),
                )  # fmt: skip
            if on_progress is not None:
                on_progress((number * len(prompts) + k + 1) / (merger.rounds * len(prompts)))
        latest = sums if merged else {name: Moments.first(moments.alone) for name, moments in sums.items()}
    return latest


@contextmanager
def _measuring(
    pipe: object,
    layers: Mapping[Name, Changes],
    sums: Mapping[Name, Moments],
    acting: int,
    merged: Mapping[Name, LoraFactors],
) -> Iterator[None]:
    """Lets one LoRA act on a pipeline's models, and puts moments in `sums`; with `merged`, each model runs twice."""
    models = models_by_part(pipe)
    again = _Again()
    with ExitStack() as stack:
        if merged:
            parts: set[Part] = {part for part, _ in sums}
            for part in parts:
                stack.enter_context(_run_twice(uncompiled(models[part]), again))
        for name, moments in sums.items():
            layer = uncompiled(models[name[0]]).get_submodule(name[1])
            stack.enter_context(_measured(layer, layers[name], acting, moments, merged.get(name), again))
        yield


@dataclass
class _Again:
    """Whether a model is running for the second time, with the merged LoRA."""

    on: bool = False


@contextmanager
def _run_twice(model: nn.Module, again: _Again) -> Iterator[None]:
    """Runs a model once more after each of its forward passes, with the same inputs; that output is not used."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if not again.on:
            again.on = True
            try:
                module(*inputs, **named)
            finally:
                again.on = False

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _measured(
    layer: nn.Module, changes: Changes, acting: int, sums: Moments, merged: LoraFactors | None, again: _Again
) -> Iterator[None]:
    """Lets one LoRA act on a layer, or the merged one where the model runs again, and sums means of (A x)(A x)^T."""
    base = base_layer(layer)
    _, *sides = shape_of(type(base).__name__, base)
    whole = torch.cat([change.down.reshape(-1, *sides) for change in changes])
    tokens = 0
    alone: deque[Tensor] = deque()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal tokens
        read = _read(base, inputs[0], whole).detach()
        rows = read.reshape(-1, len(whole)).double()
        if again.on and merged is not None:
            sums.cross[acting].add_((alone.popleft().T @ rows).to(sums.cross.device))
            sums.merged[acting].add_((rows.T @ rows).to(sums.merged.device))
            return output + _written(base, _read(base, inputs[0], merged.down.reshape(-1, *sides)), merged)
        sums.alone[acting].add_((rows.T @ rows).to(sums.alone.device))
        tokens += len(rows)
        if merged is not None:
            alone.append(rows)
        start = sum(change.rank for change in changes[:acting])
        own = changes[acting]
        return output + _written(base, read[..., start : start + own.rank], own) if own.rank else output

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if alone:
        raise RuntimeError(f"a {type(base).__name__} was run without the model around it, so not with the merged LoRA")
    for moments in (sums.alone, sums.merged, sums.cross):
        moments[acting].div_(max(1, tokens))


def _read(base: nn.Module, x: Tensor, down: Tensor) -> Tensor:
    """A x for the inputs of a layer, ranks last. Shape: [..., ranks]."""
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, down.to(x), None, base.stride, base.padding, base.dilation).movedim(1, -1)  # pyright: ignore[reportArgumentType]
    return F.linear(x, down.to(x))


def _written(base: nn.Module, read: Tensor, change: LoraFactors) -> Tensor:
    """B (A x) as the layer's output has it."""
    added = F.linear(read, (change.up.flatten(1) * change.scale).to(read))
    return added.movedim(-1, 1) if isinstance(base, nn.Conv2d) else added
