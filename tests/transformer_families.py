"""What tests know of a family of transformers, and a slow reference for LoRAs gated by text, region and row."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components import seeded, with_library
from lora_compose import Concept, Merge, Regional, Tara
from lora_compose.attention import Lora, LoraFactors

CELLS = 8  # image tokens by side, of 128 pixels
TOKENS = 48  # of the text
PROMPT = "a sks cat and a zwx dog on grass"
BOXES = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
CALL: dict[str, Any] = {
    "prompt": PROMPT, "width": 128, "height": 128, "num_inference_steps": 2, "max_sequence_length": TOKENS,
}  # fmt: skip


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
        two_networks: Whether unconditional rows have a network of their own, which no LoRA changes.
        padding_first: Tokens of padding that diffusers has before the prompt; ours are behind it.
        image_tasks: diffusers' pipelines for image-to-image (False) and inpainting (True), where it has them.
        by_default: Makes one whose text encoder has the layers that calls read by default, where `pipeline` has fewer.
    """

    pipeline: Callable[..., Any]
    plain: Any
    gate: Callable[[str, Tensor, Places], Tensor]
    words: tuple[Sequence[int], Sequence[int]]
    guided: Mapping[str, Any]
    unguided: Mapping[str, Any] = field(default_factory=dict)
    in_one_batch: bool = False
    two_networks: bool = False
    padding_first: int = 0
    image_tasks: Mapping[bool, Any] = field(default_factory=dict)
    by_default: Callable[[], Any] | None = None


def last_layer(network: nn.Module) -> nn.Module:
    """The layer whose output is the prediction."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    return [layer for name, layer in layers.items() if "modulation" not in name.lower()][-1]


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


def lokr_of_all(transformer: nn.Module, size: float = 0.2) -> dict[str, Tensor]:
    """A LoKr file for every linear layer with an even number of inputs and outputs."""
    tensors = {}
    for layer, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and module.out_features % 2 == module.in_features % 2 == 0:
            generator, sides = seeded(len(layer)), (module.out_features // 2, module.in_features // 2)
            tensors[f"transformer.{layer}.lokr_w1"] = torch.randn(2, 2, generator=generator) * size
            tensors[f"transformer.{layer}.lokr_w2"] = torch.randn(sides, generator=generator) * sides[1] ** -0.5
    return tensors


def pipeline_with_concepts(family: Family, folder: Path) -> Any:
    """A small pipeline with a cat and a dog, whose LoRAs are on every linear layer."""
    pipe = family.pipeline()
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        save_file(dict(as_file(random_lora_of_all(pipe.transformer, seed))), folder / f"{name}.safetensors")
        pipe.load_concept(folder / f"{name}.safetensors", trigger=trigger, class_word=name)
    return pipe


def saved_with_loras(family: Family, folder: Path) -> Path:
    """A folder with what a person has: "model", and in "loras" a cat's and a dog's, which name their words."""
    pipe = (family.by_default or family.pipeline)()
    pipe.save_pretrained(folder / "model")
    (folder / "loras").mkdir()
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        lora, words = random_lora_of_all(pipe.transformer, seed), {"trigger": trigger, "class_word": name}
        save_file(dict(as_file(lora)), folder / "loras" / f"{name}.safetensors", metadata=words)
    return folder


def shared_pipeline(family: Family) -> Any:
    """A pipeline as `pipeline_with_concepts` makes it, whose models and LoRAs all tests of the family share."""
    if id(family) not in _SHARED:
        (folder := Path(_FILES.name) / f"{len(_SHARED)}").mkdir()
        _SHARED[id(family)] = pipeline_with_concepts(family, folder)
    made = _SHARED[id(family)]
    pipe = copy.copy(made)
    pipe.__dict__.pop("_banks", None)
    return with_library(pipe, made.library)


_FILES = TemporaryDirectory(ignore_cleanup_errors=True)
_SHARED: dict[int, Any] = {}
"""By identity of the family."""


def plain_latents(family: Family, pipe: Any, kind: Any = None, **arguments: Any) -> Tensor:
    """What diffusers' own pipeline gives, or that of another kind."""
    options = {name: pipe.config[name] for name in ("text_encoder_select_layers",) if name in pipe.config}
    plain = (kind or family.plain)(**pipe.components, **options)
    plain.set_progress_bar_config(disable=True)
    return plain(**{"generator": seeded(3), "output_type": "latent", **arguments}).images


LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
BOXES = [Concept(name="cat", region=LEFT), Concept(name="dog", region=RIGHT)]


@contextmanager
def dense_loras(
    family: Family, transformer: nn.Module, loras: Sequence[Lora], places: PlacesOf, *, guided: bool
) -> Iterator[None]:
    """Adds dense deltas concept by concept in forward hooks, while diffusers' own pipeline runs.

    It runs the conditional half of guidance first: in a call of its own, as the first half of the batch, or in the only
    one of two networks that has the deltas.
    """
    calls, forward = [0], transformer.forward
    rows: list[bool] = []

    @wraps(forward)  # modular pipelines look at its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        count = len(given)
        unconditional = [False] * count
        if family.two_networks:
            pass
        elif guided and family.in_one_batch:
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


def merged(family: Family, unconditional: Sequence[bool]) -> Places:
    """Everywhere."""
    ones = torch.ones(len(unconditional), 1, 2)
    return Places(ones.expand(-1, TOKENS, 2), ones.expand(-1, CELLS**2, 2), ones[:, 0])


def own_words(family: Family, unconditional: Sequence[bool]) -> Places:
    """On their own words, of conditional rows alone, and on all cells."""
    everywhere = merged(family, unconditional)
    text = torch.zeros(len(unconditional), TOKENS, 2)
    for row, uncond in zip(text, unconditional, strict=True):
        for concept, words in enumerate(family.words):
            row[list(words), concept] = float(not uncond)
    return Places(text, everywhere.image, everywhere.modulation)


def regions(family: Family, unconditional: Sequence[bool]) -> Places:
    """In the left and in the right half, and on all words, of conditional rows alone."""
    live = torch.tensor([float(not uncond) for uncond in unconditional])[:, None, None]
    image = torch.zeros(len(unconditional), CELLS, CELLS, 2)
    image[:, :, : CELLS // 2, 0] = image[:, :, CELLS // 2 :, 1] = 1
    text = live.expand(-1, TOKENS, 2)
    return Places(text, live * image.flatten(1, 2), torch.zeros(len(unconditional), 2))


METHODS: dict[str, tuple[Any, Sequence[Any], Any]] = {
    "merge": (Merge(), ["cat", "dog"], merged),
    "tara": (Tara(), ["cat", "dog"], own_words),
    "regional": (Regional(token_mask="none", texts="shared", isolate=0), BOXES, regions),
}
"""Settings, concepts, and where their LoRAs then act."""


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    """The latents of a call."""
    return pipe(**{**CALL, "generator": seeded(3), "output_type": "latent", **arguments}).images


def assert_equals_dense_deltas(family: Family, pipe: Any, method: str, *, guided: bool = True) -> None:
    """A method gives what diffusers' pipeline gives with dense deltas, added concept by concept."""
    settings, concepts, places = METHODS[method]
    call = {**CALL, "num_inference_steps": 1, **(family.guided if guided else family.unguided)}
    found = latents_of(pipe, concepts=concepts, method=settings, **call)
    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    with dense_loras(family, pipe.transformer, loras, lambda rows: places(family, rows), guided=guided):
        expected = plain_latents(family, pipe, **call)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    without = _WITHOUT.setdefault(pipe, {})
    if guided not in without:
        without[guided] = plain_latents(family, pipe, **call)
    assert (found - without[guided]).abs().max() > 0.01


_WITHOUT: MutableMapping[Any, dict[bool, Tensor]] = WeakKeyDictionary()
"""By pipeline, and with guidance or not, the latents that no method changes."""
