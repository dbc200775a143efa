"""LoRAs that stay on the device between calls: nothing is copied again, is left in the model, or is out of date."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components import State, random_lora, tiny_unet
from composing import BOXED, UPDATES, StoppedError, compose, raise_at_step
from lora_compose.pipelines.concepts.overload import joint_change
from lora_compose.pipelines.scene.scene import Concept
from pairs import in_pairs

pytestmark = pytest.mark.parametrize("family", ["sd"])
METHODS = ("merge", "tara", "regional")


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return compose(pipe, **{"num_inference_steps": 1, "guidance_scale": 1.0} | arguments).images


class Reads(TorchDispatchMode):
    """Which concepts' factors operations read, as they are in host memory."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._owners = {
            tensor.untyped_storage().data_ptr(): name
            for name, loaded in pipe.library.loaded.items()
            for lora in loaded.factors.by_part.values()
            for factors in lora.values()
            for tensor in (factors.down, factors.up)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor) and not given.is_meta:
                self.found |= {self._owners.get(given.untyped_storage().data_ptr(), "")} - {""}
        return func(*args, **(kwargs or {}))


def reads(pipe: Any, **arguments: Any) -> set[str]:
    with Reads(pipe) as seen:
        latents_of(pipe, **arguments)
    return seen.found


