"""What an image costs, counted without numbers, against PyTorch's own counter, formulas and real calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components import FAMILIES, TINY, TINY_XL, attention_layers, random_lora, sd_unet, sdxl_unet, tiny_pipeline
from lora_compose.attention import grid_at
from lora_compose.attention.backbones.unet import map_level
from lora_compose.compose.benchmark import counting
from lora_compose.compose.benchmark.architectures import ARCHITECTURES, SD15, SDXL, attention_lora, columns, with_lora
from lora_compose.compose.benchmark.counting import Counted, PricingRunner, count, count_run, meta_unet
from lora_compose.compose.benchmark.flops import Operations
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.concepts.loading import Factors
from lora_compose.pipelines.concepts.overload import joint_change
from lora_compose.pipelines.denoising.passes import MapLoss, MapRequest
from lora_compose.pipelines.denoising.process import FixedPasses
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.images.output import Cost
from lora_compose.pipelines.methods import (
    METHODS,
    Clora,
    LoraComposer,
    Merge,
    Regional,
    Settings,
    Switch,
    Tara,
)
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but

UNETS = {"sd": (sd_unet, TINY), "sdxl": (sdxl_unet, TINY_XL)}
ALL_METHODS = [Switch(interval=1) if name == "switch" else kind() for name, kind in METHODS.items()]


def small(family: str) -> UNet2DConditionModel:
    build, changes = UNETS[family]
    return meta_unet(build(**changes).config)


def torch_counter() -> FlopCounterMode:
    """PyTorch's counter, with the one product that it does not know."""

    def addmm_(out: Any, left: Any, right: Any, out_shape: Any = None, **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


class TorchOperations:
    """FLOPs as PyTorch's counter counts them."""

    def __init__(self) -> None:
        self.flops = 0

    def __enter__(self) -> None:
        self._counter = torch_counter()
        self._counter.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)
        self.flops += self._counter.get_total_flops()


class Forgetful(dict):
    """Prices of passes that are never known, so that every pass is run."""

    def __contains__(self, kind: object) -> bool:
        return False


@dataclass(frozen=True)
class EveryPass(PricingRunner):
    """Runs every pass to know what it costs."""

    prices: dict = field(default_factory=Forgetful)


def assert_counts_what_runs(
    monkeypatch: pytest.MonkeyPatch, unet: UNet2DConditionModel, concepts: Sequence[LoadedConcept], settings: Settings,
    *how: Any, **whole: Any,
) -> Counted:  # fmt: skip
    """The same as if every pass is run on the meta device under PyTorch's counter."""
    counted = count(unet, concepts, settings, *how, **whole)
    with monkeypatch.context() as patched:
        patched.setattr(counting, "Operations", TorchOperations)
        patched.setattr(counting, "PricingRunner", EveryPass)
        assert count(unet, concepts, settings, *how, **whole) == counted
    return counted


@pytest.mark.slow
@pytest.mark.parametrize(("family", "guidance_scale"), [("sd", 1.0), ("sdxl", 5.0)])
@pytest.mark.parametrize("settings", ALL_METHODS, ids=lambda settings: type(settings).__name__)
def test_repeated_passes_count_as_if_they_were_run(family, settings, guidance_scale, monkeypatch):
    unet = small(family)
    concepts = with_lora(columns(2, 96, 128), attention_lora(unet))
    counted = assert_counts_what_runs(monkeypatch, unet, concepts, settings, 3, guidance_scale, (128, 96), 2)
    assert counted.flops > 0


@pytest.mark.slow
def test_schedules_of_weights_count_as_if_every_pass_were_run(monkeypatch):
    """Every other weight makes keys and values of the text anew."""
    unet = small("sd")
    boxes = columns(2, 96, 64)
    lora = attention_lora(unet)
    constant = with_lora(boxes, lora)
    scheduled = with_lora([boxes[0].model_copy(update={"weight": "0:1,0.5:0"}), boxes[1]], lora)
    for settings in (Merge(), Regional()):
        counted = assert_counts_what_runs(monkeypatch, unet, scheduled, settings, 2, 5.0, (64, 96))
        assert counted.flops > count(unet, constant, settings, 2, 5.0, (64, 96)).flops


