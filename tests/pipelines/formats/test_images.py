"""One change of a model, in the files of every trainer: the same image by every method, for every family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components import random_lora, sd_unet, sdxl_unet, seeded, small_pipeline, xl_pipeline
from lora_compose.attention import Lora, LoraFactors
from lora_compose.compose.playground.recipe.formats import drawn, pictures
from lora_compose.compose.playground.recipe.lora_files import DIFFUSERS, FORMATS, Format, Tensors, kohya, pair
from lora_compose.pipelines.methods import METHODS
from lora_compose.pipelines.scene import Concept

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


@dataclass(frozen=True)
class Product:
    """A change that LoRA, LoCon, LoHa and LoKr of rank 2 or 4 all hold: a small matrix times factors (Kronecker).

    W = small x (up core down): in a convolution every tap of the kernel has a core, else it is 1.

    Attributes:
        small: Shape: [2, 2].
        up: Shape: [outputs / 2, 2].
        core: Shape: [2, 2, height, width]; None in linear layers.
        down: Shape: [2, inputs / 2].
    """

    small: Tensor
    up: Tensor
    core: Tensor | None
    down: Tensor

    @classmethod
    def random(cls, weight: Tensor, generator: torch.Generator) -> "Product":
        outputs, inputs, *kernel = weight.shape
        shapes = (2, 2), (outputs // 2, 2), (2, 2, *kernel), (2, inputs // 2)
        small, up, core, down = (torch.randn(shape, generator=generator) * 0.5 for shape in shapes)
        return cls(small, up, core if kernel else None, down)

    def factors(self) -> LoraFactors:
        """(small x up) (1 x core) (1 x down), of rank 4."""
        up, down = torch.kron(self.small, self.up), torch.kron(torch.eye(2), self.down)
        if self.core is None:
            return LoraFactors(down, up)
        return LoraFactors(torch.einsum("rshw,si->rihw", self._middle, down), up[:, :, None, None])

    def locon(self) -> Tensors:
        """The same factors, of a convolution in three."""
        if self.core is None:
            return pair(".lora_down.weight", ".lora_up.weight")(self.factors())
        down, up = torch.kron(torch.eye(2), self.down), self.factors().up
        return {".lora_down.weight": down[:, :, None, None], ".lora_mid.weight": self._middle, ".lora_up.weight": up}

    @property
    def _middle(self) -> Tensor:
        """1 x core. Shape: [4, 4, height, width]."""
        assert self.core is not None
        return torch.einsum("ab,rshw->arbshw", torch.eye(2), self.core).flatten(2, 3).flatten(0, 1)

    def loha(self) -> Tensors:
        """(small x 1) * (1 x up core down), elementwise: both of rank 2."""
        ones_up, ones_down = torch.ones(len(self.up), 1), torch.ones(1, self.down.shape[1])
        a, b = torch.kron(self.small, ones_up), torch.kron(torch.eye(2), ones_down)
        c, d = self.up.repeat(2, 1), self.down.repeat(1, 2)
        if self.core is None:
            return {".hada_w1_a": a, ".hada_w1_b": b, ".hada_w2_a": c, ".hada_w2_b": d}
        same = torch.eye(2)[:, :, None, None].expand_as(self.core)  # at every tap
        return {".hada_t1": same, ".hada_w1_a": a.T, ".hada_w1_b": b,
                ".hada_t2": self.core, ".hada_w2_a": c.T, ".hada_w2_b": d}  # fmt: skip

    def lokr(self) -> Tensors:
        """The product as it is."""
        if self.core is None:
            return {".lokr_w1": self.small, ".lokr_w2_a": self.up, ".lokr_w2_b": self.down}
        return {".lokr_w1": self.small, ".lokr_t2": self.core, ".lokr_w2_a": self.up.T, ".lokr_w2_b": self.down}


PRODUCTS: Mapping[str, Callable[[Product], Tensors]] = {
    "LoCon, Tucker": Product.locon,
    "LoHa": Product.loha,
    "LoKr": Product.lokr,
}
"""These files are written from the products themselves, all others from their factors."""


class Studio:
    """A tiny pipeline with a dog, and a cat whose change is loaded from files of every format as they are wanted."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe, self.folder, generator = pipe, folder, seeded()
        models = {part: getattr(pipe, part, None) for part in ("unet", "text_encoder", "text_encoder_2")}
        self.changes = {
            part: {
                name: Product.random(module.weight, generator)
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(TARGETS if part == "unet" else TEXT)
            }
            for part, model in models.items()
            if model is not None
        }
        self.loras = {part: {name: it.factors() for name, it in found.items()} for part, found in self.changes.items()}
        self.load("dog", DIFFUSERS, {"unet": random_lora(pipe.unet, 1, targets=("attn2.to_v",))}, "zwx")
        self.reference = cache(self._reference)

    def load(self, name: str, form: Format, loras: Mapping[str, Lora], trigger: str = "sks") -> None:
        folder = self.folder / name
        folder.mkdir()
        path = form.write(loras, self.pipe, folder)
        self.pipe.load_concept(path, name, trigger=trigger, class_word="dog" if name == "dog" else "cat", **form.told)

    def load_product(self, name: str) -> None:
        tensors = {
            f"{kohya(self.pipe, part, layer)}{suffix}": tensor.contiguous()
            for part, found in self.changes.items()
            for layer, change in found.items()
            for suffix, tensor in PRODUCTS[name](change).items()
        }
        path = self.folder / f"{name}.safetensors"
        save_file(tensors, path)
        self.pipe.load_concept(path, name, trigger="sks", class_word="cat")

    def image(self, cat: str, method: str, weight: float = 1.0) -> Tensor:
        concepts = [Concept(name=cat, region=CAT, weight=weight), Concept(name="dog", region=DOG)]
        return self.pipe(
            "a sks cat and a zwx dog", concepts=concepts, method=method, num_inference_steps=2, width=SIDE, height=SIDE,
            guidance_scale=4.0, output_type="latent", generator=seeded(),
        ).images  # fmt: skip

    def of_file(self, form: str, method: str) -> Tensor:
        if form not in self.pipe.concepts:
            self.load_product(form) if form in PRODUCTS else self.load(form, FORMATS[form], self.loras)
        return self.image(form, method)

    def _reference(self, holds: Callable[[str, str], bool], method: str) -> Tensor:
        """The same of the factors of those layers, as diffusers has them."""
        name = holds.__name__
        if name not in self.pipe.concepts:
            self.load(name, replace(DIFFUSERS, holds=holds), self.loras)
        return self.image(name, method)


@pytest.fixture(scope="module", params=PIPELINES)
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    pipe = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return Studio(pipe, tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("form", "method"), [*((form, "merge") for form in FORMATS), *(("LoHa", method) for method in METHODS)]
)
def test_the_image_is_the_same_in_every_format(studio: Studio, form: str, method: str) -> None:
    expected = studio.reference(FORMATS[form].holds, method)
    found = studio.of_file(form, method)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_the_change_is_seen_in_these_images(studio: Studio, method: str) -> None:
    images = [studio.reference(holds, method) for holds in {form.holds for form in FORMATS.values()}]
    without = studio.image("everything", method, weight=0.0)
    for image in images:
        assert (image - without).abs().max() > 0.01 * without.abs().max()


def test_the_sheet_of_the_playground_shows_one_image_in_every_format() -> None:
    shown = list(pictures(["LoHa", "attention processors"], steps=1))
    names = ["as it is shipped", "LoHa", "attention layers alone", "attention processors"]
    assert [one.name for one in shown] == names
    assert [one.difference for one in shown] == [None, 0, None, 0]
    assert shown[0].image.tobytes() != shown[2].image.tobytes()
    assert drawn(shown).width > 4 * shown[0].image.width
