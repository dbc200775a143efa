"""Every method on an accelerator, simulated: nothing is left on another device or in another precision, the numbers are
the CPU's, and the host does not wait for the device in every step."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, T2IAdapter
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from components import EVERYTHING, FAMILIES, activated, lora_tensors, random_lora, seeded, text_loras, with_library
from composing import SD_AND_SLOWLY_XL
from lora_compose.attention import Lora, backbone_of
from lora_compose.pipelines.control.spec import Control
from lora_compose.pipelines.methods import (
    Clora,
    Composite,
    LoraComposer,
    Merge,
    Regional,
    Settings,
    Switch,
    Tara,
)
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but
from simulated_device import DEVICE, SimTensor, Wait, beyond, listed, noted_waits, numbers

CPU = torch.device("cpu")
WORDS = {"cat": "sks", "dog": "zwx"}
PROMPT = "a sks cat and a zwx dog"
LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
CAT, DOG = Concept(name="cat", region=LEFT), Concept(name="dog", region=RIGHT)

# Settings of the authors stand beside our defaults where they take other ways through the code.
METHODS: dict[str, Settings] = {
    "merge": Merge(),
    "tara": Tara(),
    "tara, official": Tara.official(),
    "tara, keys and values": Tara(scope="cross_kv"),
    "regional": Regional(),
    "switch": Switch(interval=1),
    "composite": Composite(),
    "lora-composer": LoraComposer(),
    "lora-composer, official": LoraComposer.official(),
    "clora": Clora(),
    "clora, branches": Clora(fuse="branches"),
    "clora, official": replace(Clora.official(), refinements=1),
    "clora, one branch at once": Clora(branch_batch_size=1, smoothed=True, morphology=("dilate", "open")),
}

WAITS = {
    "lora-composer": 1,
    "lora-composer, official": 1,
    "clora": 1,
    "clora, branches": 1,
    "clora, official": 1,
    "clora, one branch at once": 1,
}
"""How often the host waits for the device for an update: for losses, which masks that become regions come with."""


DISTINCT = [
    name for name in METHODS if name not in ("tara, official", "tara, keys and values", "clora, one branch at once")
]

OF_EACH_KIND = ("tara", "regional", "composite", "lora-composer", "clora, branches")
"""Methods that are as different as they can be where prompts are joined and split."""


def written(path: Path, parts: Mapping[str, Lora], words: Mapping[str, Tensor] | None = None) -> Path:
    """A file of a LoRA that was trained with TARA."""
    save_file({**lora_tensors(**parts), **(words or {})}, path, metadata={"method": "tara"})
    return path


def tiny(family: str) -> Any:
    """A tiny pipeline whose single step is one in the middle, where the image depends on what the model says."""
    pipe = FAMILIES[family]()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=400)
    return pipe


@cache
def composer(family: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A tiny pipeline with two concepts and a style, which the tests leave as it is."""
    pipe = tiny(family)
    with TemporaryDirectory() as folder:
        for seed, (name, trigger) in enumerate({**WORDS, "ink": "xlo"}.items()):
            parts = {"unet": random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.1), **text_loras(pipe, seed)}
            path = written(Path(folder) / f"{name}.safetensors", parts)
            pipe.load_concept(path, trigger=trigger, class_word=None if name == "ink" else name)
    return pipe.to(device, dtype)


def changeable(family: str, device: torch.device) -> Any:
    """A pipeline as `composer` makes it, of a test's own."""
    return with_library(tiny(family), composer(family, CPU, torch.float32).library).to(device)


def called(pipe: Any, **arguments: Any) -> Any:
    given: dict[str, Any] = {
        "prompt": PROMPT, "concepts": [CAT, DOG], "num_inference_steps": 2, "guidance_scale": 4.0,
        "generator": seeded(), "output_type": "latent",
    }  # fmt: skip
    return pipe(**given | arguments)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(numbers(found), expected, atol=tolerance, rtol=tolerance)