@dataclass(frozen=True)
class Updates(Settings):
    """A method that follows gradients of attention maps in the first steps and records maps in all of them."""

    def start(self, session: Session) -> "Updating":
        regional = Regional().start(session)
        assert isinstance(regional, FixedPasses)
        return Updating(session, regional.turns)


class Updating(FixedPasses):
    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        denoiser, (spec, _) = self.session.denoiser, self.turns[0][0]
        prepared, request = denoiser.prepare(spec), MapRequest(spec.text.conditional().trigger_mask)
        if step.index < 2:
            loss = MapLoss(request, lambda maps: maps.text.sum(dim=(1, 2)))
            found = denoiser.gradient(latents, step, prepared, loss)
            latents = latents - found.direction
        assert denoiser.maps(latents, step, prepared, request).text.shape[-1] == 2
        return super().step(latents, step)


@pytest.mark.slow
def test_methods_of_ones_own_are_counted_with_their_gradients_and_maps(monkeypatch):
    unet = small("sd")
    concepts = with_lora(columns(2, 64, 64), attention_lora(unet))
    counted = assert_counts_what_runs(monkeypatch, unet, concepts, Updates(), 3, 5.0, (64, 64))
    assert (counted.rows_forward, counted.rows_stopped, counted.rows_backward) == (2 * 3, 2 + 3, 2)


def test_a_repeated_operation_gives_the_same_kind_of_tensors():
    def run() -> list[Tensor]:
        x = torch.empty(3, 4, device="meta")
        y = x.t() + 1
        groups = torch.empty(2, 4, 3, 3, device="meta")
        normed = torch.native_group_norm(groups, None, None, 2, 4, 9, 2, 1e-5)
        mixed = torch.cat([x, x.double()])
        return [y, *normed, mixed, x.add_(1), x.t_(), x, x > 0, x.sum(), torch.full((2,), 1, device="meta")]

    expected = [(t.shape, t.stride(), t.dtype, t.device) for t in run()]
    for _ in range(2):
        with Operations():
            assert [(t.shape, t.stride(), t.dtype, t.device) for t in run()] == expected


def test_what_has_numbers_keeps_them():
    with Operations() as operations:
        for number in (1.0, 2.0):
            assert (torch.full((2, 2), number) @ torch.ones(2, 2)).tolist() == [[2 * number] * 2] * 2
    assert operations.flops == 2 * 2 * 2**3


@pytest.mark.slow
def test_an_update_costs_half_a_row_forward_and_half_a_row_backward():
    """The official schedule on Stable Diffusion 1.5: 2T rows, one stopped row before, and one and its way back each."""
    unet = meta_unet(SD15)
    concepts, official = with_lora(columns(2, 512, 512), attention_lora(unet)), LoraComposer.official()

    def counted(**changes: Any) -> Counted:
        return count(unet, concepts, replace(official, **changes), 50, 7.5, (512, 512))

    whole, observed = counted(step_size=0, reinit="off"), counted(step_size=0)
    updated, everything = counted(reinit="off"), counted()
    assert (everything.rows_forward, everything.rows_stopped, everything.rows_backward) == (100, 1 + 26, 26)
    row, stopped = whole.flops / 100, observed.flops - whole.flops
    text = observed.preparation_flops - (updated.flops - whole.flops) / 26  # keys and values are made once, wherever
    assert everything.flops - whole.flops == pytest.approx(updated.flops - whole.flops + stopped, abs=abs(text))
    assert stopped / row == pytest.approx(0.5, abs=0.05)
    assert (updated.flops - whole.flops) / 26 / row == pytest.approx(1.05, abs=0.1)


# The architectures


def test_the_architectures_are_those_of_the_models():
    parameters = {
        name: sum(p.numel() for p in meta_unet(config).parameters()) for name, config in ARCHITECTURES.items()
    }
    assert parameters == {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684}


