"""Runs diffusers' own pipeline tests on our classes: a plugin of pytest for a process of its own.

`python -m diffusers_own FOLDER MODE REPORT` with diffusers' repository, of which only `tests` is read, and a mode:
"control" leaves its classes as they are, "ours" puts ours in their place, "concepts" has every call go through a
concept whose LoRA changes next to nothing. Tokenizers and configurations that the tests fetch are made here.
"""

import json
import os
import sys
from functools import cache, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from components import ATTENTION
from flux2_dev import TextProcessor, processor
from lora_compose.pipelines.families.chroma import ComposeChromaPipeline
from lora_compose.pipelines.families.flux import ComposeFluxPipeline
from lora_compose.pipelines.families.flux2 import ComposeFlux2KleinPipeline
from lora_compose.pipelines.families.flux2_dev import ComposeFlux2Pipeline
from lora_compose.pipelines.families.flux_kontext import ComposeFluxKontextPipeline
from lora_compose.pipelines.families.ideogram4 import ComposeIdeogram4Pipeline
from lora_compose.pipelines.families.krea2 import ComposeKrea2Pipeline
from lora_compose.pipelines.families.qwen_image import ComposeQwenImagePipeline
from lora_compose.pipelines.families.qwen_image_edit import ComposeQwenImageEditPlusPipeline
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline
from lora_compose.pipelines.families.z_image import ComposeZImagePipeline
from qwen import qwen_tokenizer
from qwen_image_edit import WORDS as TEMPLATE_WORDS
from qwen_image_edit import ImageProcessor, image_processor  # has diffusers read references small, or tests take hours

FILES = {
    "SD": "stable_diffusion/test_stable_diffusion.py",
    "SD, image to image": "stable_diffusion/test_stable_diffusion_img2img.py",
    "SD, inpainting": "stable_diffusion/test_stable_diffusion_inpaint.py",
    "SDXL": "stable_diffusion_xl/test_stable_diffusion_xl.py",
    "SDXL, image to image": "stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
    "SDXL, inpainting": "stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py",
    "Chroma": "chroma/test_pipeline_chroma.py",
    "Chroma, image to image": "chroma/test_pipeline_chroma_img2img.py",
    "FLUX.1": "flux/test_pipeline_flux.py",
    "FLUX.1, image to image": "flux/test_pipeline_flux_img2img.py",
    "FLUX.1, inpainting": "flux/test_pipeline_flux_inpaint.py",
    "FLUX.1 Kontext": "flux/test_pipeline_flux_kontext.py",
    "FLUX.2-dev": "flux2/test_pipeline_flux2.py",
    "FLUX.2-klein": "flux2/test_pipeline_flux2_klein.py",
    "FLUX.2-klein, inpainting": "flux2/test_pipeline_flux2_klein_inpaint.py",
    "Ideogram 4": "ideogram4/test_pipeline_ideogram4.py",
    "Krea 2": "krea2/test_krea2.py",
    "Qwen-Image": "qwenimage/test_qwenimage.py",
    "Qwen-Image, image to image": "qwenimage/test_qwenimage_img2img.py",
    "Qwen-Image, inpainting": "qwenimage/test_qwenimage_inpaint.py",
    "Qwen-Image-Edit-Plus": "qwenimage/test_qwenimage_edit_plus.py",
    "Z-Image": "z_image/test_z_image.py",
    "Z-Image, image to image": "z_image/test_z_image_img2img.py",
    "Z-Image, inpainting": "z_image/test_z_image_inpaint.py",
}
"""The modules of diffusers' tests that are run, in `tests/pipelines`."""

_REFINER = "StableDiffusionXLImg2ImgRefinerOnly"
"""Tests of a model that we refuse to open."""

_OURS: dict[str, Any] = {
    f"{name}{task}Pipeline": ours
    for name, ours in {
        "StableDiffusion": ComposeStableDiffusionPipeline,
        "StableDiffusionXL": ComposeStableDiffusionXLPipeline,
        "Chroma": ComposeChromaPipeline,
        "Flux": ComposeFluxPipeline,
        "FluxKontext": ComposeFluxKontextPipeline,
        "Flux2": ComposeFlux2Pipeline,
        "Flux2Klein": ComposeFlux2KleinPipeline,
        "Ideogram4": ComposeIdeogram4Pipeline,
        "Krea2": ComposeKrea2Pipeline,
        "QwenImage": ComposeQwenImagePipeline,
        "QwenImageEditPlus": ComposeQwenImageEditPlusPipeline,
        "ZImage": ComposeZImagePipeline,
    }.items()
    for task in ("", "Img2Img", "Inpaint")
}
_FILES = TemporaryDirectory(ignore_cleanup_errors=True)


