"""Precision, devices and offloading of models that compose."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from components import EVERYTHING, random_lora, seeded, text_loras
from composing import (
    BOTH,
    UPDATES,
    StoppedError,
    assert_close,
    compose,
    latents_of,
    models_of,
    offload_layers,
    offload_models,
    one_step,
    raise_at_step,
)
from pairs import in_pairs
from simulated_device import DEVICE, numbers, parameters_that_move


@pytest.fixture
def composer(whole_composer: Any) -> Any:
    """Has LoRAs that change layers of every kind."""
    return whole_composer


@pytest.mark.parametrize(
    ("family", "method", "dtype"),
    in_pairs([("sdxl", "tara"), pytest.param("sd", UPDATES, marks=pytest.mark.slow)], [torch.float16, torch.bfloat16]),
)
def test_half_precision_is_near_to_single_precision(composer: Any, method: Any, dtype: Any) -> None:
    # Up to torch 2.8 a generator draws other numbers in half precision.
    noise = torch.randn(1, 4, 16, 16, generator=seeded())
    expected = one_step(composer, method=method, latents=noise).images
    composer.to(dtype)
    assert composer.dtype == dtype
    assert {model.dtype for model in models_of(composer).values()} == {dtype}
    found = one_step(composer, method=method, latents=noise.to(dtype)).images
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < (0.01 if dtype == torch.float16 else 0.05)


def test_double_precision_agrees_with_single_precision(composer):
    for method in ("merge", "tara"):
        noise = torch.randn(1, 4, 16, 16, generator=seeded())
        single = one_step(composer.to(dtype=torch.float32), latents=noise, method=method).images
        double = one_step(composer.to(dtype=torch.float64), latents=noise.double(), method=method).images
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=0)
        assert not torch.equal(single.double(), double)


@pytest.mark.parametrize(("family", "method"), [pytest.param("sdxl", "tara", marks=pytest.mark.slow), ("sd", UPDATES)])
def test_a_pipeline_goes_to_a_device_and_back(composer: Any, method: Any) -> None:
    expected = one_step(composer, method=method).images
    with parameters_that_move():
        for place in (DEVICE, torch.device("cpu")):
            before = {name: dict(model.named_parameters()) for name, model in models_of(composer).items()}
            assert composer.to(place) is composer
            assert composer.device == composer.runs_on == DiffusionPipeline._execution_device.__get__(composer) == place
            found = one_step(composer, method=method).images
            assert found.device == place
            assert_close(numbers(found), expected)
            for name, model in models_of(composer).items():
                assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {place}
                assert all(parameter is before[name][key] for key, parameter in model.named_parameters())


def offload_models_to_the_device(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device=DEVICE)


def offload_layers_to_the_device(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device=DEVICE)


@pytest.mark.parametrize(("family", "methods", "offload"), [
    ("sdxl", ("tara", "tara"), offload_models_to_the_device), ("sd", (UPDATES, "tara"), offload_layers_to_the_device),
], ids=["models", "layers"])  # fmt: skip
def test_an_offloaded_pipeline_gives_the_same_image_again_and_again(
    composer: Any, methods: Sequence[Any], offload: Callable[[Any], None]
) -> None:
    expected = [one_step(composer, method=method, output_type="np").images for method in methods]
    with parameters_that_move():
        offload(composer)
        for method, images in zip(methods, expected, strict=True):
            assert composer._execution_device == DEVICE
            found = one_step(composer, method=method, output_type="np").images
            np.testing.assert_allclose(found, images, atol=1e-4)
            places = {parameter.device.type for parameter in composer.unet.parameters()}
            assert places == {"meta" if offload is offload_layers_to_the_device else "cpu"}


@pytest.mark.parametrize(("family", "methods", "groups"), [
    ("sd", (UPDATES,), {"offload_type": "block_level", "num_blocks_per_group": 1}),
    pytest.param("sdxl", ("tara",), {"offload_type": "leaf_level"}, marks=pytest.mark.slow),
], ids=["blocks", "leaves"])  # fmt: skip
def test_a_pipeline_offloaded_in_groups_gives_the_same_image(
    composer: Any, methods: Sequence[Any], groups: Any
) -> None:
    expected = [one_step(composer, method=method, output_type="np").images for method in methods]
    with parameters_that_move():
        composer.enable_group_offload(DEVICE, **groups)
        for method, images in zip(methods, expected, strict=True):
            np.testing.assert_allclose(one_step(composer, method=method, output_type="np").images, images, atol=1e-4)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("offload", [offload_models, offload_layers])
def test_offloaded_models_give_the_same_image_after_a_call_that_failed(pipe, load_concepts, write_lora, offload):
    load_concepts(pipe, "cat", targets=EVERYTHING, size=0.1)
    pipe.load_concept(write_lora("dog", unet=random_lora(pipe.unet, 1), **text_loras(pipe, 5)), trigger="zwx")
    expected = latents_of(pipe, method="merge"), latents_of(pipe, concepts=None, method=None)
    offload(pipe)
    tree = repr(pipe.unet)
    for _ in range(2):
        assert_close(latents_of(pipe, method="merge"), expected[0])
        assert torch.equal(latents_of(pipe, concepts=None, method=None), expected[1])
        assert repr(pipe.unet) == tree
        with pytest.raises(StoppedError):
            compose(pipe, method="merge", **raise_at_step(StoppedError))


def test_offloaded_models_go_back_after_a_call(composer):
    offload_models(composer)
    hooks = composer._all_hooks
    compose(composer)
    assert composer._all_hooks is not hooks  # diffusers moves every model and attaches its hooks anew