def test_a_plain_image_of_stable_diffusion():
    unet = meta_unet(SD15)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.empty(2, 4, 64, 64, device="meta"), torch.tensor(1), torch.empty(2, 77, 768, device="meta"))
    counted = count(unet, (), None, 25, 7.5, (512, 512))
    assert counted == Counted(50, 0, 0, 25 * counter.get_total_flops(), 0)
    assert counted.flops / counted.rows_forward == pytest.approx(803e9, rel=1e-3)


@pytest.mark.slow
def test_the_bank_costs_its_two_thin_products_per_layer_and_concept():
    unet = meta_unet(SD15)
    lora = attention_lora(unet)
    levels = {layer.name: layer for layer in attention_layers(unet)}
    image = text = dense = 0
    for name, factors in lora.items():
        layer = levels[name.removesuffix(".0").rpartition(".")[0]]
        height, width = grid_at((64, 96), layer.level)
        ends = factors.down.shape[1] + factors.up.shape[0]
        if layer.cross and name.endswith(("to_k", "to_v")):
            text += 2 * 2 * 77 * 8 * ends
        else:
            image += 2 * 2 * height * width * 8 * ends
        dense += 2 * factors.up.numel() * factors.down.shape[1]

    def counted(settings: Settings, concepts: int) -> Counted:
        return count(unet, with_lora(columns(concepts, 768, 512), lora), settings, 3, 5.0, (512, 768))

    one, four, eight = (counted(Regional(), number) for number in (1, 4, 8))
    assert four.flops - one.flops == 3 * (3 * image + text)
    assert eight.flops - four.flops == 4 * (3 * image + text)
    assert counted(Tara(), 8).flops - counted(Tara(), 4).flops == 4 * text + 4 * _folded(lora)
    assert counted(Merge(), 4).preparation_flops == 4 * dense
    assert {cost.rows_forward for cost in (one, four, eight)} == {6}


def _folded(lora: Any) -> int:
    """FLOPs of folding what is not keys and values of the text."""
    folded = [f for n, f in lora.items() if not n.endswith(("attn2.to_k", "attn2.to_v"))]
    return sum(2 * factors.up.numel() * factors.down.shape[1] for factors in folded)


ROWS = {"merge": 2, "tara": 2, "regional": 2, "switch": 2, "composite": 6}


def real_flops(call: Callable[[], Any]) -> tuple[Cost, int]:
    """What a real call costs, its text encoders left out."""
    with sdpa_kernel(SDPBackend.MATH), torch_counter() as counter:  # the counter overlooks the fused one of CPUs
        cost = call().cost
    by_module = counter.get_flop_counts()
    encoding = sum(sum(flops.values()) for name, flops in by_module.items() if name in TEXT_ENCODERS)
    return cost, counter.get_total_flops() - encoding


TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


@pytest.mark.parametrize(("family", "name"), [
    ("sd", "regional"),
    *(pytest.param("sd", name, marks=pytest.mark.slow) for name in ("merge", "tara", "switch", "composite")),
    *(pytest.param("sdxl", name, marks=pytest.mark.slow) for name in ROWS),
])  # fmt: skip
def test_rows_and_flops_are_those_of_a_real_call(name, family, write_lora):
    pipe, triggers = FAMILIES[family](), ("sks", "zwx", "xlo")
    for seed, trigger in enumerate(triggers):
        pipe.load_concept(write_lora(trigger, unet=random_lora(pipe.unet, seed)), trigger=trigger)
    concepts = [Concept(name=trigger, region=(32 * i, 0, 32 * i + 32, 64)) for i, trigger in enumerate(triggers)]
    settings, loaded = METHODS[name](), pipe.resolve_concepts(concepts)
    joint_change(loaded)  # products of factors, once for each set
    for scheduler, guidance_scale, rows in (
        (pipe.scheduler, 1.0, ROWS[name]),
        (HeunDiscreteScheduler(), 5.0, 3 * ROWS[name]),
    ):
        counted = count_run(pipe, settings, loaded, 2, guidance_scale, 96, 64, scheduler=scheduler)
        pipe.scheduler = scheduler
        cost, flops = real_flops(lambda: pipe(
            " ".join(triggers), height=64, width=96, num_inference_steps=2, guidance_scale=guidance_scale,  # noqa: B023
            concepts=concepts, method=settings, output_type="latent",
        ))  # fmt: skip
        assert counted.rows_forward == cost.rows_forward == rows
        assert counted.rows_backward == cost.rows_backward == 0
        assert counted.flops == flops