def _clip_tokenizer() -> CLIPTokenizer:
    """Letters, of 77 tokens at once; the end of a text has the highest number, as in CLIP's."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    return T5Tokenizer(vocab=[*pieces, *((chr(code), -4.0) for code in range(33, 127))], extra_ids=0)


def _t5_config() -> T5Config:
    return T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.0)


def _t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(_t5_config())


def _qwen_tokenizer() -> Any:
    """Words of the tests' prompts are tokens, so that texts are as short as with Qwen's."""
    return qwen_tokenizer(f"{TEMPLATE_WORDS} dance monkey bad quality very longvery long", _OF_IMAGES)


_OF_IMAGES = {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
"""Tokens whose numbers are in the configurations that the tests have."""
_FETCHED = {
    "tiny-random-clip": _clip_tokenizer, "tiny-random-t5": _t5_tokenizer,
    "tiny-random-Qwen2VLForConditionalGeneration": _qwen_tokenizer,
    "Mistral-Small-3.1-24B-Instruct-2503-only-processor": processor,
}  # fmt: skip
_PROCESSORS = {"Qwen2VLProcessor": ImageProcessor, "PixtralProcessor": TextProcessor}
"""Processors, by the names under which pipelines are saved, without the parts that need torchvision."""


def _made_here(kind: Any, make: Any = None) -> None:
    """What a class would fetch is made here."""
    given = kind.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
        for ending, known in _FETCHED.items():
            if str(name) == f"hf-internal-testing/{ending}":
                return (make or known)()
        return given(cls, name, *args, **options)

    kind.from_pretrained = classmethod(from_pretrained)


@cache
def _lora_of(part: str, layers: tuple[tuple[str, int, int], ...]) -> Path:
    """A file with a LoRA for these layers that changes next to nothing."""
    path = Path(_FILES.name) / f"{abs(hash((part, layers)))}.safetensors"
    tensors = {}
    for name, outputs, inputs in layers:
        tensors[f"{part}.{name}.lora_A.weight"] = torch.full((1, inputs), 1e-3)
        tensors[f"{part}.{name}.lora_B.weight"] = torch.full((outputs, 1), 1e-4)
    save_file(tensors, path)
    return path


def _with_a_setting_of_the_refiner(family: Any) -> Any:
    """SDXL's class in place of diffusers' for images, whose constructors take a further setting."""

    class Taking(family):
        @wraps(family.__init__)
        def __init__(self, *args: Any, requires_aesthetics_score: bool = False, **parts: Any) -> None:
            super().__init__(*args, **parts)

    Taking.__qualname__ = "Taking"
    return Taking


def _of_the_base(get_components: Any) -> Any:
    """Components of tests for images with the six sizes that SDXL's base model takes; theirs has the refiner's five."""

    @wraps(get_components)
    def made(*args: Any, **arguments: Any) -> dict[str, Any]:
        components = get_components(*args, **arguments)
        unet = components["unet"]
        if unet.config.projection_class_embeddings_input_dim == 5 * 8 + 32:
            torch.manual_seed(0)
            config = {**unet.config, "projection_class_embeddings_input_dim": 6 * 8 + 32}
            components |= {"unet": type(unet).from_config(config), "requires_aesthetics_score": False}
        return components

    return made


def through_concepts(family: Any) -> Any:
    """A class each of whose calls has a concept."""

    class Composed(family):
        @wraps(family.__call__)
        def __call__(self, *args: Any, **arguments: Any) -> Any:
            if "nothing" not in self.concepts:
                part = "transformer" if self.components.get("unet") is None else "unet"
                layers = tuple(
                    (name.removesuffix(".base_layer"), layer.out_features, layer.in_features)
                    for name, layer in self.model.named_modules()
                    if isinstance(layer, nn.Linear) and name.removesuffix(".base_layer").endswith(ATTENTION)
                )
                self.load_concept(_lora_of(part, layers), "nothing")
            return super().__call__(*args, **{"concepts": ["nothing"], "method": "merge"} | arguments)

    Composed.__qualname__ = "Composed"
    return Composed


class Plugin:
    """Changes the tests, and keeps what came of them."""

    def __init__(self, mode: str, report: Path) -> None:
        self.mode = mode
        self.report = report
        self.outcomes: dict[str, Any] = {}
        self.classes: dict[str, Any] = dict(_OURS) if mode != "control" else {}
        for name in self.classes.keys() & {"StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"}:
            self.classes[name] = _with_a_setting_of_the_refiner(self.classes[name])
        if mode == "concepts":
            self.classes = {name: through_concepts(family) for name, family in self.classes.items()}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if _REFINER not in item.cls.__name__]
        for item in items:
            for each in item.cls.__mro__:
                components = each.__dict__.get("get_dummy_components")
                if "xl" in item.module.__name__ and components and not hasattr(components, "__wrapped__"):
                    each.get_dummy_components = _of_the_base(components)
                found = each.__dict__.get("pipeline_class")
                name = getattr(found, "__name__", None)
                if name in self.classes and found not in self.classes.values():
                    setattr(item.module, name, self.classes[name])
                    each.pipeline_class = self.classes[name]

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::", 1)[1]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = report.outcome, "" if report.outcome == "passed" else str(report.longrepr)

    def pytest_sessionfinish(self) -> None:
        self.report.write_text(json.dumps(self.outcomes, indent=1), encoding="utf-8")


def main(folder: str, mode: str, report: str, *options: str) -> int:
    """Runs them; the outcomes are written as JSON, by the name of the test."""
    for name, ours in _PROCESSORS.items():
        ours.__name__, ours.__module__ = name, "transformers"
        setattr(sys.modules["transformers"], name, ours)  # not the module that was imported above
    for name in ("CLIPTokenizer", "AutoTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast", "AutoProcessor"):
        _made_here(getattr(transformers, name))
    _made_here(ImageProcessor, lambda: image_processor(_qwen_tokenizer()))
    _made_here(transformers.AutoConfig, _t5_config)
    _made_here(T5EncoderModel, _t5_encoder)
    transformers.integrations.peft.check_peft_version = lambda **_: None  # earlier ones add adapters, too
    os.chdir(folder)
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    files = [option for option in options if option in FILES] or FILES
    chosen = [f"tests/pipelines/{FILES[name]}" for name in files]
    given = [option for option in options if option not in FILES]
    quiet = ["-q", "-p", "no:cacheprovider", "--rootdir", folder, "--tb=short", "-W", "ignore"]
    return int(pytest.main([*quiet, *chosen, *given], [Plugin(mode, Path(report).resolve())]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
