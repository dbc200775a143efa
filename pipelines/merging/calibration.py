"""Measures the inputs of a model's layers while one LoRA alone acts, for mergers that need them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_compose.attention import LoraFactors
from lora_compose.attention.device import uncompiled
from lora_compose.attention.fitting import shape_of
from lora_compose.attention.lora_bank import base_layer
from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.formats.models import models_by_part
from lora_compose.pipelines.merging.changes import Name
from lora_compose.pipelines.merging.merger import Changes


def prompt_of(file: LoraFile, called: str = "") -> str:
    """A prompt for a LoRA from its trigger and class word.

    Args:
        called: What messages call it; its name by default.

    Raises:
        ValueError: If the file does not contain its trigger.
    """
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
    *,
    steps: int = 10,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> Mapping[Name, Tensor]:
    """Generates one image with each LoRA alone, without guidance, and measures the inputs of the layers.

    Args:
        pipe: A pipeline of diffusers; it is left as it was found.
        layers: By layer of it, the change by every LoRA.
        seed: Of the start noise, the same for all.
        on_progress: Called with the finished fraction.

    Returns:
        By layer, the moments that `MergeLayer` describes, in fp64 on the CPU.
    """
    models = models_by_part(pipe)
    sums = {
        name: torch.zeros(len(prompts), total, total, dtype=torch.float64)
        for name, changes in layers.items()
        if (total := sum(change.rank for change in changes))
    }
    for k, prompt in enumerate(prompts):
        with ExitStack() as stack:
            for name, moments in sums.items():
                layer = uncompiled(models[name[0]]).get_submodule(name[1])
                stack.enter_context(_measured(layer, layers[name], k, moments[k]))
            pipe(
                prompt=prompt, num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
        if on_progress is not None:
            on_progress((k + 1) / len(prompts))
    return sums


@contextmanager
def _measured(layer: nn.Module, changes: Sequence[LoraFactors], acting: int, moments: Tensor) -> Iterator[None]:
    """Lets one LoRA act on a layer, and puts the mean outer products of (A x) in `moments`, zeros before."""
    base = base_layer(layer)
    _, *sides = shape_of(type(base).__name__, base)
    whole = torch.cat([change.down.reshape(-1, *sides) for change in changes])
    start = sum(change.rank for change in changes[:acting])
    ranks = slice(start, start + changes[acting].rank)
    back = changes[acting].up.flatten(1) * changes[acting].scale
    tokens = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal tokens
        down, up = whole.to(inputs[0]), back.to(inputs[0])
        if isinstance(base, nn.Conv2d):
            read = F.conv2d(inputs[0], down, None, base.stride, base.padding, base.dilation)  # pyright: ignore[reportArgumentType]
            added = F.conv2d(read[:, ranks], up[:, :, None, None]) if changes[acting].rank else 0
            read = read.movedim(1, -1)
        else:
            read = F.linear(inputs[0], down)
            added = F.linear(read[..., ranks], up)
        rows = read.detach().reshape(-1, len(down)).double()
        moments.add_((rows.T @ rows).to(moments.device))
        tokens += len(rows)
        return output + added

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    moments.div_(max(1, tokens))
