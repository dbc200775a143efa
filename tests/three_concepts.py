"""A pipeline with the concepts "cat", "dog" and "bear", and the gates of a reference for them, by hand."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components import EVERYTHING, random_lora, seeded
from lora_compose.attention import Lora
from lora_compose.pipelines.scene.scene import Concept
from reference import FullGates

PROMPT = "a sks cat, a zwx dog, a mjq bear"
TRIGGERS = {"cat": "sks", "dog": "zwx", "bear": "mjq"}
# Token positions of the triggers, counted by hand: 0 is the start token and "mjq" has three tokens.
POSITIONS: dict[str, tuple[int, ...]] = {"cat": (2,), "dog": (6,), "bear": (10, 11, 12)}
PHRASES: dict[str, tuple[int, ...]] = {"cat": (2, 3), "dog": (6, 7), "bear": (10, 11, 12, 13)}
OTHER_PROMPT = "mjq sks cat zwx and a sks"
OTHER_POSITIONS: dict[str, tuple[int, ...]] = {"cat": (4, 9), "dog": (6,), "bear": (1, 2, 3)}
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
WEIGHTS = (0.8, -0.5, 1.3)


def denoise(pipe: Any, prompt: str | list[str] = PROMPT, **arguments: Any) -> Any:
    images = (len(prompt) if isinstance(prompt, list) else 1) * arguments.get("num_images_per_prompt", 1)
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": [seeded(k) for k in range(images)]}
    return pipe(prompt, **given | arguments)


def loras_of(pipe: Any, names: Sequence[str]) -> list[Lora]:
    """Factors of different ranks and scales for every kind of layer, strongest where text comes in."""
    return [
        {
            **random_lora(pipe.unet, seed, rank=2 + seed, scale=0.5 + seed, targets=EVERYTHING, size=0.08),
            **random_lora(
                pipe.unet, seed, rank=2 + seed, scale=0.5 + seed, targets=("attn2.to_k", "attn2.to_v"), size=0.4
            ),
        }
        for seed, _ in enumerate(names)
    ]


def load(
    pipe: Any, write_lora: Any, names: Sequence[str], loras: Sequence[Lora], method: str = "tara"
) -> list[Concept]:
    """Loads concepts with a weight each and returns them."""
    concepts = []
    for name, lora, weight in zip(names, loras, WEIGHTS, strict=False):
        path = write_lora(f"{name}-file", unet=lora, metadata={"method": method})
        concepts.append(pipe.load_concept(path, name, trigger=TRIGGERS[name], class_word=name, weight=weight))
    return concepts


def token_rows(prompts: list[str], names: Sequence[str], images: int, uncond: str | None) -> Tensor:
    """Gates of text tokens: rows of one prompt are adjacent, unconditional ones come first.

    Args:
        prompts: Of `PROMPT` and `OTHER_PROMPT`.
        names: The concepts, which have `WEIGHTS`.
        images: By prompt.
        uncond: "broadcast" for the masks of the prompts on unconditional rows, other words for none there; None
            without guidance.

    Returns:
        Shape: [rows, tokens, concepts].
    """
    mask = torch.zeros(len(prompts), 32, len(names))
    for row, prompt in enumerate(prompts):
        for column, name in enumerate(names):
            mask[row, list((POSITIONS if prompt == PROMPT else OTHER_POSITIONS)[name]), column] = WEIGHTS[column]
    cond = torch.stack([mask[row] for row in range(len(prompts)) for _ in range(images)])
    if uncond is None:
        return cond
    return torch.cat([cond if uncond == "broadcast" else torch.zeros_like(cond), cond])


def full_gates(
    tokens: Tensor,
    weights: Tensor,
    *,
    regions: Sequence[tuple[int, int, int, int] | None] = (),
    image_size: tuple[int, int] = (128, 128),
) -> FullGates:
    """Gates of a reference.

    Args:
        tokens: Of text. Shape: [rows, tokens, concepts].
        weights: Of all other layers. Shape: [rows, concepts], or [concepts].
        regions: By concept, in pixels; on a grid, a cell has the part of it that is covered, the most covered one 1.
        image_size: Height and width in pixels.
    """
    (height, width), weights = image_size, weights.expand(len(tokens), -1)
    pixels = torch.zeros(weights.shape[1], 1, height, width)
    for concept, box in enumerate(regions or [None] * len(pixels)):
        left, top, right, bottom = box or (0, 0, width, height)
        pixels[concept, :, top:bottom, left:right] = 1
    image = {}
    for grid in [(-(-height // 2**level), -(-width // 2**level)) for level in range(3, 7)]:
        covered = F.avg_pool2d(pixels, (height // grid[0], width // grid[1]))[:, 0]
        gate = (covered / covered.amax(dim=(1, 2), keepdim=True)).movedim(0, -1)
        image[tuple(gate.shape[:2])] = weights[:, None, None] * gate
    return FullGates(tokens, image, weights)
