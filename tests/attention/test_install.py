"""Concepts are in a model inside the `with` block only, and the model is exactly what it was after it."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
)
from peft import LoraConfig
from torch import Tensor, nn

from components import (
    ATTENTION,
    EVERYTHING,
    installed,
    lora_tensors,
    random_lora,
    sd_unet,
    shallow_sdxl_unet,
    tiny_unet,
    unet_inputs,
    with_bank,
)
from lora_compose.attention import (
    Gates,
    How,
    Lora,
    LoraFactors,
    Site,
    SitePart,
    backbone_of,
    frozen,
    installed_layers,
)
from model_snapshot import Snapshot
from pairs import in_pairs, slow_but
from reference import FullGates, constant_gates, random_gates, relative_error, with_reference

CPU = torch.device("cpu")
FP32: dict[str, Any] = {"device": CPU, "dtype": torch.float32}
SIZE = 0.1
PARTS: tuple[SitePart, ...] = ("text", "image", "row")
WEIGHTS = (0.8, -0.5)
GATES = constant_gates(WEIGHTS)[0]
NO_GATES = constant_gates(())[0]


def two_loras(unet: nn.Module, targets: tuple[str, ...] = EVERYTHING) -> list[Lora]:
    return [random_lora(unet, seed, rank=2 + seed, size=SIZE, targets=targets) for seed in (1, 2)]


class Stop(BaseException):
    """As rude as KeyboardInterrupt and SystemExit, and caught by nothing by accident."""


@pytest.mark.parametrize(
    ("error", "how", "fold"),
    [
        (None, "module", False), (ValueError, "module", False), (Stop, "module", True), (Stop, "forward", False),
    ],
)  # fmt: skip
@torch.no_grad()
def test_nothing_is_left_in_the_model(error: type[BaseException] | None, how: How, fold: bool) -> None:
    unet = tiny_unet()
    unet.train()
    unet.conv_in.eval()
    unet.mid_block.requires_grad_(False)
    inputs = unet_inputs(unet)
    expected = unet(**inputs)[0]
    before = Snapshot(unet)

    def use() -> None:
        with installed(unet, two_loras(unet), how=how) as installation:
            if fold:
                assert installation.fold(("image", "row"), WEIGHTS) > 20
            installation.use(installation.inputs(GATES, inputs["encoder_hidden_states"]))
            assert relative_error(unet(**inputs)[0], expected) > 0.1
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    before.assert_unchanged(unet)
    assert torch.equal(unet(**inputs)[0], expected)


class InterruptedAt:
    """Raises KeyboardInterrupt at the nth function call that source files make, where Python delivers Ctrl-C."""

    def __init__(self, suffixes: tuple[str, ...], call: int) -> None:
        self.suffixes, self.call, self.seen = suffixes, call, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        caller = frame.f_back
        if event != "call" or caller is None or "_dynamo" in frame.f_code.co_filename:  # callbacks of weak references
            return
        if caller.f_code.co_filename.endswith(self.suffixes):
            self.seen += 1
            if self.seen == self.call:
                raise KeyboardInterrupt


def small_unet_and_loras() -> tuple[Any, list[Lora]]:
    """A UNet of one block with the adapter "style", and two LoRAs that change some layers of it."""
    unet = sd_unet(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
    )
    add_adapter(unet, "style", ("attn2.to_k", "attn1.to_q"))
    loras = two_loras(unet, ("conv_in", "attn2.to_k.base_layer"))
    return unet, [{name.removesuffix(".base_layer"): found for name, found in lora.items()} for lora in loras]


@pytest.mark.parametrize("how", ["module", "forward"])
@torch.no_grad()
def test_ctrl_c_at_any_time_while_concepts_go_in_leaves_nothing_behind(how: How) -> None:
    unet, loras = small_unet_and_loras()
    before = Snapshot(unet)
    call, done = 1, False
    while not done:
        trace = InterruptedAt(("attention/install.py", "attention/placing.py"), call)
        try:
            sys.setprofile(trace)
            with installed(unet, loras, silence=["style"], how=how) as installation:
                if how == "module":
                    installation.fold(PARTS, WEIGHTS)
                sys.setprofile(None)
        except KeyboardInterrupt:
            assert trace.seen == call
        finally:
            sys.setprofile(None)
        done = trace.seen < call
        before.assert_unchanged(unet)
        call += 1
    assert call > 30, "the loop ended because nothing was left to interrupt"
    with installed(unet, loras):
        pass


class InterruptedAtLine:
    """Raises KeyboardInterrupt at the nth line of our files that runs after `begin`."""

    def __init__(self, line: int) -> None:
        self.line, self.seen = line, 0

    def begin(self) -> None:
        sys.settrace(self)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if "/lora_compose/attention/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("how", ["module", "forward"])
@torch.no_grad()
def test_ctrl_c_at_any_line_while_concepts_go_out_leaves_nothing_behind(how: How) -> None:
    unet, loras = small_unet_and_loras()
    before = Snapshot(unet)
    line, done = 1, False
    while not done:
        trace = InterruptedAtLine(line)
        try:
            with installed(unet, loras, silence=["style"], how=how) as installation:
                if how == "module":
                    installation.fold(("text",), WEIGHTS)
                with frozen(unet), backbone_of(unet).truncated_after(()):
                    trace.begin()
        except KeyboardInterrupt:
            assert trace.seen == line
        finally:
            sys.settrace(None)
        done = trace.seen < line
        before.assert_unchanged(unet)
        line += 1
    assert line > 60, "the loop ended because nothing was left to interrupt"
    with installed(unet, loras):
        pass


@pytest.mark.parametrize("kind", [AttnProcessor, AttnProcessor2_0])
def test_processors_that_the_user_chose_come_back_as_the_same_objects(kind: Callable[[], Any]) -> None:
    unet = sd_unet()
    unet.set_attn_processor({name: kind() for name in unet.attn_processors})
    chosen = unet.attn_processors
    with installed(unet, two_loras(unet)):
        assert not {id(p) for p in unet.attn_processors.values()} & {id(p) for p in chosen.values()}
    assert len(chosen) == 32
    assert list(unet.attn_processors) == list(chosen)
    assert all(found is chosen[name] for name, found in unet.attn_processors.items())


def in_this_thread(work: Callable[[], None]) -> None:
    work()


def in_another_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)


@pytest.mark.parametrize("run", [in_this_thread, in_another_thread])
@torch.no_grad()
def test_a_model_takes_one_installation_at_a_time_and_the_first_keeps_working(run: Callable[..., None]) -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    loras = two_loras(unet)

    def install_more() -> None:
        for second in (installed(unet, loras), installed_layers(unet, [], {}, **FP32)):
            with pytest.raises(RuntimeError, match="another image"), second:
                pass

    before = Snapshot(unet)
    with installed(unet, loras) as installation:
        installation.use(installation.inputs(GATES, inputs["encoder_hidden_states"]))
        expected = unet(**inputs)[0]
        during = Snapshot(unet)
        run(install_more)
        during.assert_unchanged(unet)
        assert torch.equal(unet(**inputs)[0], expected)
    before.assert_unchanged(unet)
    assert torch.equal(with_bank(unet, loras, GATES, inputs), expected)


@torch.no_grad()
def test_two_models_are_independent() -> None:
    first, second = tiny_unet(), tiny_unet()
    inputs = unet_inputs(first)
    base = first(**inputs)[0]
    with installed(first, two_loras(first)) as one, installed(second, two_loras(second)) as two:
        one.use(one.inputs(constant_gates((0.8, 0.0))[0], inputs["encoder_hidden_states"]))
        two.use(two.inputs(constant_gates((0.0, 0.0))[0], inputs["encoder_hidden_states"]))
        assert relative_error(second(**inputs)[0], base) < 1e-6
        assert relative_error(first(**inputs)[0], base) > 0.1


def test_many_threads_never_get_each_others_concepts() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet, grid=(8, 8))
    loras = two_loras(unet)
    weights = [(0.2 * i, 1 - 0.3 * i) for i in range(4)]

    @torch.no_grad()
    def once(weights: tuple[float, ...]) -> Tensor:
        return with_bank(unet, loras, constant_gates(weights, latent_grid=(8, 8))[0], inputs)

    def attempt(weights: tuple[float, ...]) -> Tensor | str:
        try:
            return once(weights)
        except RuntimeError as error:
            return str(error)

    expected = [once(one) for one in weights]
    with ThreadPoolExecutor(len(weights)) as pool:
        results = list(pool.map(attempt, weights * 5))
    images = [(found, expected[i % 4]) for i, found in enumerate(results) if isinstance(found, Tensor)]
    assert images
    assert all(torch.equal(found, wanted) for found, wanted in images)
    assert all("another image" in found for found in results if isinstance(found, str))


def factors(down: tuple[int, ...], up: tuple[int, ...]) -> LoraFactors:
    return LoraFactors(torch.zeros(down), torch.zeros(up))


TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WRONG = {
    "unknown layer": ("down_blocks.9.attn.to_q", factors((2, 8), (8, 2)), "no layer 'down_blocks.9.attn.to_q'"),
    "a layer without weights": ("down_blocks.0.resnets.0.nonlinearity", factors((2, 8), (8, 2)), "SiLU"),
    "a norm": ("down_blocks.0.resnets.0.norm1", factors((2, 8), (8, 2)), "GroupNorm"),
    "inputs": (TO_Q, factors((2, 9), (8, 2)), r"\[2, 9\] and \[8, 2\].*\[rank, 8\] and \[8, rank\]"),
    "outputs": (TO_Q, factors((2, 8), (16, 2)), r"\[2, 8\] and \[16, 2\].*\[rank, 8\] and \[8, rank\]"),
    "rank zero": (TO_Q, factors((0, 8), (8, 0)), r"\[0, 8\] and \[8, 0\]"),
    "a vector": (TO_Q, factors((2, 8), (8,)), r"\[2, 8\] and \[8\]"),
    "a scalar": (TO_Q, factors((), ()), r"\[\] and \[\]"),
    "convolution for a linear layer": (TO_Q, factors((2, 8, 1, 1), (8, 2, 1, 1)), r"\[2, 8, 1, 1\]"),
    "kernel": ("conv_in", factors((2, 4, 1, 1), (8, 2, 1, 1)), r"\[2, 4, 1, 1\].*\[rank, 4, 3, 3\]"),
    "a linear up for a convolution": ("conv_in", factors((2, 4, 3, 3), (8, 2)), r"\[8, 2\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_factors_that_do_not_fit_are_refused_before_anything_changes(wrong: str) -> None:
    unet = tiny_unet()
    name, bad, message = WRONG[wrong]
    before = Snapshot(unet)
    good = two_loras(unet)
    with pytest.raises(ValueError, match=message) as caught, installed(unet, [*good, {name: bad}]):
        pass
    assert name in str(caught.value)
    before.assert_unchanged(unet)
    with installed(unet, good):  # the model was given back
        pass


def test_layers_outside_the_given_sites_are_refused() -> None:
    unet = tiny_unet()
    loras = [random_lora(unet, 1, targets=("attn1.to_q", "attn1.to_k"))]
    where = {name: Site("image") for name in loras[0] if name.endswith("to_q")}
    before = Snapshot(unet)
    with pytest.raises(ValueError, match=r"no layer .*to_k"), installed_layers(unet, loras, where, **FP32):
        pass
    before.assert_unchanged(unet)


def test_grouped_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    lora = {"0": factors((2, 2, 3, 3), (4, 2, 1, 1))}
    with pytest.raises(ValueError, match="grouped"), installed_layers(model, [lora], {"0": Site("image")}, **FP32):
        pass


class OwnProcessor:
    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None):
        return hidden_states


class OwnSubclass(AttnProcessor2_0):
    pass


def one_is(processor: Any) -> Callable[[Any], None]:
    return lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(processor)


UNSUPPORTED: dict[str, Callable[[Any], None]] = {
    "OwnProcessor": one_is(OwnProcessor()),
    "OwnSubclass": one_is(OwnSubclass()),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_processors_that_would_be_lost_are_refused(message: str) -> None:
    unet = tiny_unet()
    UNSUPPORTED[message](unet)
    before = Snapshot(unet)
    with pytest.raises(ValueError, match=message), installed(unet):
        pass
    before.assert_unchanged(unet)


@pytest.mark.parametrize(
    "change",
    [lambda unet: unet.fuse_qkv_projections(), lambda unet: unet.set_attention_slice(1)],
    ids=["fused projections", "slices"],
)
@torch.no_grad()
def test_loras_act_in_attention_that_is_fused_or_in_slices(change: Callable[[Any], None]) -> None:
    unet = tiny_unet()
    loras, inputs = [random_lora(unet, 0)], unet_inputs(unet)
    gates = Gates(torch.ones(1, 1, 1), {level: torch.ones(1, 1, 1) for level in range(4)}, torch.ones(1, 1), (16, 16))
    expected = with_bank(unet, loras, gates, inputs)
    change(unet)
    before, plain = Snapshot(unet), unet(**inputs)[0]
    torch.testing.assert_close(with_bank(unet, loras, gates, inputs), expected, atol=1e-5, rtol=0)
    before.assert_unchanged(unet)
    assert torch.equal(unet(**inputs)[0], plain)
    assert (plain - expected).abs().max() > 1e-3


def test_attention_with_parts_that_would_be_lost_is_refused() -> None:
    unet = sd_unet(down_block_types=("AttnDownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",))
    before = Snapshot(unet)
    with pytest.raises(ValueError, match=r"down_blocks.0.attentions.0 has group_norm"), installed(unet):
        pass
    before.assert_unchanged(unet)


# Folding: deltas added to the weights for as long as the installation lasts.


@pytest.mark.parametrize("family", [tiny_unet, shallow_sdxl_unet])
@torch.no_grad()
def test_folded_layers_equal_the_bank_and_the_slow_sum(family: Callable[[], Any]) -> None:
    unet = family()
    inputs = unet_inputs(unet)
    loras = two_loras(unet)
    gates, full = constant_gates(WEIGHTS)
    expected = with_reference(unet, loras, full)(**inputs)[0]
    with installed(unet, loras) as installation:
        installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
        bank = unet(**inputs)[0]
        layers = len(installation.bank)
        assert installation.fold(PARTS, WEIGHTS) == layers
        assert installation.bank == {}
        installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
        folded = unet(**inputs)[0]
    assert relative_error(bank, expected) < 1e-5
    assert relative_error(folded, expected) < 1e-5
    assert relative_error(unet(**inputs)[0], expected) > 0.1


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_layers_of_one_part_are_folded_and_the_others_stay_gated(part: SitePart) -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    loras = two_loras(unet)
    gates, full = random_gates("everything", rows=2, tokens=7, concepts=2, latent_grid=(16, 16))
    weights = torch.tensor(WEIGHTS)
    constant = {
        "text": {"text": weights.expand(2, 7, 2)},
        "image": {"image": {grid: weights.expand_as(gate) for grid, gate in full.image.items()}},
        "row": {"row": weights.expand(2, 2)},
    }[part]
    unet.mid_block.requires_grad_(False)
    full = FullGates(**{"text": full.text, "image": full.image, "row": full.row, **constant})
    expected = with_reference(unet, loras, full)(**inputs)[0]
    before = Snapshot(unet)
    with installed(unet, loras) as installation:
        folded = {name for name, layer in installation.bank.items() if layer.key.site.parts == (part,)}
        kept = installation.bank.keys() - folded
        assert installation.fold([part], WEIGHTS) == len(folded) > 0
        assert installation.bank.keys() == kept
        assert {name for name in before.parameters if _parameter(unet, name) is not before.parameters[name]} == {
            f"{name}.weight" for name in folded
        }
        for name, parameter in before.parameters.items():
            assert _parameter(unet, name).requires_grad == parameter.requires_grad, name
        installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
        assert relative_error(unet(**inputs)[0], expected) < 1e-5
    before.assert_unchanged(unet)


def _parameter(unet: nn.Module, name: str) -> Any:
    owner, _, parameter = name.rpartition(".")
    module = unet.get_submodule(owner)
    return getattr(getattr(module, "layer", module), parameter)


@torch.no_grad()
def test_folded_layers_need_no_gates_and_the_others_do() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    bare = Gates(GATES.text, {}, GATES.row, GATES.latent_grid)
    with installed(unet, two_loras(unet)) as installation:
        with pytest.raises(KeyError):
            installation.inputs(bare)
        installation.fold(["image"], WEIGHTS)
        installation.use(installation.inputs(bare, inputs["encoder_hidden_states"]))
        unet(**inputs)


@torch.no_grad()
def test_layers_are_folded_beside_an_empty_registry_of_hooks_and_not_beside_hooks() -> None:
    unet = tiny_unet()
    registry = HookRegistry.check_if_exists_or_initialize(unet)  # as diffusers' pipelines leave it in transformers
    with installed(unet, two_loras(unet)) as installation:
        assert installation.fold(PARTS, WEIGHTS) > 0
    registry.register_hook(ModelHook(), "none")
    with installed(unet, two_loras(unet)) as installation:
        assert installation.fold(PARTS, WEIGHTS) == 0


@torch.no_grad()
def test_a_concept_folded_with_weight_zero_leaves_its_layers_alone() -> None:
    unet = tiny_unet()
    before = Snapshot(unet)
    with installed(unet, two_loras(unet)) as installation:
        assert installation.fold(PARTS, (0.0, 0.0)) > 0
        assert all(found is before.parameters[name] for name, found in unet.named_parameters())


@torch.no_grad()
def test_bfloat16_weights_are_folded_in_full_precision_and_come_back_bit_by_bit() -> None:
    unet = tiny_unet().to(torch.bfloat16)
    before = Snapshot(unet)
    lora = random_lora(unet, 1, size=SIZE, targets=("conv_in",))
    with installed(unet, [lora], dtype=torch.bfloat16) as installation:
        assert installation.fold(["image"], [0.7]) == 1
        found = unet.conv_in.weight
        change = 0.7 * torch.einsum("orhw,rijk->oijk", lora["conv_in"].up, lora["conv_in"].down)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, (before.parameters["conv_in.weight"].float() + change).to(torch.bfloat16))
        assert not torch.equal(found, before.parameters["conv_in.weight"])
    before.assert_unchanged(unet)


@torch.no_grad()
def test_models_in_another_precision_than_the_call_are_not_folded() -> None:
    unet = tiny_unet().to(torch.float16)
    before = Snapshot(unet)
    with installed(unet, two_loras(unet)) as installation:
        assert installation.fold(PARTS, WEIGHTS) == 0
    before.assert_unchanged(unet)


def layer_by_layer(unet: Any) -> None:
    cpu_offload(unet, execution_device=CPU)
    assert all(parameter.is_meta for parameter in unet.parameters())


def in_groups(unet: Any) -> None:
    unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def stored_in_half_precision(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("keep", "how"),
    in_pairs(
        slow_but([layer_by_layer, in_groups], [layer_by_layer, in_groups, stored_in_half_precision]),
        ["module", "forward"],
    ),
)
@torch.no_grad()
def test_weights_that_hooks_bring_are_not_folded_and_give_the_same_image(keep: Callable[[Any], None], how: How) -> None:
    unet = tiny_unet().half().float()  # numbers that each way of keeping them can hold
    inputs = unet_inputs(unet)
    loras = two_loras(unet)
    base, expected = unet(**inputs)[0], with_bank(unet, loras, GATES, inputs)
    keep(unet)
    before = Snapshot(unet)
    with installed(unet, loras, how=how) as installation:
        if how == "module":
            layers = len(installation.bank)
            assert installation.fold(PARTS, WEIGHTS) == 0
            assert len(installation.bank) == layers
        installation.use(installation.inputs(GATES, inputs["encoder_hidden_states"]))
        assert torch.equal(unet(**inputs)[0], expected)
    if keep is layer_by_layer:  # accelerate makes new parameters in each pass
        assert all(parameter.is_meta for parameter in unet.parameters())
    else:
        before.assert_unchanged(unet)
    assert relative_error(base, expected) > 0.1


class Quantised(nn.Parameter):
    """Stands for the parameter types of quantisation libraries, which hold other numbers than they seem to."""


@torch.no_grad()
def test_quantised_weights_are_not_folded_and_the_rest_is() -> None:
    unet = tiny_unet()
    unet.conv_in._parameters["weight"] = Quantised(unet.conv_in.weight.detach())
    before = Snapshot(unet)
    with installed(unet, two_loras(unet, ("conv_in", "conv_out"))) as installation:
        assert installation.fold(PARTS, WEIGHTS) == 1
        assert list(installation.bank) == ["conv_in"]
    before.assert_unchanged(unet)


@torch.no_grad()
def test_a_model_that_changes_its_precision_during_the_call_keeps_the_new_one() -> None:
    unet, other = tiny_unet(), tiny_unet()
    before = Snapshot(unet)
    with installed(unet, two_loras(unet)) as installation:
        assert installation.fold(PARTS, WEIGHTS) > 0
        unet.to(torch.float16)
    other.to(torch.float16)
    assert all(found is before.parameters[name] for name, found in unet.named_parameters())
    for found, expected in zip(unet.parameters(), other.parameters(), strict=True):
        assert found.dtype == torch.float16
        assert torch.equal(found, expected)


# PEFT adapters that the user has loaded.


def add_adapter(unet: Any, name: str, targets: Sequence[str] = ATTENTION, seed: int = 0, **config: Any) -> None:
    unet.add_adapter(
        LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, **config), name
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in unet.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * SIZE


@torch.no_grad()
def test_a_loaded_adapter_that_is_no_concept_stays_part_of_the_base() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    plain = unet(**inputs)[0]
    add_adapter(unet, "style", (*ATTENTION, "ff.net.2", "conv1"))
    loras = two_loras(tiny_unet(), (*ATTENTION, "conv2", "conv1"))
    gates, full = random_gates("everything", rows=2, tokens=7, concepts=2, latent_grid=(16, 16))
    styled = unet(**inputs)[0]
    expected = with_reference(unet, loras, full)(**inputs)[0]
    before = Snapshot(unet)
    found = with_bank(unet, loras, gates, inputs)
    before.assert_unchanged(unet)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(styled, plain) > 0.1
    assert torch.equal(unet(**inputs)[0], styled)


@torch.no_grad()
def test_an_adapter_among_the_concepts_is_silent_and_comes_back_exactly() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    plain = unet(**inputs)[0]
    add_adapter(unet, "cat", seed=1)
    add_adapter(unet, "style", seed=2)
    unet.set_adapters(["style"], [0.7])
    styled = unet(**inputs)[0]
    unet.set_adapters(["cat", "style"], [1.3, 0.7])
    both = unet(**inputs)[0]
    before = Snapshot(unet)
    with installed(unet, silence=["cat"]) as installation:
        installation.use(installation.inputs(NO_GATES, inputs["encoder_hidden_states"]))
        assert torch.equal(unet(**inputs)[0], styled)
    before.assert_unchanged(unet)
    assert torch.equal(unet(**inputs)[0], both)
    with installed(unet, silence=["cat", "style"]) as installation:
        installation.use(installation.inputs(NO_GATES, inputs["encoder_hidden_states"]))
        assert torch.equal(unet(**inputs)[0], plain)
    before.assert_unchanged(unet)
    assert relative_error(styled, plain) > 0.02
    assert relative_error(both, styled) > 0.02


@torch.no_grad()
def test_adapter_scales_are_restored_though_a_pass_without_adapters_resets_them() -> None:
    """diffusers forgets the weights of adapters in a pass with `cross_attention_kwargs={"scale": 0}`."""
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    add_adapter(unet, "cat")
    unet.set_adapters(["cat"], [1.3])
    before = Snapshot(unet)
    with installed(unet, silence=["cat"]) as installation:
        installation.use(installation.inputs(NO_GATES, inputs["encoder_hidden_states"]))
        unet(**inputs, cross_attention_kwargs={"scale": 0.0})
    before.assert_unchanged(unet)


@torch.no_grad()
def test_an_adapter_from_a_file_that_is_left_in_training_mode_is_given_back_so() -> None:
    unet = tiny_unet()
    state = lora_tensors(unet=random_lora(unet, 1, size=SIZE))
    unet.load_lora_adapter(state, prefix="unet", adapter_name="style")
    modes = {module.training for module in unet.modules()}
    assert modes == {True, False}
    before = Snapshot(unet)
    with installed(unet, two_loras(tiny_unet()), silence=["style"]):
        assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.layer.base_layer.training is False
    before.assert_unchanged(unet)


@torch.no_grad()
def test_text_encoders_take_concepts_too(pipe: Any) -> None:
    encoder = pipe.text_encoder
    ids = pipe.tokenizer(["a sks cat", "a dog"], padding="max_length", return_tensors="pt").input_ids
    base = encoder(ids)[0]
    loras = [random_lora(encoder, seed, targets=("q_proj", "v_proj", "fc1")) for seed in (1, 2)]
    where = {name: Site("text") for name, _ in encoder.named_modules()}
    gates, full = random_gates("everything", rows=2, tokens=32, concepts=2, latent_grid=(1, 1), levels=1)
    full = FullGates(full.text, {(1, 32): full.text[:, None]}, full.row)  # all its layers see tokens
    before = Snapshot(encoder)
    with installed_layers(encoder, loras, where, **FP32) as installation:
        installation.use(installation.inputs(gates))
        found = encoder(ids)[0]
    before.assert_unchanged(encoder)
    expected = with_reference(encoder, loras, full)(ids)[0]
    assert relative_error(base, expected) > 0.05
    assert relative_error(found, expected) < 1e-5
