"""Calls of tiny pipelines, plain and with the concepts "cat" and "dog": what the tests of whole calls share."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from components import EVERYTHING, FAMILIES, random_lora, seeded, text_loras
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline
from lora_compose.pipelines.methods import LoraComposer
from lora_compose.pipelines.scene.scene import Concept

PROMPT = "a sks cat and a zwx dog"
TRIGGERS = {"cat": "sks", "dog": "zwx"}
MORE_TRIGGERS = TRIGGERS | {"bear": "xlo", "robot": "ohwx", "car": "qrt", "man": "pll", "tree": "vbn", "bag": "mjq"}
POSITIONS = {"cat": [2], "dog": [6]}
BOXED = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

PLAIN = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
OURS = {"sd": ComposeStableDiffusionPipeline, "sdxl": ComposeStableDiffusionXLPipeline}
QUIET = {"sd": {"requires_safety_checker": False}, "sdxl": {"add_watermarker": False}}

# One text and one pass for all concepts; a pass for each; one that differentiates.
ONE_PASS = ("merge", "tara")
FIXED = (*ONE_PASS, "switch", "composite")
UPDATES = LoraComposer(least_updates=1.0)

BOTH = pytest.mark.parametrize("family", FAMILIES)
SD_AND_SLOWLY_XL = pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
"""For what does not depend on the family."""
ALL_LEVELS = pytest.mark.parametrize("whole", [True], ids=["whole"])
"""With a UNet of all levels (`components.WHOLE`), for what depends on maps of the grid that Stable Diffusion has."""
EVERY = pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param("sd", "tara", id="sd-tara"),
        pytest.param("sd", UPDATES, id="sd-lora-composer"),
        pytest.param("sdxl", "tara", id="sdxl-tara"),
        pytest.param("sdxl", UPDATES, id="sdxl-lora-composer", marks=pytest.mark.slow),
    ],
)

_FILES = TemporaryDirectory(ignore_cleanup_errors=True)


@cache
def lora_file(family: str, name: str, whole: bool = False) -> Path:
    """The LoRA file of "cat" or "dog".

    Args:
        family: Of which models.
        name: Which concept.
        whole: Whether layers of every kind are changed, those of the text encoders too, or the UNet's attention alone.
    """
    pipe, seed = FAMILIES[family](), list(TRIGGERS).index(name)
    how: dict[str, Any] = {"targets": EVERYTHING, "size": 0.1} if whole else {}
    parts = {"unet": random_lora(pipe.unet, seed, **how), **(text_loras(pipe, seed) if whole else {})}
    tensors = {
        f"{part}.{layer}.lora_{side}.weight": tensor
        for part, lora in parts.items()
        for layer, factors in lora.items()
        for side, tensor in (("A", factors.down), ("B", factors.up))
    }
    folder = Path(_FILES.name) / f"{family}-{whole}"
    folder.mkdir(exist_ok=True)
    save_file(
        tensors, folder / f"{name}.safetensors",
        metadata={"trigger": TRIGGERS[name], "class_word": name, "method": "tara"},
    )  # fmt: skip
    return folder / f"{name}.safetensors"


def with_concepts(pipe: Any, whole: bool = False) -> Any:
    """The pipeline, without a progress bar, with the concepts "cat" and "dog"."""
    family = "sdxl" if hasattr(pipe, "text_encoder_2") else "sd"
    for name in TRIGGERS:
        pipe.load_concept(lora_file(family, name, whole), name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def composer_of(family: str, whole: bool = False) -> Any:
    """A tiny pipeline with the concepts "cat" and "dog", shared: for tests that leave it as it is."""
    return with_concepts(FAMILIES[family](), whole)


def run(pipe: Any, **arguments: Any) -> Any:
    """A plain call."""
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    return pipe(**{"prompt": PROMPT} | given | arguments)


def compose(pipe: Any, **arguments: Any) -> Any:
    """A call with both concepts."""
    return run(pipe, **{"concepts": ["cat", "dog"], "method": "tara"} | arguments)


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    """The latents of a call with both concepts."""
    return compose(pipe, **arguments).images


def one_step(pipe: Any, **arguments: Any) -> Any:
    """A call of one step with a region for each concept, for every method."""
    return compose(pipe, **{"concepts": BOXED, "num_inference_steps": 1, "guidance_scale": 4.0} | arguments)


def encoded(pipe: Any, prompt: str = PROMPT, negative: str = "dark") -> dict[str, Any]:
    """Arguments that give a prompt as embeddings."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True,
            negative_prompt=negative,
        )  # fmt: skip
    return {"prompt": None, **dict(zip(EMBEDDINGS, found, strict=False))}


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for rounding: the largest deviation counts, whatever the values."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def far_apart(one: Tensor, other: Tensor) -> bool:
    """Whether two images differ by more than rounding."""
    return bool((one - other).abs().max() > 1e-2)


def as_tensor(images: Any) -> Tensor:
    """Images of any output type."""
    return images if isinstance(images, Tensor) else torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def same_bits(one: Any, other: Any) -> bool:
    """Whether two outputs are bit-identical, in values and precision."""
    return torch.equal(as_tensor(one), as_tensor(other)) and as_tensor(one).dtype == as_tensor(other).dtype


class StoppedError(Exception):
    """Stops a call."""


def raise_at_step(error: type[BaseException]) -> dict[str, Any]:
    """A callback that ends a call in its second step."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise error
        return tensors

    return {"callback_on_step_end": callback}


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def offload_models(pipe: Any) -> None:
    """Models are brought to the CPU, as if it were an accelerator, when they are needed."""
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does, with the CPU as the device that layers are brought to."""
    for model in models_of(pipe).values():
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
