"""What tests know of a family of transformers, and a slow reference for LoRAs gated by text, region and row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components import seeded
from lora_compose.attention import Lora, LoraFactors

CELLS = 8  # image tokens by side, of 128 pixels
TOKENS = 48  # of the text


@dataclass(frozen=True)
class Places:
    """Where each concept's LoRA acts in the rows of one forward pass, without broadcasting.

    Attributes:
        text: Shape: [rows, tokens, concepts].
        image: Shape: [rows, cells, concepts].
        modulation: For the time embedding and modulation layers. Shape: [rows, concepts].
    """

    text: Tensor
    image: Tensor
    modulation: Tensor


PlacesOf = Callable[[Sequence[bool]], Places]
"""Sites, with the unconditional rows."""


@dataclass(frozen=True)
class Family:
    """A family, as its own test module describes it.

    Attributes:
        pipeline: Makes a small pipeline, of our class or of the one that is given.
        plain: diffusers' pipeline.
        gate: The factor of a LoRA on the output of a layer, by its name and its input.
        words: Tokens of the triggers in the prompt, counted by hand.
        guided: Arguments with which there are unconditional rows.
        unguided: Arguments without.
        in_one_batch: Whether diffusers runs both halves of guidance in one batch, the conditional one first.
    """

    pipeline: Callable[..., Any]
    plain: Any
    gate: Callable[[str, Tensor, Places], Tensor]
    words: tuple[Sequence[int], Sequence[int]]
    guided: Mapping[str, Any]
    unguided: Mapping[str, Any] = field(default_factory=dict)
    in_one_batch: bool = False


def random_lora_of_all(transformer: nn.Module, seed: int, size: float = 0.2) -> Lora:
    """Random factors for every linear layer; another rank for every seed."""
    generator, rank = torch.Generator().manual_seed(seed), 2 + seed % 3
    return {
        name: LoraFactors(
            torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5,
            torch.randn(module.out_features, rank, generator=generator) * size,
            0.7,
        )
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def as_file(lora: Lora) -> Mapping[str, Tensor]:
    """A LoRA in diffusers' keys, alpha folded in."""
    tensors = {}
    for name, factors in lora.items():
        tensors[f"transformer.{name}.lora_A.weight"] = factors.down
        tensors[f"transformer.{name}.lora_B.weight"] = factors.up * factors.scale
    return tensors


def pipeline_with_concepts(family: Family, folder: Path) -> Any:
    """A small pipeline with a cat and a dog, whose LoRAs are on every linear layer."""
    pipe = family.pipeline()
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        save_file(dict(as_file(random_lora_of_all(pipe.transformer, seed))), folder / f"{name}.safetensors")
        pipe.load_concept(folder / f"{name}.safetensors", trigger=trigger, class_word=name)
    return pipe


def plain_latents(family: Family, pipe: Any, **arguments: Any) -> Tensor:
    """What diffusers' own pipeline gives."""
    options = {name: pipe.config[name] for name in ("text_encoder_select_layers",) if name in pipe.config}
    plain = family.plain(**pipe.components, **options)
    plain.set_progress_bar_config(disable=True)
    return plain(**{"generator": seeded(3), "output_type": "latent", **arguments}).images


@contextmanager
def dense_loras(
    family: Family, transformer: nn.Module, loras: Sequence[Lora], places: PlacesOf, *, guided: bool
) -> Iterator[None]:
    """Adds dense deltas concept by concept in forward hooks, while diffusers' own pipeline runs.

    It runs the conditional half of guidance first: in a call of its own, or as the first half of the batch.
    """
    calls, forward = [0], transformer.forward
    rows: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        count = len(given)
        unconditional = [False] * count
        if guided and family.in_one_batch:
            unconditional = [False] * (count // 2) + [True] * (count // 2)
        elif guided:
            unconditional = [calls[0] % 2 == 1] * count
        calls[0] += 1
        rows[:] = unconditional
        return forward(*args, **kwargs)

    def hook(name: str, deltas: Sequence[tuple[int, Tensor]]) -> Callable[..., Tensor]:
        def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            gate = family.gate(name, given[0], places(rows))
            for i, delta in deltas:
                output = output + gate[..., i : i + 1] * nn.functional.linear(given[0], delta)
            return output

        return add

    handles = []
    for name, module in transformer.named_modules():
        mine = [(i, lora[name].delta()) for i, lora in enumerate(loras) if name in lora]
        if mine:
            handles.append(module.register_forward_hook(hook(name, mine)))
    transformer.forward = counted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del transformer.forward
        for handle in handles:
            handle.remove()