# SDXL as it is, without numbers


@pytest.fixture(scope="module")
def xl() -> UNet2DConditionModel:
    return meta_unet(SDXL)


def counted_on_xl(unet: UNet2DConditionModel, settings: Settings | None, concepts: int, steps: int = 4) -> Counted:
    loaded = with_lora(columns(concepts, 1024, 1024), attention_lora(unet)) if concepts else ()
    return count(unet, loaded, settings, steps, 5.0, (1024, 1024))


def kv_flops(unet: UNet2DConditionModel, rows: int) -> int:
    """Of keys and values of the text in one pass: 70 layers, two products of 77 tokens and 2048 channels each."""
    layers: list[Any] = [unet.get_submodule(layer.name) for layer in attention_layers(unet) if layer.cross]
    widths = [layer.to_k.out_features for layer in layers]
    assert (len(widths), set(widths)) == (70, {640, 1280})
    return sum(2 * 2 * rows * 77 * 2048 * width for width in widths)


@pytest.mark.slow
def test_keys_and_values_of_the_text_are_made_once_on_sdxl(xl) -> None:
    plain, merged = counted_on_xl(xl, None, 0), counted_on_xl(xl, Merge(), 2)
    assert merged.flops - merged.preparation_flops == plain.flops - 3 * kv_flops(xl, rows=2)


