"""Whether `refine` makes the playground's subjects better: how many are right before and after, and how like they are.

    python -m recipe.first.detailer --seeds 4

Scenes of three subjects of `playground-full`, by `regional` with ordinary LoRAs. A subject is right above the threshold
between images with and without its LoRA, two of each on grass. A subject that the judge does not find, or finds more
like another concept, has a likeness of 0.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from lora_compose.compose.evaluation.detectors import make_detector
from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.evaluation.metrics import presence_threshold
from lora_compose.compose.evaluation.scoring import Scorer, reference_crops
from lora_compose.compose.evaluation.suite import Suite, SuiteScene, read_suite
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.calls.refine import Detailer
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.scene.scene import Concept

HOW: Mapping[str, Any] = {"num_inference_steps": 25, "guidance_scale": 4}


class Likeness:
    """Looks for concepts of a suite in images."""

    def __init__(self, suite: Suite) -> None:
        assert suite.detector is not None  # playground-full has one
        encoder = load_encoder(suite.encoder, "cpu")
        references = {one.name: encoder.images(reference_crops(one)) for one in suite.concepts}
        self._scorer = Scorer(suite, encoder, make_detector(suite.detector, encoder, "cpu"), references)

    def of(self, image: Image.Image, prompt: str, names: Iterable[str]) -> dict[str, float]:
        """Similarity of each concept to its references; 0 if it is not found or more like another one."""
        names = tuple(names)
        found = self._scorer.score(image, SuiteScene(name="scene", prompt=prompt, concepts=names)).concepts
        likely = {name: found[name].similarity for name in names}
        return {
            name: own.get(name, 0.0) if own and own[name] == max(own.values()) else 0.0 for name, own in likely.items()
        }


def thresholds(pipe: Any, suite: Suite, likeness: Likeness) -> dict[str, float]:
    """By concept, the likeness above which it is right."""
    found = {}
    for one in suite.concepts:
        concept = Concept(
            name=one.name, lora=str(playground_lora(one.name)), trigger=one.trigger, class_word=one.class_word
        )
        prompts = {True: f"a {one.trigger} {one.class_word} on grass", False: f"a {one.class_word} on grass"}
        values = {
            worn: [
                likeness.of(image, prompts[True], [one.name])[one.name]
                for image in pipe(
                    prompts[worn], num_images_per_prompt=2, generator=[seeded(0), seeded(1)],
                    **({"concepts": [concept], "method": "merge"} if worn else {}), **HOW,
                ).images
            ]
            for worn in prompts
        }  # fmt: skip
        found[one.name] = presence_threshold(np.array(values[False]), np.array(values[True]))
    return found


def seeded(seed: int) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


@handle_errors()
def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 4,
    strength: Annotated[list[float] | None, typer.Option(help="0.35 and 0.6 by default; repeatable.")] = None,
) -> None:
    """Counts subjects that are right."""
    suite = read_suite("playground-full")
    likeness = Likeness(suite)
    pipe: Any = ComposePipeline.from_pretrained(playground_model())
    pipe.set_progress_bar_config(disable=True)
    limits = thresholds(pipe, suite, likeness)
    scenes = [scene for scene in suite.scenes if len(scene.concepts) == 3]
    values: dict[str, list[tuple[bool, float]]] = {}
    with bar("making images", seeds * len(scenes)) as on_progress:
        for done, (seed, scene) in enumerate([(seed, scene) for seed in range(seeds) for scene in scenes]):
            concepts = [
                Concept(
                    name=name, lora=str(playground_lora(name)), trigger=suite.concept(name).trigger,
                    class_word=suite.concept(name).class_word, region=scene.regions[name],
                )
                for name in scene.concepts
            ]  # fmt: skip
            output = pipe(scene.prompt, concepts=concepts, method="regional", generator=seeded(seed), **HOW)
            images = {"before": output.images[0]}
            for each in strength or (0.35, 0.6):
                images[f"strength {each}"] = output.refine(Detailer(strength=each), generator=seeded(seed)).image
            for label, image in images.items():
                found = likeness.of(image, scene.prompt, scene.concepts)
                values.setdefault(label, []).extend((found[name] >= limits[name], found[name]) for name in found)
            on_progress(done + 1)
    for label, found in values.items():
        right, mean = sum(one for one, _ in found), np.mean([value for _, value in found])
        echo(f"{label}: {right} of {len(found)} right, mean likeness {mean:.3f}")


if __name__ == "__main__":
    typer.run(main)
