"""Concepts on ComfyUI's own models, tiny, sampled by its own KSampler: equal to dense deltas, and gone afterwards."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_compose.compose.comfyui.composition import Composition

pytestmark = pytest.mark.comfyui
FAMILIES = ("sd", "sdxl", "flux")


@pytest.fixture(scope="module")
def core() -> ModuleType:
    import comfy_models

    return comfy_models


@pytest.fixture(scope="module")
def models(core: ModuleType) -> dict[str, Any]:
    return {name: make() for name, make in core.FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def patcher(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param]


def masks(core: ModuleType) -> list[Tensor]:
    """They overlap, and leave cells free."""
    found = [torch.zeros(core.GRID), torch.zeros(core.GRID)]
    found[0][:, :8], found[1][2:, 6:] = 1, 1
    return found


def words(core: ModuleType) -> Tensor:
    gate = torch.zeros(core.TOKENS, 2)
    gate[2, 0] = gate[3, 0] = gate[5, 1] = 1
    return gate


def composition(core: ModuleType, patcher: Any, folder: Path, method: str) -> Composition:
    loras = [core.read(patcher, core.tensors_of(patcher, seed), folder) for seed in (1, 2)]
    weights = torch.tensor([1.0, 0.8])
    if method == "regional":
        return Composition(loras, weights, masks(core), torch.ones(1, 2), False, False)
    if method == "words in regions":
        return Composition(loras, weights, [masks(core)[0], None], words(core), False, False)
    if method == "tara":
        return Composition(loras, weights, [None, None], words(core), False, True)
    return Composition(loras, weights, [None, None], torch.ones(1, 2), True, True)


METHODS = ("merge", "tara", "regional", "words in regions")


def left(patcher: Any) -> int:
    """Modules whose `forward` is not that of their class; ComfyUI's bypass leaves that there, as an attribute."""
    own = [(module, module.__dict__.get("forward")) for module in patcher.model.modules()]
    return sum(f is not None and getattr(f, "__func__", None) is not type(module).forward for module, f in own)


def compared(
    core: ModuleType, patcher: Any, plan: Composition, negative: list, before: Any = None, **options: Any
) -> float:
    """The largest difference from the reference, of the largest effect that the LoRAs have on a latent."""
    from lora_compose.compose.comfyui.host import compose, marked

    patcher = patcher if before is None else before(patcher)
    positive = core.text(1)
    base = core.drawn(patcher, positive, negative, **options)
    found = core.drawn(compose(patcher, plan), marked(positive, plan), negative, **options)
    assert left(patcher) == 0 or before is not None
    given = [region if isinstance(region, Tensor) else None for region in plan.regions]
    wanted = core.Reference(patcher, plan, positive, given).draw(positive, negative, **options)
    assert torch.equal(base, core.drawn(patcher, positive, negative, **options)), "the base model has changed"
    effect = (wanted - base).abs().max()
    assert effect > 0.01
    difference = float((found - wanted).abs().max() / effect)
    print(f"{difference:.0e}", end=" ")
    return difference


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_dense_deltas(core: ModuleType, patcher: Any, tmp_path: Path, method: str) -> None:
    plan = composition(core, patcher, tmp_path, method)
    assert compared(core, patcher, plan, core.text(2)) < 1e-5


@pytest.mark.parametrize("options", [{"cfg": 1.0}, {"batch": 2, "sampler": "dpmpp_2m"}, {"grid": (13, 17)}], ids=str)
def test_samplers_batches_and_odd_sizes(core: ModuleType, patcher: Any, tmp_path: Path, options: dict) -> None:
    plan = composition(core, patcher, tmp_path, "words in regions")
    assert compared(core, patcher, plan, core.text(2), **options) < 1e-5