@pytest.mark.slow
def test_passes_for_maps_stop_early_on_sdxl(xl) -> None:
    """The coarse grid has its last cross-attention in the first of three up blocks, which does without doubling."""
    official = LoraComposer.official()
    observed = counted_on_xl(xl, replace(official, step_size=0), 2)
    without = counted_on_xl(xl, replace(official, step_size=0, reinit="off"), 2)
    assert (observed.rows_stopped, without.rows_stopped) == (1, 0)
    row = counted_on_xl(xl, None, 0).flops / 8
    assert (observed.flops - without.flops) / row == pytest.approx(0.7, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_quadratic_in_the_number_of_concepts_on_sdxl(xl, name) -> None:
    plain, settings = counted_on_xl(xl, None, 0, steps=3).flops, METHODS[name]()
    two, four = (counted_on_xl(xl, settings, number, steps=3).flops / plain for number in (2, 4))
    assert four - 1 <= 3.05 * (two - 1) + 0.02  # a pass for each concept is 3 times as much; 4 would be quadratic
    assert four < {"composite": 4.1, "lora-composer": 2.2, "clora": 4.0, "freefuse": 1.2}.get(name, 1.02)


@pytest.mark.parametrize("name", slow_but(["clora"], ["lora-composer", "clora"]))
def test_methods_with_updates_are_not_quadratic_in_the_number_of_concepts(name) -> None:
    unet, settings = small("sd"), METHODS[name]()
    plain, two, four = (
        count(unet, with_lora(columns(number, 256, 256), attention_lora(unet)), settings, 2, 5.0, (256, 256)).flops
        if number else count(unet, (), None, 2, 5.0, (256, 256)).flops
        for number in (0, 2, 4)
    )  # fmt: skip
    assert four - plain <= 3.05 * (two - plain) + 0.02 * plain


@pytest.mark.slow
def test_clora_costs_a_fraction_of_the_authors_on_stable_diffusion() -> None:
    """With their 50 steps, 25 of them with updates and 20 more at three: 2P (T + r |R|) rows, 2P (K + r |R|) back."""
    unet = meta_unet(SD15)
    official = Clora.official()
    # The same updates in our way: of the prompt's rows alone, no further than the maps, and one pass for all regions.
    same = Clora(refine_at=official.refine_at, refinements=official.refinements)
    concepts, branches = with_lora(columns(2, 512, 512), attention_lora(unet)), 3
    theirs, ours, default = (count(unet, concepts, one, 50, 7.5, (512, 512)) for one in (official, same, Clora()))
    assert theirs.rows_forward == 2 * branches * (50 + 60)
    assert theirs.rows_backward == 2 * branches * (25 + 60)
    assert theirs.rows_stopped == 0
    assert (ours.rows_forward, ours.rows_stopped, ours.rows_backward) == (100, branches * 85, branches * 85)
    assert ours.flops <= 0.40 * theirs.flops
    assert default.flops <= theirs.flops / 3
    assert (default.rows_forward, default.rows_stopped) == (100, branches * 25)


def test_maps_come_from_the_published_number_of_layers() -> None:
    layers = {name: attention_layers(meta_unet(config)) for name, config in ARCHITECTURES.items()}
    numbers = {
        name: sum(layer.cross and layer.level == map_level(layers[name]) for layer in layers[name]) for name in layers
    }
    assert numbers == {"SD 1.5": 5, "SDXL": 60}


@pytest.mark.parametrize(
    "settings",
    [LoraComposer.official(), pytest.param(LoraComposer(apart=1.0, most_updates=0.1), marks=pytest.mark.slow)],
)
def test_updates_and_parts_of_the_canvas_count_as_in_a_real_call(settings, write_lora):
    pipe = tiny_pipeline()
    pipe.load_concept(write_lora("sks", unet=random_lora(pipe.unet, 0)), trigger="sks")
    concept = Concept(name="sks", region=(0, 0, 64, 64))
    counted = count_run(pipe, settings, pipe.resolve_concepts([concept]), 3, 5.0, 128, 64)
    real = pipe("sks", 64, 128, 3, guidance_scale=5.0, concepts=[concept], method=settings, output_type="latent").cost
    assert counted.rows_forward == real.rows_forward
    assert (counted.rows_forward > 6) == (settings.apart > 0)  # a part besides the canvas, or the canvas alone
    updates = 1 + int(settings.most_updates * 3)
    assert 1 <= real.rows_backward <= counted.rows_backward == updates
    assert counted.rows_stopped - counted.rows_backward == (settings.reinit != "off")


def test_counting_a_run_changes_nothing(write_lora):
    pipe = tiny_pipeline()
    pipe.load_concept(write_lora("cat", unet=random_lora(pipe.unet, 0)), trigger="cat")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    processors, timesteps = pipe.unet.attn_processors, pipe.scheduler.timesteps
    loaded = pipe.resolve_concepts(["cat"])
    first = count_run(pipe, Merge(), loaded, 2, 5.0, 128, 128)
    assert count_run(pipe, Merge(), loaded, 2, 5.0, 128, 128) == first
    assert count_run(pipe, Merge(), loaded, 2, 5.0, 128, 64).flops < 0.6 * first.flops
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert pipe.unet.attn_processors == processors
    assert pipe.scheduler.timesteps is timesteps
    assert all(factors.down.device.type == "cpu" for factors in loaded[0].factors.model.values())


def test_a_distilled_model_has_no_uncond_rows():
    unet = meta_unet(sd_unet(**TINY, time_cond_proj_dim=8).config)
    plain = count(unet, (), None, 4, 5.0, (128, 128))
    merged = count(unet, with_lora(columns(1, 128, 128), attention_lora(unet)), Merge(), 4, 5.0, (128, 128))
    assert plain.rows_forward == merged.rows_forward == 4


def test_a_method_that_lacks_something_says_so():
    unet = small("sd")
    nowhere = [LoadedConcept(Concept(name="cat", weight=1.0), Factors(attention_lora(unet)))]
    with pytest.raises(ValueError, match="regional needs to know where"):
        count(unet, nowhere, Regional(), 2, 5.0, (128, 128))
