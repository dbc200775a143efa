"""The pooled LoRAs of all concepts equal a slow sum of dense deltas, under every kind of gate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components import (
    ATTENTION,
    EVERYTHING,
    installed,
    random_lora,
    sd_unet,
    sdxl_unet,
    shallow_sdxl_unet,
    tiny_unet,
    unet_inputs,
    with_bank,
)
from lora_compose.attention import Gates, How, Lora, LoraFactors, Site, installed_layers
from reference import STYLES, FullGates, Style, constant_gates, random_gates, relative_error, with_reference

UNETS: dict[str, Callable[..., Any]] = {"sd": partial(sd_unet, layers_per_block=1), "sdxl": shallow_sdxl_unet}
ALL_LAYERS = (*EVERYTHING, "linear_1", "linear_2")
SIZE = 0.1  # of random factors: the effect is as large as the output, rounding errors are not amplified


def lora(unet: nn.Module, seed: int, **options: Any) -> Lora:
    return random_lora(unet, seed, **{"size": SIZE, "targets": ALL_LAYERS, **options})


def unequal_loras(unet: nn.Module) -> list[Lora]:
    """Three concepts with unequal ranks and scales; the third adapts only a part of the layers."""
    partly = lora(unet, 3, rank=5, scale=0.25, targets=("attn2.to_k", "ff.net.2", "conv1", "attn1.to_q"))
    return [lora(unet, 1, rank=1, scale=3.0), lora(unet, 2, rank=4, scale=0.7), partly]


def gates_for(inputs: dict[str, Any], concepts: int, style: Style, seed: int = 0) -> tuple[Gates, FullGates]:
    rows, tokens, _ = inputs["encoder_hidden_states"].shape
    height, width = inputs["sample"].shape[2:]
    return random_gates(style, rows=rows, tokens=tokens, concepts=concepts, latent_grid=(height, width), seed=seed)


@pytest.fixture(params=UNETS)
def unet(request: pytest.FixtureRequest) -> Any:
    return UNETS[request.param]()


def assert_equals_the_slow_sum(
    unet: Any, inputs: dict[str, Any], loras: Sequence[Lora], pair: tuple[Gates, FullGates], effect: float = 0.1
) -> None:
    gates, full = pair
    expected = with_reference(unet, loras, full)(**inputs)[0]
    assert relative_error(unet(**inputs)[0], expected) > effect, "the LoRAs are to have an effect"
    assert relative_error(with_bank(unet, loras, gates, inputs), expected) < 1e-5


@dataclass
class Case:
    """A UNet with inputs, three LoRAs and gates."""

    unet: Any
    style: Style = "everything"
    rows: int = 2
    grid: tuple[int, int] = (16, 16)

    def __post_init__(self) -> None:
        self.inputs = unet_inputs(self.unet, rows=self.rows, grid=self.grid)
        self.loras = unequal_loras(self.unet)
        self.gates, self.full = gates_for(self.inputs, len(self.loras), self.style)

    def output(self, gates: Gates | None = None, loras: Sequence[Lora] | None = None) -> Tensor:
        """With the bank."""
        return with_bank(self.unet, self.loras if loras is None else loras, gates or self.gates, self.inputs)

    def expected(self) -> Tensor:
        """With the slow sum."""
        return with_reference(self.unet, self.loras, self.full)(**self.inputs)[0]

    def base(self) -> Tensor:
        """Without LoRAs."""
        return self.unet(**self.inputs)[0]

    def assert_equal(self) -> None:
        assert_equals_the_slow_sum(self.unet, self.inputs, self.loras, (self.gates, self.full))


@pytest.mark.parametrize(
    ("unet", "style"),
    [
        *(
            pytest.param("sd", style, marks=() if style in ("constant", "everything") else pytest.mark.slow)
            for style in STYLES
        ),
        ("sdxl", "everything"),
    ],
    indirect=["unet"],
)
@torch.no_grad()
def test_bank_equals_the_slow_sum(unet: Any, style: Style) -> None:
    Case(unet, style, rows=3, grid=(9, 15)).assert_equal()


@pytest.mark.slow
@torch.no_grad()
def test_bank_equals_the_slow_sum_in_the_depth_of_sdxl() -> None:
    Case(sdxl_unet(), grid=(9, 14)).assert_equal()


@pytest.mark.parametrize("name", UNETS)
def test_all_kinds_of_layers_are_adapted_in_these_tests(name: str) -> None:
    unet = UNETS[name]()
    adaptable = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(lora(unet, 1)) == adaptable


KINDS_OF_LAYERS = {
    "cross-attention keys": ("attn2.to_k",),
    "cross-attention": ("attn2.to_q", "attn2.to_v", "attn2.to_out.0"),
    "self-attention": tuple(f"attn1.{p}" for p in ATTENTION),
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": ("proj_in", "proj_out"),
    "residual blocks": ("conv1", "conv2"),
    "shortcuts": ("conv_shortcut",),
    "downsamplers": ("downsamplers.0.conv",),
    "upsamplers": ("upsamplers.0.conv",),
    "first convolution": ("conv_in",),
    "last convolution": ("conv_out",),
    "time": ("time_embedding.linear_1", "time_embedding.linear_2", "time_emb_proj"),
}


@pytest.mark.parametrize("kind", KINDS_OF_LAYERS)
@torch.no_grad()
def test_bank_equals_the_slow_sum_for_every_kind_of_layer_alone(kind: str) -> None:
    unet = tiny_unet()
    loras = [lora(unet, seed, rank=2 + seed, targets=KINDS_OF_LAYERS[kind], size=0.3) for seed in range(2)]
    inputs = unet_inputs(unet, grid=(8, 16))
    assert_equals_the_slow_sum(unet, inputs, loras, gates_for(inputs, 2, "everything"), effect=1e-3)


@torch.no_grad()
def test_added_conditions_of_sdxl_are_adapted_by_row() -> None:
    unet = shallow_sdxl_unet()
    loras = [lora(unet, 1, targets=("add_embedding.linear_1", "add_embedding.linear_2"), size=0.5)]
    inputs = unet_inputs(unet)
    assert_equals_the_slow_sum(unet, inputs, loras, gates_for(inputs, 1, "rows"), effect=1e-3)


@torch.no_grad()
def test_negative_and_zero_weights(unet: Any) -> None:
    pair = constant_gates([-1.5, 0.0, 0.8])
    assert_equals_the_slow_sum(unet, unet_inputs(unet), unequal_loras(unet), pair, effect=0.3)


def pick(gates: Gates, concepts: Sequence[int]) -> Gates:
    """The gates of some concepts, in that order."""
    which = list(concepts)
    image = {level: gate[..., which] for level, gate in gates.image.items()}
    return Gates(gates.text[..., which], image, gates.row[..., which], gates.latent_grid)


@torch.no_grad()
def test_the_order_of_concepts_does_not_matter() -> None:
    case = Case(tiny_unet())
    first = case.output()
    order = (2, 0, 1)
    other = case.output(pick(case.gates, order), [case.loras[i] for i in order])
    assert relative_error(other, first) < 5e-6
    swapped = case.output(loras=[case.loras[1], case.loras[0], case.loras[2]])
    assert relative_error(swapped, first) > 0.1, "the gates go with their concepts"


@torch.no_grad()
def test_a_concept_of_weight_zero_is_absent() -> None:
    unet = tiny_unet()
    case = Case(unet)
    without = case.output(pick(case.gates, (0, 2)), [case.loras[0], case.loras[2]])
    assert relative_error(case.output(case.gates.times(torch.tensor([1.0, 0.0, 1.0]))), without) < 5e-6
    assert relative_error(case.output(), without) > 0.1


@torch.no_grad()
def test_a_lora_that_was_never_trained_leaves_exactly_the_base(unet: Any) -> None:
    inputs = unet_inputs(unet)
    untrained = {n: LoraFactors(f.down, torch.zeros_like(f.up), f.scale) for n, f in lora(unet, 1).items()}
    gates, _ = gates_for(inputs, 1, "everything")
    assert torch.equal(with_bank(unet, [untrained], gates, inputs), unet(**inputs)[0])


@torch.no_grad()
def test_without_concepts_the_output_is_exactly_the_base(unet: Any) -> None:
    inputs = unet_inputs(unet)
    gates, _ = gates_for(inputs, 0, "constant")
    assert torch.equal(with_bank(unet, [], gates, inputs), unet(**inputs)[0])


def latent_gradient(model: Any, inputs: dict[str, Any]) -> Tensor:
    sample = inputs["sample"].clone().requires_grad_()
    output = model(**{**inputs, "sample": sample})[0]
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return torch.autograd.grad((output * weights).sum(), sample)[0]


@pytest.mark.parametrize("unet", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)], indirect=True)
def test_gradient_to_the_latents_equals_that_of_the_slow_sum_with_and_without_checkpointing(unet: Any) -> None:
    case = Case(unet, grid=(8, 16))
    expected = latent_gradient(with_reference(unet, case.loras, case.full), case.inputs)
    assert relative_error(latent_gradient(unet, case.inputs), expected) > 0.3
    passes, found = [], []
    with installed(unet, case.loras) as installation:
        installation.use(installation.inputs(case.gates, case.inputs["encoder_hidden_states"]))
        unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: passes.append(1))
        found.append(latent_gradient(unet, case.inputs))
        assert len(passes) == 1
        unet.enable_gradient_checkpointing()
        found.append(latent_gradient(unet, case.inputs))
        assert len(passes) == 1 + 2
    assert relative_error(found[0], expected) < 2e-5
    assert torch.equal(found[0], found[1])


class Products(TorchDispatchMode):
    """Counts products of gates: one for each product before them."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is torch.ops.aten.mul.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("other", "expected"), [(ATTENTION, 5), (("attn1.to_q", "attn2.to_v"), 8)])
