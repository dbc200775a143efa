"""Precision: latents keep theirs from step to step, and weights that hooks take away give right gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from components import FAMILIES, State, random_lora, save_lora, seeded, with_library
from lora_compose.pipelines.denoising.denoiser import Denoiser
from lora_compose.pipelines.denoising.passes import Gradient
from lora_compose.pipelines.methods import METHODS, PRESETS, Clora, LoraComposer, Settings, make_method
from lora_compose.pipelines.scene.scene import Concept

PROMPT = "a sks cat and a zwx dog"
BOXED = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
EVERY_METHOD: dict[str, Settings] = {
    **{name: make_method(name) for name in (*METHODS, *PRESETS)},
    "clora:official": replace(Clora.official(), refinements=1),
    "clora that fuses branches": Clora(fuse="branches"),
    "clora that averages branches": Clora(fuse="branches", mask_from=1.0),
}
OTHER_NUMBERS = {*PRESETS, "clora that averages branches"}
"""What goes the way of others with other numbers."""
WITH_UPDATES = {"clora": Clora(), "lora-composer": LoraComposer()}


@pytest.fixture(scope="module")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """By family, the concepts "cat" and "dog"."""

    @cache
    def library(family: str) -> Any:
        pipe, folder = FAMILIES[family](), tmp_path_factory.mktemp(family)
        for seed, (name, trigger) in enumerate({"cat": "sks", "dog": "zwx"}.items()):
            lora = random_lora(pipe.unet, seed, size=0.1)
            path = save_lora(folder / f"{name}.safetensors", {"method": "tara"}, unet=lora)
            pipe.load_concept(path, trigger=trigger, class_word=name)
        return pipe.library

    return library


@pytest.fixture
def composer(library_of, family) -> Any:
    """A tiny pipeline with the concepts "cat" and "dog"."""
    return with_library(FAMILIES[family](), library_of(family))


def run(pipe: Any, method: Settings, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": 1, "output_type": "latent", "generator": seeded(), "concepts": BOXED}
    return pipe(PROMPT, method=method, **given | arguments).images


@pytest.mark.parametrize(("family", "dtype", "method"), [
    *(
        pytest.param("sd", torch.bfloat16, method, marks=pytest.mark.slow if method in OTHER_NUMBERS else ())
        for method in EVERY_METHOD
    ),
    *(pytest.param("sdxl", torch.float16, name, marks=pytest.mark.slow) for name in ("clora", "lora-composer")),
])  # fmt: skip
def test_latents_keep_their_precision_from_step_to_step(composer, dtype, method):
    dtypes = []

    def look(pipe, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)
        return tensors

    composer.to(dtype=dtype)
    latents = run(composer, EVERY_METHOD[method], callback_on_step_end=look, num_inference_steps=2)
    assert dtypes == [dtype] * 2
    assert latents.dtype == dtype
    assert latents.isfinite().all()


@contextmanager
def seen_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Gradient]]:
    found: list[Gradient] = []
    gradient = Denoiser.gradient

    def look(*args: Any, **kwargs: Any) -> Gradient:
        found.append(gradient(*args, **kwargs))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "gradient", look)
        yield found


@pytest.mark.parametrize(
    ("method", "checkpointing"), [("clora", False), pytest.param("lora-composer", True, marks=pytest.mark.slow)]
)
def test_weights_stored_in_8_bits_give_the_gradients_of_the_same_weights_in_full_precision(
    composer, monkeypatch, method, checkpointing
):
    numbers = [weight.to(torch.float8_e4m3fn).float() for weight in composer.unet.parameters()]
    composer.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if checkpointing:
        composer.unet.enable_gradient_checkpointing()
    parameters = list(composer.unet.parameters())
    before = State(composer)
    with seen_gradients(monkeypatch) as found:
        latents = run(composer, WITH_UPDATES[method])
    before.assert_unchanged()

    stored = [parameter.dtype == torch.float8_e4m3fn for parameter in parameters]
    assert sum(stored) > len(stored) / 2
    full = FAMILIES["sd"]()
    for weight, number, is_stored in zip(full.unet.parameters(), numbers, stored, strict=True):
        weight.data = number if is_stored else weight.data
    full.library.loaded.update(composer.library.loaded)
    with seen_gradients(monkeypatch) as expected:
        torch.testing.assert_close(latents, run(full, WITH_UPDATES[method]), atol=1e-5, rtol=0)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.losses, other.losses)
        torch.testing.assert_close(
            one.direction, other.direction, atol=1e-4 * float(other.direction.abs().max()), rtol=0
        )
        assert other.direction.abs().max() > 0


class _Emptied(ModelHook):
    """Leaves a layer without its numbers once it has run, as group offloading leaves it on another device."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.kept = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        return self.post_forward(module, module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = self.kept[name]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.full_like(parameter.data, torch.nan)
        return output


@pytest.mark.parametrize(
    ("method", "checkpointing"), [pytest.param("clora", False, marks=pytest.mark.slow), ("lora-composer", True)]
)
def test_updates_are_the_same_where_hooks_take_weights_away_after_each_layer(composer, method, checkpointing):
    expected = run(composer, WITH_UPDATES[method])
    for module in composer.unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(_Emptied(), "emptied")
    if checkpointing:
        composer.unet.enable_gradient_checkpointing()
    forwards = [module.forward for module in composer.unet.modules()]
    torch.testing.assert_close(run(composer, WITH_UPDATES[method]), expected, atol=1e-5, rtol=0)
    assert [module.forward for module in composer.unet.modules()] == forwards
    assert all(weight.isnan().all() for weight in composer.unet.parameters())
