"""Concepts on ComfyUI's own models, tiny, sampled by its own KSampler: equal to dense deltas, and gone afterwards."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_compose.compose.comfyui.composition import ComposedConcepts, DraftSteps
from lora_compose.pipelines.scene.division import APART_JOINT, divided, nearest, strips
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.scene.strength import WeightSchedule

pytestmark = pytest.mark.comfyui
FAMILIES = ("sd", "sdxl", "flux", "flux2", "z_image", "qwen_image", "chroma", "krea2", "anima")


@pytest.fixture(scope="module")
def core() -> ModuleType:
    import comfy_models

    return comfy_models


@pytest.fixture(scope="module")
def models(core: ModuleType) -> dict[str, Any]:
    return {name: make() for name, make in core.FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def patcher(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    if request.param not in models:
        pytest.skip(f"this version of ComfyUI has no {request.param}")
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


def composition(core: ModuleType, patcher: Any, folder: Path, method: str) -> ComposedConcepts:
    loras = [core.read(patcher, core.tensors_of(patcher, seed), folder) for seed in (1, 2)]
    weights = [WeightSchedule.of(weight) for weight in (1.0, 0.8)]
    if method == "regional":
        return ComposedConcepts(loras, weights, masks(core), torch.ones(1, 2), False, False)
    if method == "words in regions":
        return ComposedConcepts(loras, weights, [masks(core)[0], None], words(core), False, False)
    if method == "tara":
        return ComposedConcepts(loras, weights, [None, None], words(core), False, True, tokens=core.TOKENS)
    return ComposedConcepts(loras, weights, [None, None], torch.ones(1, 2), True, True)


METHODS = ("merge", "tara", "regional", "words in regions")


def left(patcher: Any) -> int:
    """Modules whose `forward` is not that of their class; ComfyUI's bypass leaves that there, as an attribute."""
    own = [(module, module.__dict__.get("forward")) for module in patcher.model.modules()]
    return sum(f is not None and getattr(f, "__func__", None) is not type(module).forward for module, f in own)


OF_DRAFTS = 5e-5
"""Norms over the few cells that a drafted region has on a coarse grid amplify rounding, ten times in two images."""


def compared(
    core: ModuleType,
    patcher: Any,
    plan: ComposedConcepts,
    negative: list,
    before: Any = None,
    images: Any = None,
    **options: Any,
) -> float:
    """The largest difference from the reference, of the largest effect that the LoRAs have on a latent.

    Args:
        images: The masks of each image, where the plan has none.
    """
    from lora_compose.compose.comfyui.hooks import compose, marked

    patcher = patcher if before is None else before(patcher)
    positive = core.text(1)
    base = core.drawn(patcher, positive, negative, **options)
    found = core.drawn(compose(patcher, plan), marked(positive, plan), negative, **options)
    assert left(patcher) == 0 or before is not None
    given = [region if isinstance(region, Tensor) else None for region in plan.regions]
    wanted = core.Reference(patcher, plan, positive, *(images or [given])).draw(positive, negative, **options)
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