@torch.no_grad()
def test_layers_with_the_same_input_and_the_same_ranks_share_the_product_before_the_gate(
    other: tuple[str, ...], expected: int
) -> None:
    """Of the 4 layers of each attention, queries, keys and values of self-, and keys and values of cross-attention."""
    unet = tiny_unet()
    case = Case(unet)
    loras = [lora(unet, 1, targets=ATTENTION), lora(unet, 2, targets=other)]
    pair = gates_for(case.inputs, 2, "everything")
    with Products() as plain:
        case.base()
    with installed(unet, loras) as installation:
        installation.use(installation.inputs(pair[0], case.inputs["encoder_hidden_states"]))
        with Products() as ours:
            unet(**case.inputs)
    pairs_of_attention = sum(name.endswith("attn1") for name, _ in unet.named_modules())
    assert ours.found - plain.found == expected * pairs_of_attention
    assert_equals_the_slow_sum(unet, case.inputs, loras, pair, effect=0.01)


class Stored(nn.Linear):
    """A layer whose product is a function of its own, with a gradient of its own, as that of quantised layers."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
            return grad[0] @ ctx.saved_tensors[0], None

    def forward(self, input: Tensor) -> Any:
        return self.Product.apply(input, self.weight)


def test_a_gradient_goes_through_layers_that_compute_their_own_product() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Stored(6, 4, bias=False)
    model = nn.ModuleDict({"layer": layer}).requires_grad_(False)
    factors = LoraFactors(torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator))
    x = torch.randn(1, 5, 6, generator=generator, requires_grad=True)
    gate = constant_gates((0.5,))[0]
    with installed_layers(
        model, [{"layer": factors}], {"layer": Site("text")}, device=x.device, dtype=x.dtype
    ) as there:
        there.use(there.inputs(gate))
        found = model["layer"](x)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    weight = layer.weight + 0.5 * factors.delta()
    torch.testing.assert_close(found, x @ weight.t())
    torch.testing.assert_close(gradient, 2 * found @ weight)


@torch.no_grad()
def test_bfloat16_is_as_exact_as_the_slow_sum_in_bfloat16() -> None:
    case = Case(tiny_unet())
    unet, inputs, exact = case.unet, case.inputs, case.expected()
    unet.to(torch.bfloat16)
    half = {
        k: v.to(torch.bfloat16) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    slow = with_reference(unet, case.loras, case.full)(**half)[0].float()
    found = with_bank(unet, case.loras, case.gates, half, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16

    def error(output: Tensor) -> float:
        return ((output.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()

    assert error(found) < 0.05
    assert error(found) < 1.5 * error(slow)
    assert error(unet(**half)[0]) > 0.3, "the LoRAs are to have an effect"


@torch.no_grad()
def test_autocast_runs_and_agrees() -> None:
    case = Case(tiny_unet())
    expected = case.expected()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.output()
    assert relative_error(case.base(), expected) > 0.3
    assert relative_error(found.float(), expected) < 0.1


@torch.no_grad()
def test_channels_last_models_agree() -> None:
    unet: Any = tiny_unet()
    case = Case(unet)
    expected = case.expected()
    unet.to(memory_format=torch.channels_last)
    case.inputs["sample"] = case.inputs["sample"].to(memory_format=torch.channels_last)
    assert relative_error(case.output(), expected) < 1e-5


@torch.no_grad()
def test_gates_of_some_rows_are_those_of_a_smaller_batch(unet: Any) -> None:
    case = Case(unet, rows=4)
    whole, part = case.output(), dict(case.inputs)
    for key in ("sample", "encoder_hidden_states"):
        part[key] = part[key][2:]
    if "added_cond_kwargs" in part:
        part["added_cond_kwargs"] = {k: v[2:] for k, v in part["added_cond_kwargs"].items()}
    found = with_bank(unet, case.loras, case.gates.select(slice(2, None)), part)
    assert relative_error(found, whole[2:]) < 1e-5


@torch.no_grad()
def test_other_gates_take_effect_at_once_and_the_last_ones_stay() -> None:
    unet, plain = tiny_unet(), tiny_unet()
    inputs = unet_inputs(unet)
    loras = unequal_loras(unet)
    pairs = [gates_for(inputs, 3, style, seed) for seed, style in enumerate(("constant", "everything", "tokens"))]
    with installed(unet, loras) as installation:
        for gates, full in (*pairs, pairs[0]):
            installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
            expected = with_reference(plain, loras, full)(**inputs)[0]
            assert relative_error(unet(**inputs)[0], expected) < 1e-5


@torch.no_grad()
def test_a_missing_gate_is_an_error() -> None:
    unet = UNETS["sd"]()
    inputs = unet_inputs(unet)
    loras = [lora(unet, 1)]
    gates, _ = gates_for(inputs, 1, "everything")
    with installed(unet, loras) as installation:
        with pytest.raises(KeyError):
            unet(**inputs)
        for level in gates.image:
            fewer = {other: gate for other, gate in gates.image.items() if other != level}
            with pytest.raises(KeyError):
                installation.inputs(Gates(gates.text, fewer, gates.row, gates.latent_grid))
        installation.use(installation.inputs(gates))
        unet(**inputs)


@torch.no_grad()
def test_gates_of_another_size_are_an_error() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    loras = [lora(unet, 1)]
    wrong = [
        random_gates("everything", rows=3, tokens=7, concepts=1, latent_grid=(16, 16))[0],
        random_gates("tokens", rows=2, tokens=8, concepts=1, latent_grid=(16, 16))[0],
        random_gates("pixels", rows=2, tokens=7, concepts=1, latent_grid=(16, 8))[0],
        random_gates("constant", rows=2, tokens=7, concepts=0, latent_grid=(16, 16))[0],
    ]
    with installed(unet, loras) as installation:
        for gates in wrong:
            with pytest.raises((RuntimeError, IndexError)):  # noqa: PT012
                installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
                unet(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "forward"])
@pytest.mark.parametrize(("way", "backend"), [("wrapper", "aot_eager"), ("in place", "eager")])
@torch.no_grad()
def test_models_compiled_without_concepts_show_them_later(way: str, backend: str, how: How) -> None:
    """A graph that was compiled without concepts must not be used again with them, nor one with them without."""
    torch._dynamo.reset()
    unet: Any = sd_unet(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
    )
    inputs = unet_inputs(unet, grid=(4, 4))
    loras = [lora(unet, 1, targets=(*ATTENTION, "conv_in", "conv_out", "linear_1", "ff.net.2"))]
    gates, full = gates_for(inputs, 1, "everything")
    expected = with_reference(unet, loras, full)(**inputs)[0]
    base = unet(**inputs)[0]
    model: Any = torch.compile(unet, backend=backend) if way == "wrapper" else unet
    if way == "in place":
        unet.compile(backend=backend)
    assert relative_error(base, expected) > 0.1
    assert relative_error(model(**inputs)[0], base) < 1e-5
    assert relative_error(with_bank(model, loras, gates, inputs, how=how), expected) < 1e-5
    assert relative_error(model(**inputs)[0], base) < 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
def test_other_gates_and_other_loras_of_the_same_shape_need_no_new_graph() -> None:
    """One graph that projects the text, one that finds its keys and values there, and no others later."""
    torch._dynamo.reset()
    unet: Any = tiny_unet()
    inputs = unet_inputs(unet, grid=(8, 8))
    unet.compile(backend="eager")
    counted = torch._dynamo.utils.counters["stats"]
    graphs = []
    for seed, other in ((1, 1), (1, 2), (5, 2), (1, 1)):
        gates, full = gates_for(inputs, 1, "everything", seed=other)
        loras = [lora(unet, seed)]
        before = counted["unique_graphs"]
        with torch.no_grad(), installed(unet, loras) as installation:
            handed = installation.inputs(gates, inputs["encoder_hidden_states"])
            installation.use(handed)
            unet(**inputs)
            installation.use(handed)
            found = unet(**inputs)[0]
        graphs.append(counted["unique_graphs"] - before)
        assert relative_error(found, with_reference(tiny_unet(), loras, full)(**inputs)[0]) < 1e-5
    assert graphs == [2, 0, 0, 0]
    torch._dynamo.reset()