def with_precision(family: str, dtype: torch.dtype, name: str) -> Any:
    """A case: by default our settings in single precision, whose numbers are compared, with the family of two texts."""
    kind = str(dtype).removeprefix("torch.")
    usual = (family, dtype) == ("sdxl", torch.float32) and name in DISTINCT and "official" not in name
    return pytest.param(family, dtype, name, id=f"{name}-{family}-{kind}", marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "dtype", "name"),
    [
        with_precision(family, dtype, name)
        for family in FAMILIES
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for name in METHODS
    ],
)
def test_every_method_gives_on_the_device_what_the_cpu_gives(family: str, dtype: Any, name: str) -> None:
    given = {"method": METHODS[name], "num_inference_steps": 2 if name == "switch" else 1}
    found = called(composer(family, DEVICE, dtype), **given).images
    assert (found.device, found.dtype) == (DEVICE, dtype)
    assert numbers(found).isfinite().all()
    if dtype == torch.float32:
        assert_same(found, called(composer(family, CPU, dtype), **given).images)


@SD_AND_SLOWLY_XL
@pytest.mark.parametrize("name", slow_but(("regional", "composite", "clora, branches"), DISTINCT))
def test_prompts_with_concepts_of_their_own_give_what_the_cpu_gives(family: str, name: str) -> None:
    found, expected = (
        called(
            composer(family, place, torch.float32), prompt=[PROMPT, "a sks cat"], concepts=[[CAT, DOG], [CAT]],
            generator=[seeded(0), seeded(1)], num_inference_steps=1, method=METHODS[name],
        ).images
        for place in (DEVICE, CPU)
    )  # fmt: skip
    assert_same(found, expected)


def of(pipe: Any, model: Any) -> Any:
    """A model where the pipeline is, in its precision."""
    return model.to(pipe.device, pipe.dtype).eval()


def control_image(folder: Path) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))


def mask_file(folder: Path) -> str:
    """The path of a mask image of a disc."""
    rows, columns = np.mgrid[:128, :128] - 64
    path = folder / "disc.png"
    Image.fromarray((255 * (rows**2 + columns**2 < 50**2)).astype(np.uint8)).save(path)
    return str(path)


def controls(pipe: Any, folder: Path) -> list[Control]:
    """A ControlNet and a T2I-Adapter."""
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    xl = hasattr(pipe, "text_encoder_2")
    adapter = T2IAdapter(
        channels=list(pipe.unet.config.block_out_channels), num_res_blocks=1, downscale_factor=16 if xl else 8,
        adapter_type="full_adapter_xl" if xl else "full_adapter",
    )  # fmt: skip
    image = control_image(folder)
    return [
        Control(model=of(pipe, activated(net, size=0.1)), image=image, scale=0.5, regions={"cat": 1.0}),
        Control(model=of(pipe, adapter), image=[image], regions={"dog": 0.2}, end=0.5),
    ]


def embeddings(pipe: Any, folder: Path) -> dict[str, Any]:
    """Text that was encoded before, wherever the pipeline is."""
    xl = hasattr(pipe, "text_encoder_2")
    names = ("prompt_embeds", "negative_prompt_embeds")
    names = (*names, "pooled_prompt_embeds", "negative_pooled_prompt_embeds") if xl else names
    with torch.no_grad():
        encoded = dict(zip(names, pipe.encode_prompt(PROMPT, device=pipe.device, num_images_per_prompt=1,
                                                     do_classifier_free_guidance=True), strict=True))  # fmt: skip
    return {"prompt": None, "concepts": ["cat", "dog"], "token_positions": {"cat": [2], "dog": [6]}, **encoded}


def halved(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] * 0.5}