def test_weights_that_change_over_the_steps(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    plan = composition(core, patcher, tmp_path, "words in regions")
    plan = replace(plan, weights=[WeightSchedule.of("1..0.2"), WeightSchedule.of("0:0.4,0.5:0")])
    assert compared(core, patcher, plan, core.text(2), steps=4) < 1e-5


def texts_of_regions(core: ModuleType, patcher: Any, folder: Path, *, isolate: bool) -> ComposedConcepts:
    """Two regions that overlap, with texts of 6 and 10 tokens, and a style that acts everywhere."""
    own = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    loras = [core.read(patcher, core.tensors_of(patcher, seed), folder) for seed in (1, 2, 3)]
    weights = [WeightSchedule.of(weight) for weight in (1.0, 0.8, 0.4)]
    texts = [core.text(10 + n, tokens) for n, tokens in enumerate((8, 6, 10))]
    regions = [*masks(core), None]
    return ComposedConcepts(loras, weights, regions, own, texts=texts, owners=(0, 1), isolate=isolate)


@pytest.mark.parametrize("isolate", [False, True])
def test_regions_read_texts_of_their_own(core: ModuleType, patcher: Any, tmp_path: Path, isolate: bool) -> None:
    """On UNets the negative text is repeated; here to the length of ours."""
    plan = texts_of_regions(core, patcher, tmp_path, isolate=isolate)
    assert compared(core, patcher, plan, core.text(2)) < 1e-5


@pytest.mark.parametrize("options", [{"batch": 2}, {"cfg": 1.0, "grid": (13, 17)}], ids=str)
def test_regions_that_read_one_text_are_isolated_at_first(
    core: ModuleType, patcher: Any, tmp_path: Path, options: dict
) -> None:
    """In 2 of 4 steps, and each leaves the words of the other."""
    if not core.is_joint(patcher):
        pytest.skip("on models with cross-attention they are not isolated")
    plan = replace(composition(core, patcher, tmp_path, "regional"), owners=(0, 1), isolate=APART_JOINT)
    plan = replace(plan, kept=words(core).flip(1), tokens=core.TOKENS)
    assert compared(core, patcher, plan, core.text(2), steps=4, **options) < 1e-5


@pytest.mark.parametrize(
    "options", [{"cfg": 1.0, "grid": (13, 17)}, {"batch": 2, "tokens": 36}, {"tokens": 23}], ids=str
)
def test_texts_of_regions_in_other_batches(core: ModuleType, patcher: Any, tmp_path: Path, options: dict) -> None:
    """A negative text of 36 tokens is in one pass with ours on UNets, one of 23 nowhere."""
    plan = texts_of_regions(core, patcher, tmp_path, isolate=False)
    negative = core.text(2, options.get("tokens", 24))
    options = {name: value for name, value in options.items() if name != "tokens"}
    assert compared(core, patcher, plan, negative, **options) < 1e-5


def drafting(core: ModuleType, patcher: Any, folder: Path, *, own_texts: bool = False) -> ComposedConcepts:
    plan = composition(core, patcher, folder, "merge")
    plain = torch.zeros(core.TOKENS, 2)
    plain[1, 0] = plain[4, 1] = plain[5, 1] = 1
    subjects = {0: Concept(name="a", class_word="cat"), 1: Concept(name="b", class_word="dog")}
    draft = DraftSteps(core.text(6), plain / plain.sum(dim=0), subjects, own_texts)
    options: dict[str, Any] = {"text_of_others": False, "image_of_others": False, "draft": draft, "owners": (0, 1)}
    isolate = APART_JOINT if core.is_joint(patcher) else float(own_texts)
    if own_texts:
        own, texts = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [core.text(10 + n) for n in range(3)]
        return replace(plan, words=own, texts=texts, isolate=isolate, **options)
    kept = words(core).flip(1) if core.is_joint(patcher) else None
    return replace(plan, phrases=words(core), kept=kept, isolate=isolate, **options)


@pytest.mark.parametrize(
    "options",
    [{"batch": 2}, {"cfg": 1.0, "grid": (13, 17)}, {"negative": 12, "sampler": "euler_ancestral"}, {"own_texts": True}],
    ids=str,
)
def test_a_draft_finds_the_regions_and_the_sampler_starts_again(
    core: ModuleType, patcher: Any, tmp_path: Path, options: dict
) -> None:
    """The draft takes 2 of 9 steps; where text and image are one sequence, regions are isolated in the first 3."""
    options, own = {**options, "steps": 9}, options.get("own_texts", False)
    plan = drafting(core, patcher, tmp_path, own_texts=own)
    options.pop("own_texts", None)
    if own and core.is_joint(patcher):  # on others, texts of regions are for one image
        options["batch"] = 2
    negative = core.text(2, options.pop("negative", core.TOKENS))
    assert plan.draft is not None
    maps = core.maps_of_draft(patcher, plan.draft.conditioning, negative, plan.draft.words, last=2, **options)
    free, divide = [torch.zeros(options.get("grid", core.GRID))] * 2, strips if own else nearest
    images = [divided(one, [*plan.draft.subjects.values()], free, divide, 0.3) for one in maps]
    assert all(mask.any() for image in images for mask in image)
    assert compared(core, patcher, plan, negative, images=images, **options) < OF_DRAFTS


def test_a_draft_alone_finds_what_the_sampling_would(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    """The preview runs 2 of 9 steps, and leaves the sampling after it as it was."""
    from lora_compose.compose.comfyui.hooks import compose, draft_alone, marked

    plan, negative = drafting(core, patcher, tmp_path), core.text(2)
    positive, passes = marked(core.text(1), plan), 0

    def counted(apply: Any, given: Any) -> Tensor:
        nonlocal passes
        passes += given["cond_or_uncond"].count(0)
        return apply(given["input"], given["timestep"], **given["c"])

    watched = patcher.clone()
    watched.set_model_unet_function_wrapper(counted)
    model = compose(watched, plan)
    wanted = core.drawn(model, positive, negative, steps=9, batch=2)
    assert passes == 11
    found = draft_alone(model, lambda: core.drawn(model, positive, negative, steps=9, batch=2))
    assert passes == 13
    with pytest.raises(ValueError, match="there are no steps to draft"):
        draft_alone(model, lambda: None)
    images = [[*image] for image in found.cells]
    assert all(mask.any() for image in images for mask in image)
    assert compared(core, patcher, plan, negative, images=images, steps=9, batch=2) < OF_DRAFTS
    assert torch.equal(core.drawn(model, positive, negative, steps=9, batch=2), wanted)
    assert left(patcher) == 0


def test_a_subject_without_a_lora_has_a_part_of_a_draft(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    """The LoRA of the other one keeps off it."""
    plan, negative = drafting(core, patcher, tmp_path), core.text(2)
    assert plan.draft is not None
    bystander = Concept(name="dog", class_word="dog", role="bystander", weight=0.0)
    draft = replace(plan.draft, subjects={**plan.draft.subjects, 1: bystander})
    weights = [plan.weights[0], WeightSchedule.of(0.0)]
    plan = replace(plan, loras=[plan.loras[0], {}], weights=weights, draft=draft)
    maps = core.maps_of_draft(patcher, draft.conditioning, negative, draft.words, last=2, steps=9)
    free = [torch.zeros(core.GRID)] * 2
    images = [divided(one, [*draft.subjects.values()], free, nearest, 0.3) for one in maps]
    assert all(mask.any() for image in images for mask in image)
    assert compared(core, patcher, plan, negative, images=images, steps=9) < OF_DRAFTS


def test_the_small_world_is_that_of_diffusers(core: ModuleType) -> None:
    """A UNet in core's class, whose normalisations get its number of groups."""
    from diffusers import UNet2DConditionModel

    import comfy_small_world

    theirs: Any = UNet2DConditionModel.from_pretrained(comfy_small_world.WORLD / "unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 16, 24, 24), torch.tensor([900.0, 20.0]), torch.randn(2, 32, 192)
    with torch.no_grad():
        wanted = theirs(x, t, text).sample
        found = comfy_small_world.patcher().model.diffusion_model(x, t, context=text)
    assert (found - wanted).abs().max() < 1e-5


def test_a_model_without_a_draft_has_none_to_show(core: ModuleType, models: dict[str, Any], tmp_path: Path) -> None:
    from lora_compose.compose.comfyui.hooks import compose, draft_alone

    patcher = models["sd"]
    for model in (patcher, compose(patcher, composition(core, patcher, tmp_path, "regional"))):
        with pytest.raises(ValueError, match="nothing is drafted with this model; connect that of Compose"):
            draft_alone(model, lambda: None)


@pytest.mark.parametrize("options", [{"cfg": 1.0}, {"batch": 2, "sampler": "dpmpp_2m"}, {"grid": (13, 17)}], ids=str)
def test_samplers_batches_and_odd_sizes(core: ModuleType, patcher: Any, tmp_path: Path, options: dict) -> None:
    plan = composition(core, patcher, tmp_path, "words in regions")
    assert compared(core, patcher, plan, core.text(2), **options) < 1e-5


def loaded(core: ModuleType, patcher: Any, how: str) -> Any:
    import comfy.sd  # pyright: ignore[reportMissingImports]

    third = core.tensors_of(patcher, 9)
    if not hasattr(comfy.sd, how):
        pytest.skip(f"this version of ComfyUI has no {how}")
    return getattr(comfy.sd, how)(patcher, None, third, 0.5, 0)[0]


LOADERS = ("load_lora_for_models", "load_bypass_lora_for_models")


@pytest.mark.parametrize("loader", LOADERS)
def test_beside_loras_of_comfyui_loaded_before(core: ModuleType, patcher: Any, tmp_path: Path, loader: str) -> None:
    plan = composition(core, patcher, tmp_path, "words in regions")
    assert compared(core, patcher, plan, core.text(2), before=lambda p: loaded(core, p, loader)) < 1e-5
    assert left(patcher) == 0 or loader == LOADERS[1]


@pytest.mark.parametrize("loader", LOADERS)
def test_beside_loras_of_comfyui_loaded_after(core: ModuleType, patcher: Any, tmp_path: Path, loader: str) -> None:
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan = composition(core, patcher, tmp_path, "words in regions")
    positive, negative = core.text(1), core.text(2)
    base = core.drawn(patcher, positive, negative)
    found = core.drawn(loaded(core, compose(patcher, plan), loader), marked(positive, plan), negative)
    reference = core.Reference(loaded(core, patcher, loader), plan, positive, [masks(core)[0], None])
    wanted = reference.draw(positive, negative)
    assert (found - wanted).abs().max() < 1e-5 * (wanted - base).abs().max()
    assert torch.equal(base, core.drawn(patcher, positive, negative))


@pytest.mark.parametrize("bypass", [False, True])
def test_beside_a_lora_hook_that_changes_weights_in_the_middle(
    core: ModuleType, patcher: Any, tmp_path: Path, bypass: bool
) -> None:
    """ComfyUI takes a bypass LoRA out for each such change, in the order in which LoRAs came, and puts it in again."""
    import comfy.hooks  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.hooks import compose, marked

    plan = composition(core, patcher, tmp_path, "words in regions")
    positive, negative = core.text(1), core.text(2)
    plain = core.drawn(patcher, positive, negative)
    before = loaded(core, patcher, LOADERS[1]) if bypass else patcher
    hooked, _, group = comfy.hooks.load_hook_lora_for_models(before, None, core.tensors_of(patcher, 8), 0.5, 0)

    def with_hook(conditioning: list) -> list:
        return comfy.hooks.set_hooks_for_conditioning(conditioning, group)

    base = core.drawn(hooked, with_hook(positive), negative)
    found = core.drawn(compose(hooked, plan), with_hook(marked(positive, plan)), negative)
    wanted = core.Reference(hooked, plan, positive, [masks(core)[0], None]).draw(with_hook(positive), negative)
    assert (found - wanted).abs().max() < 1e-5 * (wanted - base).abs().max()
    assert torch.equal(plain, core.drawn(patcher, positive, negative))
    assert left(patcher) == 0


@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_a_conditioning_without_concepts_stays_that_of_the_base_model(
    core: ModuleType, patcher: Any, tmp_path: Path, order: str
) -> None:
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan = composition(core, patcher, tmp_path, "words in regions")
    positive, other, negative = core.text(1), core.text(5), core.text(2)

    def ordered(mine: list) -> list:
        return mine + other if order == "ours first" else other + mine

    found = core.drawn(compose(patcher, plan), ordered(marked(positive, plan)), negative)
    wanted = core.Reference(patcher, plan, positive, [masks(core)[0], None]).draw(ordered(positive), negative)
    base = core.drawn(patcher, ordered(positive), negative)
    assert (found - wanted).abs().max() < 1e-5 * (wanted - base).abs().max()


def test_a_guider_that_counts_its_conditionings_otherwise(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    """In `cond_or_uncond` of DualCFGGuider, 0 is the negative one."""
    import comfy.samplers  # pyright: ignore[reportMissingImports]
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.hooks import compose, marked

    plan = composition(core, patcher, tmp_path, "words in regions")
    positive, middle, negative = core.text(1), core.text(5), core.text(2)

    def dual(model: Any, mine: list) -> Tensor:
        guider = Guider_DualCFG(model)
        guider.set_conds(mine, middle, negative)
        guider.set_cfg(4.0, 2.0)
        latents = core.empty(model)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
        with torch.inference_mode():
            euler = comfy.samplers.sampler_object("euler")
            return guider.sample(noise, latents, euler, sigmas, disable_pbar=True, seed=7)

    found, base = dual(compose(patcher, plan), marked(positive, plan)), dual(patcher, positive)
    reference = core.Reference(patcher, plan, positive, [masks(core)[0], None])
    reference.steps = 3
    with reference.hooked() as hooked:
        wanted = dual(hooked, positive)
    assert (found - wanted).abs().max() < 1e-5 * (wanted - base).abs().max()


@pytest.mark.parametrize("tokens", [12, 24])
def test_texts_of_other_lengths(core: ModuleType, patcher: Any, tmp_path: Path, tokens: int) -> None:
    """On UNets ComfyUI repeats texts to one length; on Flux it runs them in passes of their own."""
    plan = composition(core, patcher, tmp_path, "words in regions")
    assert compared(core, patcher, plan, core.text(2, tokens)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_weights_that_are_stored_in_less(core: ModuleType, tmp_path: Path, dtype: torch.dtype) -> None:
    for make in core.FAMILIES.values():
        patcher = make(dtype, torch.float32)
        plan = composition(core, patcher, tmp_path, "words in regions")
        assert compared(core, patcher, plan, core.text(2)) < 1e-5


@pytest.mark.parametrize("family", ["flux", "z_image", "krea2"])
def test_layers_that_are_quantised_by_comfyui(core: ModuleType, tmp_path: Path, family: str) -> None:
    """They are no `Linear` of PyTorch; on the CPU they are dequantised for each product."""
    import comfy.ops  # pyright: ignore[reportMissingImports]

    if family not in core.FAMILIES or not hasattr(comfy.ops, "mixed_precision_ops"):
        pytest.skip("this version of ComfyUI has no such layers")
    patcher = core.quantised(family)
    assert not any(type(layer) is torch.nn.Linear for layer in patcher.model.modules())
    plan = composition(core, patcher, tmp_path, "words in regions")
    assert compared(core, patcher, plan, core.text(2)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_like_those_of_comfyui_gguf(core: ModuleType, tmp_path: Path, family: str) -> None:
    """Weights are bytes with the shape of a weight, which are dequantised for each product."""
    if family not in core.FAMILIES:
        pytest.skip(f"this version of ComfyUI has no {family}")
    patcher = core.packed(family)
    assert sum(type(layer) is core.PackedLinear for layer in patcher.model.modules()) > 4
    for method in ("regional", "words in regions"):
        plan = composition(core, patcher, tmp_path, method)
        assert compared(core, patcher, plan, core.text(2)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_brought_in_for_each_layer(
    core: ModuleType, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --novram: LoRAs of ComfyUI are then added in each pass."""
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]
    import comfy.model_patcher  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.memory import MovableFactors

    if family not in core.FAMILIES:
        pytest.skip(f"this version of ComfyUI has no {family}")
    patcher = core.FAMILIES[family]()  # one that is loaded already stays as it is
    monkeypatch.setattr(management, "is_device_cpu", lambda _: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    plan, sizes = composition(core, patcher, tmp_path, "words in regions"), []
    load = comfy.model_patcher.ModelPatcher.partially_load

    def watch(self: Any, *arguments: Any, **options: Any) -> Any:
        out = load(self, *arguments, **options)
        if isinstance(self.model, MovableFactors):
            sizes.append(self.loaded_size())
        return out

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", watch)
    assert compared(core, patcher, plan, core.text(2), before=lambda p: loaded(core, p, LOADERS[0])) < 1e-5
    assert sizes == [0], "nor are ours loaded"
    assert any(getattr(module, "comfy_cast_weights", False) for module in patcher.model.modules())


def test_factors_are_counted_moved_and_evicted_by_comfyui(
    core: ModuleType, models: dict[str, Any], tmp_path: Path
) -> None:
    """Beside the model; one that is loaded by halves has factors that stay where they are, and are brought in."""
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.hooks import KEY, compose, marked

    patcher = models["sd"]
    plan, positive, negative = composition(core, patcher, tmp_path, "regional"), core.text(1), core.text(2)
    host = compose(patcher, plan)
    (counted,) = host.get_additional_models_with_key(KEY)
    assert counted.model_size() == sum(t.nbytes for lora in plan.loras for one in lora.values() for t in one.tensors)
    assert counted.loaded_size() == 0
    first = core.drawn(host, marked(positive, plan), negative)
    assert counted.loaded_size() == counted.model_size() == counted.model.bank.bytes
    assert counted in [loaded.model for loaded in management.current_loaded_models]
    bank = counted.model.bank
    management.unload_all_models()
    assert counted.loaded_size() == 0
    assert torch.equal(first, core.drawn(host.clone(), marked(positive, plan), negative))
    assert counted.model.bank is bank, "it is made once"
    management.unload_all_models()
    counted.partially_load(torch.device("meta"), 1e32)
    assert {tensor.device.type for layer in bank.layers.values() for tensor in layer.tensors} == {"meta"}
    assert {weight.device.type for weight in patcher.model.parameters()} == {"cpu"}


def test_one_conditioning_a_pass_where_memory_is_short(
    core: ModuleType, patcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(patcher.model), "memory_required", lambda *_, **__: 1e30)
    plan = composition(core, patcher, tmp_path, "words in regions")
    assert compared(core, patcher, plan, core.text(2)) < 1e-5


def test_nothing_is_left_and_keys_stay(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan = composition(core, patcher, tmp_path, "regional")
    before = {key: weight.clone() for key, weight in patcher.model.state_dict().items()}
    inside = []

    def watch(run: Any, *arguments: Any, **options: Any) -> Tensor:
        inside.append(list(patcher.model.state_dict()))
        return run(*arguments, **options)

    host = compose(patcher, plan)
    host.add_wrapper_with_key("apply_model", "watch", watch)
    core.drawn(host, marked(core.text(1), plan), core.text(2))
    assert inside[0] == list(before) == list(patcher.model.state_dict())
    assert all(torch.equal(weight, before[key]) for key, weight in patcher.model.state_dict().items())
    assert left(patcher) == 0


def test_the_base_model_is_as_before_after_an_exception(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan = composition(core, patcher, tmp_path, "regional")
    positive, negative, passes = core.text(1), core.text(2), []
    base = core.drawn(patcher, positive, negative)

    def fail(run: Any, *arguments: Any, **options: Any) -> Tensor:
        passes.append(left(patcher))
        if len(passes) == 2:
            raise InterruptedError
        return run(*arguments, **options)

    host = compose(patcher, plan)
    good = core.drawn(host, marked(positive, plan), negative)
    failing = host.clone()
    failing.add_wrapper_with_key("apply_model", "fail", fail)
    with pytest.raises(InterruptedError):
        core.drawn(failing, marked(positive, plan), negative)
    assert min(passes) > 0
    assert left(patcher) == 0
    assert torch.equal(base, core.drawn(patcher, positive, negative))
    assert torch.equal(good, core.drawn(host, marked(positive, plan), negative))


def test_compiled_and_not_in_turn(core: ModuleType, models: dict[str, Any], tmp_path: Path) -> None:
    """As the node TorchCompileModel does it: a graph without LoRAs is not used with them, nor the other way round."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.hooks import compose, marked

    patcher = models["flux"]

    def compiled(model: Any) -> Any:
        model = model.clone()
        set_torch_compile_wrapper(
            model=model,
            backend="eager",
            options={"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]},
        )
        return model

    plan = composition(core, patcher, tmp_path, "words in regions")
    positive, negative = core.text(1), core.text(2)
    base, mine = core.drawn(patcher, positive, negative), marked(positive, plan)
    wanted = core.drawn(compose(patcher, plan), mine, negative)
    plain, ours = compiled(patcher), compiled(compose(patcher, plan))
    effect = (wanted - base).abs().max()
    for model, given, expected in ((plain, positive, base), (ours, mine, wanted), (plain, positive, base)):
        assert (core.drawn(model, given, negative) - expected).abs().max() < 1e-5 * effect


def test_names_of_diffusers_and_parts_of_fused_layers(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    """Against LoraLoader; on Flux, queries and values are parts of one layer, and keys have no LoRA."""
    import comfy.lora  # pyright: ignore[reportMissingImports]
    import comfy.sd  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.hooks import compose, marked

    if hasattr(patcher.model.diffusion_model, "llm_adapter"):
        pytest.skip("ComfyUI knows no names of diffusers for Anima")
    keys, weights = comfy.lora.model_lora_keys_unet(patcher.model, {}), patcher.model.state_dict()
    start = "transformer." if any(key.startswith("transformer.") for key in keys) else "unet."
    torch.manual_seed(3)
    tensors, once = {}, {str(target): name for name, target in keys.items() if name.startswith(start)}
    for name in once.values():
        key, window = (keys[name], None) if isinstance(keys[name], str) else keys[name][:2]
        weight = weights.get(key)
        if weight is not None and weight.dim() > 1 and not name.endswith(("to_k", "proj_mlp", "to_qkv_mlp_proj")):
            outputs = weight.shape[0] if window is None else window[2]
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, *weight.shape[1:]) * weight[0].numel() ** -0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, *[1] * (weight.dim() - 2)) * 0.3
    assert len(tensors) > 40
    lora = core.read(patcher, tensors, tmp_path)
    plan = ComposedConcepts([lora], [WeightSchedule.of(1.0)], [None], torch.ones(1, 1), True, True)
    positive, negative = core.text(1), core.text(2)
    base = core.drawn(patcher, positive, negative)
    found = core.drawn(compose(patcher, plan), marked(positive, plan), negative)
    merged = comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0)[0]
    wanted = core.drawn(merged, positive, negative)
    assert (found - wanted).abs().max() < 1e-5 * (wanted - base).abs().max()


class Text:
    """ComfyUI's own tokenizer of CLIP; encoding is what a tiny model of its own would need in full size."""

    def __init__(self, width: int) -> None:
        from comfy.sd1_clip import SD1Tokenizer  # pyright: ignore[reportMissingImports]

        self.tokenizer, self.width = SD1Tokenizer(), width

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens: Any) -> list[list[Any]]:
        numbers = torch.tensor([token for part in tokens["l"] for token, _ in part])
        table = torch.randn(49408, self.width, generator=torch.Generator().manual_seed(1))
        return [[table[numbers][None], {"pooled_output": torch.zeros(1, 8)}]]


def test_words_are_found_where_the_conditioning_has_them(core: ModuleType) -> None:
    from lora_compose.compose.comfyui.tokens import find_tokens

    clip = Text(core.WIDTH)
    text = f"a (sks cat:1.3) beside a zwx dog, {'a very long ' * 30} and a <v1> tree"
    numbers = [token for part in clip.tokenize(text)["l"] for token, _ in part]
    assert len(numbers) == 154
    for words in ("sks", "sks cat", "zwx dog", "<v1>"):
        positions = find_tokens(clip, text, words, len(numbers))
        assert clip.tokenizer.clip_l.tokenizer.decode([numbers[i] for i in positions]).replace(
            " ", ""
        ) == words.replace(" ", "")
    with pytest.raises(ValueError, match="not in the text"):
        find_tokens(clip, text, "ca", len(numbers))


def test_words_are_found_in_a_chat_template(core: ModuleType) -> None:
    flux = pytest.importorskip("comfy.text_encoders.flux")
    if not hasattr(flux, "KleinTokenizer"):
        pytest.skip("this version of ComfyUI has no FLUX.2-klein")
    from lora_compose.compose.comfyui.tokens import find_tokens

    clip = Text(core.WIDTH)
    clip.tokenizer = flux.KleinTokenizer()
    text = "a sks cat beside a zwx dog"
    numbers = [token for part in clip.tokenize(text)["qwen3_4b"] for token, _ in part]
    assert len(numbers) == 512, "with padding"
    for words in ("sks", "sks cat", "zwx dog"):
        positions = find_tokens(clip, text, words, len(numbers))
        assert clip.tokenizer.qwen3_4b.tokenizer.decode([numbers[i] for i in positions]) == f" {words}"


def test_words_are_found_behind_a_template_that_is_cut_off_and_has_them_too(core: ModuleType) -> None:
    """In front of the text of Krea 2 there are "color" and "objects"."""
    krea2 = pytest.importorskip("comfy.text_encoders.krea2")
    from lora_compose.compose.comfyui.tokens import find_tokens

    clip = Text(core.WIDTH)
    clip.tokenizer = krea2.Krea2Tokenizer()
    every = clip.tokenize("the color of two objects")["qwen3vl_4b"][0]
    start = max(i for i, (token, *_) in enumerate(every) if token == 872) + 2  # "user" and a line break
    decode = clip.tokenizer.qwen3vl_4b.tokenizer.decode
    for words in ("color", "two objects"):
        positions = find_tokens(clip, "the color of two objects", words, len(every) - start)
        assert decode([every[start + i][0] for i in positions]) == f" {words}"


def test_the_nodes_run_from_files_to_an_image(
    core: ModuleType, models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    import folder_paths  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file

    from lora_compose.compose.comfyui.entry import comfy_entrypoint
    from lora_compose.compose.comfyui.nodes import BoxesNode, ComposeNode, ConceptNode
    from lora_compose.compose.comfyui.words import NO_LORA

    patcher, clip = models["sd"], Text(core.WIDTH)
    for seed, name in ((1, "one"), (2, "two")):
        save_file(core.tensors_of(patcher, seed), tmp_path / f"{name}.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # what is read here is gone afterwards
    nodes = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    ids = [node.GET_SCHEMA().node_id for node in nodes]
    assert ids[:3] == ["LoraComposeConcept", "LoraComposeBoxes", "LoraComposeCompose"]
    assert ConceptNode.define_schema().inputs[0].options == [NO_LORA, "one.safetensors", "two.safetensors"]
    cat = {"trigger": "sks", "class_word": "cat", "weight": 1.0, "box": ""}
    dog = {"trigger": "zwx", "class_word": "dog", "weight": 0.8, "box": "", "prompt": "", "mask": None}
    one = ConceptNode.execute("one.safetensors", **cat).args[0]
    both = ConceptNode.execute("two.safetensors", one, **dog).args[0]
    placed, shown = BoxesNode.execute(both, "0,0,0.5,1\n0.4,0.2,1,1").args
    assert shown.shape == (2, 256, 256)
    text, negative = "a sks cat beside a zwx dog", clip.encode_from_tokens_scheduled(clip.tokenize("blurry"))
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    base, found = core.drawn(patcher, plain, negative), {}
    ways = {"regional": placed, "regions": placed, "draft": both, "auto": both, "tara": both, "merge": both}
    for method, concepts in ways.items():
        given = ("regional", method) if method == "regions" else (method,)
        model, positive, masks = ComposeNode.execute(patcher, clip, concepts, text, *given).args
        assert torch.equal(masks, shown) == (concepts is placed)
        found[method] = core.drawn(model, positive, negative)
        assert (found[method] - base).abs().max() > 0.01
    assert all((found["merge"] - found[method]).abs().max() > 0.01 for method in ways if method != "merge")
    assert (found["regional"] - found["regions"]).abs().max() > 0.01
    assert torch.equal(found["auto"], found["draft"])
    beside = ConceptNode.execute(NO_LORA, one, **{**cat, "trigger": "", "class_word": "dog"}).args[0]
    for method in ("draft", "merge"):
        model, positive, _ = ComposeNode.execute(patcher, clip, beside, "a sks cat beside a dog", method).args
        found[method] = core.drawn(model, positive, negative)
    alone, positive, _ = ComposeNode.execute(patcher, clip, one, "a sks cat beside a dog", "merge").args
    alone = core.drawn(alone, positive, negative)
    assert (found["merge"] - alone).abs().max() < 1e-5 * (alone - base).abs().max()
    assert (found["draft"] - alone).abs().max() > 0.01
    assert torch.equal(base, core.drawn(patcher, plain, negative))
    with pytest.raises(ValueError, match="give at least one a box"):
        ComposeNode.execute(patcher, clip, both, text, "regional")
    with pytest.raises(ValueError, match="not in the text; write them where the concept is meant: 'sks cat'"):
        ComposeNode.execute(patcher, clip, both, "a cat", "tara")


def test_areas_of_conditionings_are_refused_beside_regions(core: ModuleType, patcher: Any, tmp_path: Path) -> None:
    """The grid of a part does not say where it lies."""
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan = composition(core, patcher, tmp_path, "regional")
    ((text, options),) = marked(core.text(1), plan)
    with pytest.raises(ValueError, match="area of its own"):
        core.drawn(compose(patcher, plan), [[text, {**options, "area": (6, 8, 0, 0)}]], core.text(2))
    assert left(patcher) == 0


def test_nodes_that_replace_attention_are_refused_beside_a_draft(
    core: ModuleType, models: dict[str, Any], tmp_path: Path
) -> None:
    from lora_compose.compose.comfyui.hooks import compose, marked

    patcher = models["sd"]
    plan, positive = drafting(core, patcher, tmp_path), core.text(1)
    host = compose(patcher, plan)
    host.set_model_attn2_replace(lambda n, k, v, options: n, "middle", 0)
    with pytest.raises(ValueError, match="another node replaces attention"):
        core.drawn(host, marked(positive, plan), core.text(2))
    plan = drafting(core, patcher, tmp_path, own_texts=True)
    with pytest.raises(ValueError, match="set batch_size to 1"):
        core.drawn(compose(patcher, plan), marked(positive, plan), core.text(2), batch=2)
    assert left(patcher) == 0


@pytest.mark.parametrize("own_texts", [False, True])
def test_another_override_of_attention_is_called_by_ours(
    core: ModuleType, patcher: Any, tmp_path: Path, own_texts: bool
) -> None:
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan, calls = drafting(core, patcher, tmp_path, own_texts=own_texts), 0
    positive, negative = marked(core.text(1), plan), core.text(2)

    def override(function: Any, *arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return function(*arguments, **options)

    host = compose(patcher, plan)
    wanted = core.drawn(host, positive, negative)
    host = host.clone()
    host.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(core.drawn(host, positive, negative), wanted)
    assert calls > (1 if core.is_joint(patcher) and not own_texts else 10)  # a bias is left to PyTorch


def answer(output: Any) -> Any:
    """The first output of a node, which is a tuple or has one."""
    return getattr(output, "args", output)[0]


def tiled(patcher: Any) -> Any:
    from comfy_extras.nodes_hypertile import HyperTile  # pyright: ignore[reportMissingImports]

    return answer(HyperTile.execute(patcher, 32, 1, 0, False))  # in 12 tiles of 4 x 4 cells


def shrunk(patcher: Any, block: int) -> Any:
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale  # pyright: ignore[reportMissingImports]

    return answer(PatchModelAddDownscale.execute(patcher, block, 2.0, 0.0, 1.0, True, "bilinear", "bilinear"))


CELLS = {"tiles": tiled, "before a convolution": partial(shrunk, block=1), "before a norm": partial(shrunk, block=2)}


@pytest.mark.parametrize("change", CELLS.values(), ids=CELLS)
def test_nodes_that_change_the_cells_go_with_loras_everywhere_alone(
    core: ModuleType, models: dict[str, Any], tmp_path: Path, change: Any
) -> None:
    """Against LoraLoader; with regions, the node is named in the error."""
    import comfy.sd  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.hooks import compose, marked

    patcher, tensors = models["sd"], core.tensors_of(models["sd"], 1)
    positive, negative = core.text(1), core.text(2)
    lora = core.read(patcher, tensors, tmp_path)
    plan = ComposedConcepts([lora], [WeightSchedule.of(1.0)], [None], torch.ones(1, 1), True, True)
    base = core.drawn(change(patcher), positive, negative)
    assert (base - core.drawn(patcher, positive, negative)).abs().max() > 0.001
    found = core.drawn(change(compose(patcher, plan)), marked(positive, plan), negative)
    loaded = comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0)[0]
    wanted = core.drawn(change(loaded), positive, negative)
    assert (found - wanted).abs().max() < 1e-5 * (wanted - base).abs().max()
    plan = composition(core, patcher, tmp_path, "tara")
    found = core.drawn(change(compose(patcher, plan)), marked(positive, plan), negative)
    assert (found - base).abs().max() > 0.01
    plan = composition(core, patcher, tmp_path, "regional")
    with pytest.raises(ValueError, match="as HyperTile and PatchModelAddDownscale do: take it out, or use merge or"):
        core.drawn(change(compose(patcher, plan)), marked(positive, plan), negative)
    assert left(patcher) == 0


def patched(patcher: Any) -> Any:
    """As nodes like FreeU do it."""
    patcher = patcher.clone()
    patcher.set_model_output_block_patch(lambda h, skip, options: (h * 1.1, skip))
    patcher.set_model_attn1_output_patch(lambda out, options: out * 0.9)
    return patcher


@pytest.mark.parametrize("texts", [False, True])
def test_beside_patches_of_attention_and_blocks(
    core: ModuleType, models: dict[str, Any], tmp_path: Path, texts: bool
) -> None:
    patcher = models["sd"]
    plan = (
        texts_of_regions(core, patcher, tmp_path, isolate=False)
        if texts
        else composition(core, patcher, tmp_path, "regional")
    )
    assert compared(core, patcher, plan, core.text(2), before=patched) < 1e-5
    assert left(patcher) == 0


def test_beside_a_controlnet(core: ModuleType, models: dict[str, Any], tmp_path: Path) -> None:
    """On the positive conditioning, as a ControlNet gives it to the middle block."""
    import comfy.controlnet  # pyright: ignore[reportMissingImports]

    from lora_compose.compose.comfyui.hooks import compose, marked

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x: Tensor, *_: Any) -> dict[str, list[Tensor]]:
            return {"input": [], "middle": [torch.full((len(x), 64, 6, 8), 0.5)], "output": []}

        def copy(self) -> Any:
            return self

    def controlled(conditioning: list[list[Any]]) -> list[list[Any]]:
        more = {"control": Control(), "control_apply_to_uncond": False}
        return [[text, {**options, **more}] for text, options in conditioning]

    patcher, positive, negative = models["sd"], core.text(1), core.text(2)
    plan = composition(core, patcher, tmp_path, "regional")
    base = core.drawn(patcher, positive, negative)
    assert (core.drawn(patcher, controlled(positive), negative) - base).abs().max() > 0.01
    found = core.drawn(compose(patcher, plan), controlled(marked(positive, plan)), negative)
    wanted = core.Reference(patcher, plan, positive, plan.regions).draw(controlled(positive), negative)
    assert (found - wanted).abs().max() < 1e-5 * (wanted - base).abs().max()
    assert left(patcher) == 0


def test_a_clone_with_another_copy_of_the_model(
    core: ModuleType, models: dict[str, Any], patcher: Any, tmp_path: Path
) -> None:
    """Concepts act in the one that is sampled, whatever the model was when the node ran."""
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan, negative = composition(core, patcher, tmp_path, "regional"), core.text(2)
    host, positive = compose(patcher, plan), marked(core.text(1), plan)
    wanted = core.drawn(host, positive, negative)
    other = host.clone()
    (name,) = (name for name, model in models.items() if model is patcher)
    other.model = core.FAMILIES[name]().model  # with the same weights
    assert torch.equal(core.drawn(other, positive, negative), wanted)
    assert left(patcher) == left(other) == 0


@pytest.mark.parametrize("mistake", ["no mark", "another Compose", "two Compose nodes", "another text"])
def test_what_cannot_be_done_is_said(core: ModuleType, patcher: Any, tmp_path: Path, mistake: str) -> None:
    from lora_compose.compose.comfyui.hooks import compose, marked

    plan, other = (composition(core, patcher, tmp_path, "tara") for _ in range(2))
    positive, negative, host = core.text(1), core.text(2), compose(patcher, plan)
    if mistake == "two Compose nodes":
        with pytest.raises(ValueError, match="all concepts as one chain"):
            compose(host, other)
        return
    given, said = {
        "no mark": (positive, "CONDITIONING of the same Compose"),
        "another Compose": (marked(positive, plan) + marked(core.text(4), other), "several Compose nodes"),
        "another text": (marked(core.text(1, 12), plan), "12 tokens"),
    }[mistake]
    with pytest.raises(ValueError, match=said):
        core.drawn(host, given, negative)
    assert left(patcher) == 0
