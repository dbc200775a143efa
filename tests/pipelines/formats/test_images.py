"""One change of a model, in the files of every trainer: the same image, for every family."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from components import random_lora, sd_unet, sdxl_unet, seeded, small_pipeline, xl_pipeline
from lora_compose.attention import Lora
from lora_compose.pipelines.scene.scene import Concept
from pairs import in_pairs, slow_but
from recipe.formats import drawn, pictures
from recipe.lora_files import DIFFUSERS, FORMATS, Format

# Layers of every kind, and few of them: what a layer is called in which file, test_formats.py asks of all.
TARGETS = ("to_k", "to_out.0", "ff.net.2", "proj_in", "conv1", "time_emb_proj")
TEXT = ("q_proj",)
SIDE = 64
CAT, DOG = (0, 0, SIDE // 2, SIDE), (SIDE // 2, 0, SIDE, SIDE)
# One level with attention is all that methods need.
SMALL: dict[str, Any] = {
    "block_out_channels": (8,), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",), "transformer_layers_per_block": 1, "attention_head_dim": 2,
}  # fmt: skip


def sd1_pipeline() -> Any:
    return small_pipeline(unet=sd_unet(**SMALL))


def sd2_pipeline() -> Any:
    """Linear projections, and a model that predicts velocities."""
    pipe = small_pipeline(unet=sd_unet(**SMALL, use_linear_projection=True))
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    return pipe


def sdxl_pipeline() -> Any:
    return xl_pipeline(unet=sdxl_unet(**SMALL))


PIPELINES: Mapping[str, Callable[[], Any]] = {"SD 1.x": sd1_pipeline, "SD 2.x": sd2_pipeline, "SDXL": sdxl_pipeline}


class OneChange:
    """A tiny pipeline with a dog, and a cat whose change is loaded from files of every format as they are wanted."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe, self.folder = pipe, folder
        parts = {"text_encoder": TEXT, "text_encoder_2": TEXT, "unet": TARGETS}
        self.loras = {
            part: random_lora(getattr(pipe, part), seed, rank=4, targets=targets)
            for seed, (part, targets) in enumerate(parts.items())
            if hasattr(pipe, part)
        }
        self.load("dog", DIFFUSERS, {"unet": random_lora(pipe.unet, 1, targets=("attn2.to_v",))}, "zwx")
        self.reference = cache(self._reference)

    def load(self, name: str, form: Format, loras: Mapping[str, Lora], trigger: str = "sks") -> None:
        folder = self.folder / name
        folder.mkdir()
        path = form.write(loras, self.pipe, folder)
        class_word = "dog" if name == "dog" else "cat"
        self.pipe.load_concept(path, name, trigger=trigger, class_word=class_word, **form.options)

    def image(self, cat: str, weight: float = 1.0) -> Tensor:
        concepts = [Concept(name=cat, region=CAT, weight=weight), Concept(name="dog", region=DOG)]
        return self.pipe(
            "a sks cat and a zwx dog", concepts=concepts, method="merge", num_inference_steps=2, width=SIDE,
            height=SIDE, guidance_scale=4.0, output_type="latent", generator=seeded(),
        ).images  # fmt: skip

    def of_file(self, form: str) -> Tensor:
        if form not in self.pipe.concepts:
            self.load(form, FORMATS[form], self.loras)
        return self.image(form)

    def _reference(self, holds: Callable[[str, str], bool]) -> Tensor:
        """The same of the factors of those layers, as diffusers has them."""
        name = holds.__name__
        if name not in self.pipe.concepts:
            self.load(name, replace(DIFFUSERS, holds=holds), self.loras)
        return self.image(name)


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OneChange]:
    """By family."""

    @cache
    def made(family: str) -> OneChange:
        pipe = PIPELINES[family]()
        pipe.set_progress_bar_config(disable=True)
        return OneChange(pipe, tmp_path_factory.mktemp("files"))

    return made


@pytest.mark.parametrize(
    ("form", "family"), in_pairs(slow_but(("diffusers", "attention processors", "kohya", "LoKr"), FORMATS), PIPELINES)
)
def test_the_image_is_the_same_in_every_format(changes: Callable[[str], OneChange], form: str, family: str) -> None:
    change = changes(family)
    expected = change.reference(FORMATS[form].holds)
    found = change.of_file(form)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", PIPELINES)
def test_the_change_is_seen_in_these_images(changes: Callable[[str], OneChange], family: str) -> None:
    change = changes(family)
    images = [change.reference(holds) for holds in {form.holds for form in FORMATS.values()}]
    without = change.image("everything", weight=0.0)
    for image in images:
        assert (image - without).abs().max() > 0.01 * without.abs().max()


@pytest.mark.usefixtures("small_by_default")
def test_the_sheet_of_the_playground_shows_one_image_in_every_format() -> None:
    shown = list(pictures(["attention processors"], steps=1))
    names = ["attention layers alone", "attention processors"]
    assert [(one.name, one.difference) for one in shown] == [(names[0], None), (names[1], 0)]
    assert drawn(shown).width > 4 * shown[0].image.width