def unguided(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe._guidance_scale = 1.0
    return {}


WITH_STYLE = {"concepts": [CAT, DOG, Concept(name="ink", role="style")], "prompt": f"{PROMPT}, xlo"}
SCHEDULED = [
    Concept(name="cat", region=LEFT, weight="1..0.2", blocks={"down": 0.5, "text": 0.3}),
    Concept(name="dog", region=RIGHT, weight=[0.5, 1.0], blocks={"up": 0.0}),
]
OWN_TEXTS = [
    Concept(name="cat", region=LEFT, prompt="a sks cat beside a dog in snow", negative_prompt="a dog"),
    Concept(name="dog", region=RIGHT, negative_prompt="blurry"),
]

FEATURES: dict[str, Callable[[Any, Path], Mapping[str, Any]]] = {
    "maps of lora-composer": lambda pipe, folder: {"method": "lora-composer", "record_attention": True},
    "maps of clora": lambda pipe, folder: {"method": "clora", "record_attention": True, "num_images_per_prompt": 2},
    "maps of draft": lambda pipe, folder: {"method": "draft", "record_attention": True, "concepts": ["cat", "dog"]},
    "maps of freefuse": lambda pipe, folder: {
        "method": "freefuse", "record_attention": True, "concepts": ["cat", "dog"],
    },
    "controls of lora-composer": lambda pipe, folder: {"method": "lora-composer", "control": controls(pipe, folder)},
    "weights of regional": lambda pipe, folder: {"method": "regional", "concepts": SCHEDULED},
    "a style for clora": lambda pipe, folder: {"method": "clora", **WITH_STYLE},
    "latents": lambda pipe, folder: {
        "method": "tara", "latents": torch.randn(1, 4, 16, 16, generator=seeded()).to(pipe.device, pipe.dtype),
    },
    "a mask for regional": lambda pipe, folder: {
        "method": "regional", "concepts": [Concept(name="cat", region=mask_file(folder)), "dog"],
    },
    "own prompts of clora": lambda pipe, folder: {
        "method": Clora(fuse="branches", uncond="each"), "concepts": OWN_TEXTS,
    },
    "embeddings": lambda pipe, folder: {"method": "tara", **embeddings(pipe, folder)},
    "a callback that switches guidance off": lambda pipe, folder: {
        "method": "regional", "callback_on_step_end": unguided,
    },
    "no guidance": lambda pipe, folder: {"method": "clora", "guidance_scale": 1.0},
    "decoded images": lambda pipe, folder: {"method": "tara", "output_type": "np"},
}  # fmt: skip


STEP_BY_STEP = ("maps of lora-composer", "weights of regional", "a callback that switches guidance off")
"""What a second step shows; the others have one."""

WITH_TENSORS = ("maps of clora", "controls of lora-composer", "latents", "embeddings", "decoded images")
"""What brings tensors of its own, which half precision meets."""

OF_SDXL = (
    "own prompts of clora", "embeddings", "with_words", "with_words_of_a_file",
)  # fmt: skip
"""What differs between the families, or has to be seen once for both; the rest is tried with the smaller one."""

SLOW = ("maps of lora-composer", "with_heun", "with_plain_attention", "with_checkpointing")
"""What others do as well: maps of CLoRA, Euler, checkpointing by branch."""


def by_default(name: str, family: str) -> Any:
    """A case, slow unless it is tried with this family."""
    mine = "sdxl" if name in OF_SDXL else "sd"
    return pytest.param(name, family, marks=() if family == mine and name not in SLOW else pytest.mark.slow)


@pytest.mark.parametrize(("name", "exact"), [by_default(name, family) for name in FEATURES for family in FAMILIES])
def test_whatever_else_a_call_may_have_gives_on_the_device_what_the_cpu_gives(
    exact: str, name: str, tmp_path: Path
) -> None:
    """In single precision with one family, and finite numbers in half precision."""
    pipes = [composer(exact, place, torch.float32) for place in (DEVICE, CPU)]
    if name in WITH_TENSORS:
        pipes.append(composer("sd", DEVICE, torch.float16))
    steps = 2 if name in STEP_BY_STEP else 1
    found, expected, *in_half = (
        called(pipe, **{"num_inference_steps": steps, **FEATURES[name](pipe, tmp_path)}) for pipe in pipes
    )
    for part in ("images", "attention_maps", "masks"):
        mine, theirs = getattr(found, part), getattr(expected, part)
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_same(mine, theirs)
    for output in in_half:
        images: Any = numbers(output.images)
        assert np.isfinite(np.asarray(images)).all()


def with_words(pipe: Any, folder: Path) -> dict[str, Any]:
    """A textual inversion of the user's in the prompt."""
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<thing>": torch.randn(2, width, generator=seeded())})
    if hasattr(pipe, "text_encoder_2"):
        other = torch.randn(2, pipe.text_encoder_2.config.hidden_size, generator=seeded())
        pipe.load_textual_inversion(
            {"<thing>": other}, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )  # fmt: skip
    return {"method": "tara", "prompt": f"<thing>, {PROMPT}"}


def with_words_of_a_file(pipe: Any, folder: Path) -> dict[str, Any]:
    """A LoRA that brings words, with vectors for every layer."""
    vectors = torch.randn(backbone_of(pipe.unet).text_layers, pipe.text_encoder.config.hidden_size, generator=seeded())
    words = {"new_concept_embedding.<x1>": vectors}
    if hasattr(pipe, "text_encoder_2"):
        width = pipe.text_encoder_2.config.hidden_size
        words = {"bundle_emb.<x1>": vectors[:1], "bundle_emb.<x1>.clip_g": torch.randn(1, width, generator=seeded())}
    path = written(folder / "words.safetensors", {"unet": random_lora(pipe.unet, 5)}, words)
    return {"method": "tara", "concepts": [Concept(name="it", lora=str(path)), "dog"], "prompt": "a <x1> and a zwx dog"}


def with_adapters(pipe: Any, folder: Path) -> dict[str, Any]:
    """One adapter of the user's that stays part of the base, and one that is a concept."""
    paths = {
        name: written(folder / f"{name}.safetensors", {"unet": random_lora(pipe.unet, seed)})
        for seed, name in ((6, "style"), (7, "fox"))
    }
    for name, path in paths.items():
        pipe.load_lora_weights(str(path), adapter_name=name)
    pipe.set_adapters(["style", "fox"], [0.5, 1.0])
    concepts = ["cat", Concept(name="fox", trigger="zwx", class_word="dog")]
    return {"method": "tara", "concepts": concepts, "cross_attention_kwargs": {"scale": 0.5}}


def with_checkpointing(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.unet.enable_gradient_checkpointing()
    return {"method": "lora-composer"}


def with_checkpointing_by_branch(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.unet.enable_gradient_checkpointing()
    return {"method": METHODS["clora, one branch at once"]}


def with_euler(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return {"method": "clora"}


def with_heun(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return {"method": "lora-composer"}


def with_plain_attention(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.unet.set_attn_processor(AttnProcessor())
    return {"method": "lora-composer"}


def with_channels_last(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.unet.to(memory_format=torch.channels_last)
    return {"method": "regional"}


PREPARED: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    prepare.__name__: prepare
    for prepare in (
        with_words, with_words_of_a_file, with_adapters, with_checkpointing, with_checkpointing_by_branch, with_euler,
        with_heun, with_plain_attention, with_channels_last,
    )
}  # fmt: skip


@pytest.mark.parametrize(("name", "family"), [by_default(name, family) for name in PREPARED for family in FAMILIES])
def test_pipelines_that_were_changed_give_on_the_device_what_the_cpu_gives(
    name: str, family: str, tmp_path: Path
) -> None:
    pipes = [changeable(family, place) for place in (DEVICE, CPU)]
    steps = 2 if name in ("with_euler", "with_heun") else 1
    found, expected = (
        called(pipe, **PREPARED[name](pipe, tmp_path), num_inference_steps=steps).images for pipe in pipes
    )
    assert_same(found, expected, 1e-3)  # updates amplify what is rounded, most with Heun's two passes for a step


@pytest.mark.parametrize("name", ["merge", "tara"])
def test_layers_are_folded_on_the_device(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose class is not PyTorch's own are left alone as quantised ones are, and the device has its own."""
    foldable: list[bool] = []

    def as_on_cuda(layer: torch.nn.Module, dtype: torch.dtype) -> bool:
        foldable.append(type(layer.weight) is SimTensor and layer.weight.dtype == dtype)
        return foldable[-1]

    given = {"method": METHODS[name], "num_inference_steps": 1}
    expected = called(composer(family, CPU, torch.float32), **given).images
    monkeypatch.setattr(sys.modules["lora_compose.attention.install"], "_foldable", as_on_cuda)
    assert_same(called(composer(family, DEVICE, torch.float32), **given).images, expected)
    assert foldable
    assert all(foldable)


# How often the host waits

OTHER_CALLS: dict[str, Callable[[Any, Path], Mapping[str, Any]]] = {
    "weights of tara": lambda pipe, folder: {"method": "tara", "concepts": SCHEDULED},
    "controls of regional": lambda pipe, folder: {"method": "regional", "control": controls(pipe, folder)},
    "own concepts of tara": lambda pipe, folder: {
        "method": "tara", "prompt": [PROMPT, "a sks cat"], "concepts": [["cat", "dog"], ["cat"]],
    },
    "rescaled guidance": lambda pipe, folder: {"method": "tara", "guidance_rescale": 0.7},
    "a callback": lambda pipe, folder: {"method": "merge", "callback_on_step_end": halved},
}  # fmt: skip


def with_updates(method: Settings, updates: int, steps: int) -> Settings:
    """The method with updates of all images in as many steps, the first ones, and new masks in no others."""
    if isinstance(method, LoraComposer):
        return replace(method, least_updates=1.0, most_updates=(updates - 0.5) / steps, apart=1 / steps)
    if isinstance(method, Clora):
        return replace(method, update_until=updates / steps, mask_until=updates / steps, refine_at=())
    return method


def waits_of(pipe: Any, **arguments: Any) -> list[Wait]:
    with noted_waits() as waits:
        called(pipe, **arguments)
    return waits


@cache
def waits_of_a_plain_step(pipe: Any) -> Sequence[Wait]:
    """How often diffusers' own scheduler waits."""
    more, fewer = (waits_of(pipe, concepts=None, num_inference_steps=steps) for steps in (2, 1))
    return beyond(more, fewer)


@cache
def waits_with_updates(pipe: Any, name: str, updates: int, steps: int) -> Sequence[Wait]:
    """How often a method with so many updates waits."""
    return waits_of(pipe, method=with_updates(METHODS[name], updates, steps), num_inference_steps=steps)


def assert_as_many(found: Sequence[Wait], expected: int) -> None:
    assert len(found) == expected, listed(found)


@SD_AND_SLOWLY_XL
@pytest.mark.parametrize("name", slow_but(OF_EACH_KIND, DISTINCT))
def test_in_another_step_the_host_waits_no_more_than_in_diffusers(family: str, name: str) -> None:
    pipe = composer(family, DEVICE, torch.float32)
    more, fewer = (waits_with_updates(pipe, name, 1, steps) for steps in (2, 1))
    assert_as_many(beyond(beyond(more, fewer), waits_of_a_plain_step(pipe)), 0)


@SD_AND_SLOWLY_XL
@pytest.mark.parametrize("name", OTHER_CALLS)
def test_nor_does_it_with_whatever_else_a_call_may_have(family: str, name: str, tmp_path: Path) -> None:
    pipe = composer(family, DEVICE, torch.float32)
    arguments = OTHER_CALLS[name](pipe, tmp_path)
    more, fewer = (waits_of(pipe, **arguments, num_inference_steps=steps) for steps in (2, 1))
    assert_as_many(beyond(beyond(more, fewer), waits_of_a_plain_step(pipe)), 0)


@SD_AND_SLOWLY_XL
@pytest.mark.parametrize(
    "name",
    slow_but(OF_EACH_KIND, [name for name in WAITS if name in DISTINCT]),
)
def test_for_another_update_the_host_waits_as_often_as_documented(family: str, name: str) -> None:
    pipe = composer(family, DEVICE, torch.float32)
    more, fewer = (waits_with_updates(pipe, name, updates, 2) for updates in (2, 1))
    assert_as_many(beyond(more, fewer), WAITS[name])


def test_without_updates_clora_waits_once_for_new_masks() -> None:
    pipe = composer("sd", DEVICE, torch.float32)
    more, fewer = (
        waits_of(pipe, method=Clora(step_size=0.0, mask_until=until), num_inference_steps=2) for until in (1.0, 0.5)
    )
    assert_as_many(beyond(more, fewer), 1)


def test_a_wait_in_a_step_is_found_with_its_line() -> None:
    pipe = composer("sd", DEVICE, torch.float32)

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert tensors["latents"].isfinite().all()
        return tensors

    calls = [waits_of(pipe, method="tara", callback_on_step_end=look, num_inference_steps=steps) for steps in (2, 1)]
    (found,) = beyond(beyond(*calls), waits_of_a_plain_step(pipe))
    assert (found.operation, found.caller and found.caller.partition(":")[0]) == (
        "_local_scalar_dense", "lora_compose/pipelines/families/base.py",
    )  # fmt: skip
    assert re.fullmatch(r"tests/test_on_the_device.py:\d+ look", found.line)