def anew(pipe: Any, **arguments: Any) -> Tensor:
    """What a pipeline that has kept nothing gives, with the same models and concepts."""
    fresh = type(pipe)(**pipe.components, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    fresh.library.loaded.update(pipe.library.loaded)
    return latents_of(fresh, **arguments)


@pytest.mark.parametrize(("method", "dtype"), in_pairs(METHODS, [torch.float32, torch.bfloat16]))
def test_a_second_call_copies_no_factor_and_gives_the_same_bits(whole_composer, method, dtype):
    pipe = whole_composer.to(dtype)
    before = State(pipe)
    arguments = {"method": method, "concepts": BOXED}
    assert reads(pipe, **arguments) == {"cat", "dog"}
    expected = anew(pipe, **arguments)
    assert reads(pipe, **arguments) == set()
    assert torch.equal(latents_of(pipe, **arguments), expected)
    before.assert_unchanged()


def test_of_another_set_only_what_is_new_is_copied(composer, load_concepts):
    load_concepts(composer, "bear")
    latents_of(composer, method="merge")
    arguments = {"method": "merge", "concepts": ["bear", "dog"], "prompt": "a xlo bear and a zwx dog"}
    joint_change(composer.resolve_concepts(["bear", "dog"]))  # reads the factors of a new pair once
    assert reads(composer, **arguments) == {"bear"}
    assert torch.equal(latents_of(composer, **arguments), anew(composer, **arguments))


@pytest.mark.parametrize("method", ["merge", "regional"])
def test_nothing_is_left_in_the_model_when_a_later_call_fails(composer, method):
    arguments = {"method": method, "concepts": BOXED}
    expected = latents_of(composer, **arguments)
    before = State(composer)
    with pytest.raises(StoppedError):
        latents_of(composer, **arguments, num_inference_steps=2, **raise_at_step(StoppedError))
    before.assert_unchanged()
    assert reads(composer, **arguments) == set()
    assert torch.equal(latents_of(composer, **arguments), expected)


Writer = Callable[..., Any]


def weights_in_place(pipe: Any, write: Writer) -> None:
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith("to_q.weight"):
            parameter.data.mul_(0.5)  # which PyTorch counts as no change of the parameter


def another_model(pipe: Any, write: Writer) -> None:
    pipe.unet = tiny_unet(attention_head_dim=4)


def a_wider_model(pipe: Any, write: Writer) -> None:
    pipe.unet = tiny_unet(block_out_channels=(16, 16))
    pipe.library.loaded.clear()
    for seed, (name, trigger) in enumerate({"cat": "sks", "dog": "zwx"}.items()):
        pipe.load_concept(write(name, unet=random_lora(pipe.unet, seed)), name, trigger=trigger)


def precision(pipe: Any, write: Writer) -> None:
    pipe.to(torch.bfloat16)
    assert len(pipe.banks) == 0


def an_adapter(pipe: Any, write: Writer) -> None:
    pipe.load_lora_weights(str(write("style", unet=random_lora(pipe.unet, 9))), adapter_name="style")


CHANGES = (weights_in_place, another_model, a_wider_model, precision, an_adapter)


@pytest.mark.parametrize(("change", "method"), in_pairs(CHANGES, ["merge", "regional"]))
def test_whatever_changes_between_calls_counts(composer, write_lora, method, change):
    arguments = {"method": method, "concepts": BOXED}
    expected = latents_of(composer, **arguments)
    change(composer, write_lora)
    found = latents_of(composer, **arguments)
    assert torch.equal(found, anew(composer, **arguments))
    assert not torch.equal(found, expected)


def test_factors_on_blocks_are_those_of_the_call(composer):
    latents_of(composer, method="merge")
    arguments = {"method": "merge", "concepts": [Concept(name="cat", blocks={"down": 0.5}), "dog"]}
    assert torch.equal(latents_of(composer, **arguments), anew(composer, **arguments))


def test_they_are_bounded_and_the_least_recently_used_goes(composer, load_concepts):
    load_concepts(composer, "bear")
    sets = {name: {"method": "merge", "concepts": [name], "prompt": f"a {word}"}
            for name, word in {"cat": "sks", "dog": "zwx", "bear": "xlo"}.items()}  # fmt: skip
    latents_of(composer, **sets["cat"])
    one = composer.banks.bytes
    composer.bank_memory = 2 * one
    for name in ("dog", "cat", "bear"):
        latents_of(composer, **sets[name])
    assert composer.banks.bytes == 2 * one
    assert reads(composer, **sets["cat"]) == set()
    assert reads(composer, **sets["dog"]) == {"dog"}
    composer.unload_concept("dog")
    assert composer.banks.bytes == one
    composer.bank_memory = 0
    assert composer.banks.bytes == 0
    assert torch.equal(latents_of(composer, **sets["cat"]), anew(composer, **sets["cat"]))
    assert len(composer.banks) == 0


def test_what_is_cast_with_its_model_during_a_call_is_not_kept(composer):
    def cast(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe.unet.to(torch.float64)
        return tensors

    latents_of(composer, method="regional", concepts=BOXED, callback_on_step_end=cast)
    composer.unet.to(torch.float32)
    assert len(composer.banks) == 0
    arguments = {"method": "regional", "concepts": BOXED}
    assert torch.equal(latents_of(composer, **arguments), anew(composer, **arguments))


def test_what_a_call_in_inference_mode_has_copied_is_kept_and_gradients_can_be_taken(composer):
    composer.to(torch.bfloat16)
    with torch.inference_mode():
        for method in ("merge", "regional"):
            latents_of(composer, method=method, concepts=BOXED)
            assert reads(composer, method=method, concepts=BOXED) == set()
    assert latents_of(composer, method=UPDATES, concepts=BOXED).isfinite().all()


def test_an_adapter_of_the_user_is_read_anew_in_every_call(composer, write_lora):
    composer.load_lora_weights(str(write_lora("bear", unet=random_lora(composer.unet, 7))), adapter_name="bear")
    arguments = {"method": "merge", "concepts": ["bear"]}
    expected = latents_of(composer, **arguments)
    with torch.no_grad():
        for name, parameter in composer.unet.named_parameters():
            if ".lora_B.bear." in name:
                parameter.data.mul_(2)
    found = latents_of(composer, **arguments)
    assert not torch.equal(found, expected)
    assert torch.equal(found, anew(composer, **arguments))


def test_beside_an_adapter_files_are_copied_once_and_the_adapter_each_time(composer, write_lora):
    composer.load_lora_weights(str(write_lora("bear", unet=random_lora(composer.unet, 7))), adapter_name="bear")
    arguments = {"method": "merge", "concepts": ["cat", "bear", "dog"]}
    assert reads(composer, **arguments) == {"cat", "dog"}
    size = composer.banks.bytes
    for name, parameter in composer.unet.named_parameters():
        if ".lora_B.bear." in name:
            parameter.data.mul_(2)
    assert reads(composer, **arguments) == set()
    assert composer.banks.bytes == size
    assert torch.equal(latents_of(composer, **arguments), anew(composer, **arguments))
