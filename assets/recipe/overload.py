"""From which joint change of several LoRAs images break: a table for the guard against overload.

    PYTHONPATH=assets python -m recipe.overload
    PYTHONPATH=assets python -m recipe.overload --steps 4 --guidance 1

One, two and three LoRAs are merged into the transformer with equal weights, scaled so that their joint change is a
given multiple of the largest alone (`joint_change`). Each subject is then asked for by itself. The second line is for
the thresholds of calls in few steps without guidance, `WARNED_IN_FEW_STEPS` and `HELD_IN_FEW_STEPS`.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from lora_compose.attention import Lora
from lora_compose.compose.evaluation.detectors import Detector, WindowDetector
from lora_compose.compose.evaluation.encoders import Encoder, load_encoder
from lora_compose.compose.evaluation.metrics import clip_i
from lora_compose.compose.evaluation.scoring import reference_crop
from lora_compose.compose.evaluation.suite import WindowsConfig, read_suite
from lora_compose.compose.playground.assets import (
    PLAYGROUND_FLUX,
    playground_lora,
    playground_loras,
    playground_model,
    playground_references,
)
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.concepts.overload import HELD_IN_FEW_STEPS, WARNED_IN_FEW_STEPS, joint_change
from lora_compose.pipelines.families import ComposePipeline

GUIDANCE = 4.0
RATIOS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
UNGUIDED = (0.0, HELD_IN_FEW_STEPS, WARNED_IN_FEW_STEPS, 0.71, 1.0, 1.41, 2.0)
"""Joint changes without guidance: of two LoRAs that are unrelated, at weight 0, 0.3, 0.35, 0.5, 0.71, 1 and 1.41."""
SIZES = (1, 2, 3)  # LoRAs at once


def groups(names: Sequence[str], size: int) -> list[list[str]]:
    """Each name with those that follow it, in a circle."""
    return [[names[(i + j) % len(names)] for j in range(size)] for i in range(len(names))]


def weight_for(loaded: Sequence[LoadedConcept], ratio: float) -> float:
    """The weight of each that makes their joint change this multiple of the largest alone."""
    joint = joint_change(loaded)
    return ratio if joint is None else ratio / joint.ratio


@contextmanager
def merged(model: nn.Module, loras: Sequence[Lora], weight: float) -> Iterator[None]:
    """The sum of LoRAs in the weights of a model, for as long as the block lasts."""
    names = {name for lora in loras for name in lora}
    before = {name: model.get_submodule(name).get_parameter("weight").detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            change = sum(lora[name].delta() for lora in loras if name in lora)
            model.get_submodule(name).get_parameter("weight").add_(weight * change)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                model.get_submodule(name).get_parameter("weight").copy_(kept)


def subjects(pipe: Any, names: Sequence[str], nouns: Sequence[str]) -> list[str]:
    """Of the LoRAs those of subjects that a detector knows by their class words, without those for token masks."""
    every = ((name, pipe.resolve_concepts([name])[0]) for name in names)
    return [name for name, it in every if it.concept.class_word in nouns and it.trained_with != "tara"]


def images(pipe: Any, prompt: str, steps: int, guidance: float, seeds: int) -> list[Any]:
    """Images without concepts, one for each seed."""
    width, height = pipe.own_size
    return pipe(
        [prompt] * seeds, num_inference_steps=steps, width=width, height=height,
        generator=[torch.Generator().manual_seed(seed) for seed in range(seeds)], **pipe.guided(guidance, None),
    ).images  # fmt: skip


def likeness(
    image: Any, word: str, detector: Detector, encoder: Encoder, references: torch.Tensor
) -> tuple[int, float]:
    """How many of a noun are found, and how much the surest of them is like its references (none: like nothing, 0)."""
    found = detector.detect(image, [word])
    crops = [image.crop(each.box) for each in found[:1]]
    return len(found), float(clip_i(encoder.images(crops), references)[0]) if crops else 0.0


def table(measured: Mapping[tuple[int, float], Sequence[tuple[int, float]]]) -> Iterator[str]:
    """Lines of Markdown: by joint change, for each number of LoRAs, images with one subject, and its likeness."""
    sizes, ratios = (sorted({key[i] for key in measured}) for i in (0, 1))
    titles = [f"{size} LoRA{'s' * (size > 1)}: {what}" for size in sizes for what in ("one subject", "likeness")]
    yield f"| joint change | {' | '.join(titles)} |"
    yield "|---" * (1 + len(titles)) + "|"
    for ratio in ratios:
        cells: list[str] = []
        for size in sizes:
            counts, alike = zip(*measured[int(size), ratio], strict=True)
            cells += [f"{np.mean([count == 1 for count in counts]):.0%}", f"{np.mean(alike):.2f}"]
        yield f"| {ratio:g} | {' | '.join(cells)} |"


@handle_errors(logging.ERROR)
def main(
    ratios: Annotated[list[float] | None, typer.Option("--ratio", help="Joint changes, repeatable.")] = None,
    sizes: Annotated[list[int] | None, typer.Option("--loras", help="How many LoRAs at once, repeatable.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 8,
    guidance: Annotated[float, typer.Option(min=1, help="1 is none.")] = GUIDANCE,
    seeds: Annotated[int, typer.Option(min=1, help="Images of each subject.")] = 2,
) -> None:
    """Makes images of single subjects at joint changes up to some times that of one LoRA, and counts what is left."""
    pipe: Any = ComposePipeline.from_pretrained(playground_model(PLAYGROUND_FLUX), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name in playground_loras(PLAYGROUND_FLUX):
        pipe.load_concept(playground_lora(name, PLAYGROUND_FLUX), name)
    suite = read_suite(PLAYGROUND_FLUX)
    assert isinstance(suite.detector, WindowsConfig)
    encoder = load_encoder(suite.encoder)
    detector = WindowDetector(encoder, suite.detector.vocabulary)
    names = subjects(pipe, playground_loras(PLAYGROUND_FLUX), suite.detector.vocabulary)
    references = {
        name: encoder.images([reference_crop(path) for path in playground_references(name)]) for name in names
    }
    wanted = [
        (size, ratio, group)
        for size in sizes or SIZES
        for ratio in ratios or (RATIOS if guidance > 1 else UNGUIDED)
        for group in groups(names, size)
    ]
    measured: dict[tuple[int, float], list[tuple[int, float]]] = defaultdict(list)
    with bar("making images", len(wanted)) as on_progress:
        for done, (size, ratio, group) in enumerate(wanted, 1):
            loaded = pipe.resolve_concepts(group)
            subject = loaded[0].concept
            with merged(pipe.transformer, [one.lora for one in loaded], weight_for(loaded, ratio)):
                made = images(pipe, f"a {subject.trigger} {subject.class_word} on grass", steps, guidance, seeds)
            for image in made:
                found = likeness(image, subject.class_word, detector, encoder, references[group[0]])
                measured[size, ratio].append(found)
            on_progress(done)
    how = f"guidance {guidance:g}" if guidance > 1 else "no guidance"
    echo(f"{steps} steps, {how}; {len(names)} subjects, {seeds} images of each in every cell\n")
    for line in table(measured):
        echo(line)


if __name__ == "__main__":
    typer.run(main)
