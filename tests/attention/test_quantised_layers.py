"""Gated concepts on the quantised layers of libraries equal dense changes of the weight as the library dequantises it.

What is not installed is skipped: `pip install bitsandbytes torchao gguf sdnq optimum-quanto`.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.quantizers.bfl.utils import (
    BFLFP8RLinear,
    BFLNVFP4Linear,
    dequantize_fp8r,
    dequantize_nvfp4,
    quantize_fp8r,
    quantize_nvfp4,
)
from torch import Tensor, nn

from gated_layers import CPU, ROWS, SIDE, Kind, concept, error, gates_by, run
from lora_compose.attention import Gates, Lora, Site, installed_layers
from lora_compose.attention.device import dtype_of
from lora_compose.attention.fitting import weight_shape
from lora_compose.attention.transforms import dense_weight
from nunchaku_layers import AWQ, SVDQuant

IN, OUT = 64, 96
Stored = tuple[nn.Module, Tensor]
"""A layer of a library, and its weight, dequantised by the library."""


def plain_layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).to(dtype).requires_grad_(False)


def bitsandbytes_nf4(layer: nn.Linear) -> Stored:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(layer.state_dict())
    made = made.to("cpu").requires_grad_(False)  # it quantises when it is moved
    return made, bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)


def bitsandbytes_int8(layer: nn.Linear) -> Stored:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    made = made.to("cpu").requires_grad_(False)
    return made, made.weight.CB.float() * made.weight.SCB[:, None] / 127


def torchao_int8(layer: nn.Linear) -> Stored:
    found = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(layer)
    found.quantize_(model, found.Int8WeightOnlyConfig())
    return model[0], layer.weight.dequantize()


def quanto(layer: nn.Linear, kind: str) -> Stored:
    found = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = nn.Sequential(layer)
    found.quantize(model, weights=getattr(found, kind))
    found.freeze(model)
    return model[0], model[0].requires_grad_(False).weight.dequantize()  # pyright: ignore[reportCallIssue]


def quanto_int8(layer: nn.Linear) -> Stored:
    return quanto(layer, "qint8")


def quanto_float8(layer: nn.Linear) -> Stored:
    return quanto(layer, "qfloat8")


def sdnq(layer: nn.Linear, kind: str) -> Stored:
    found = pytest.importorskip("sdnq", reason="sdnq is not installed")
    model = nn.Sequential(layer)
    made = found.sdnq_post_load_quant(model, weights_dtype=kind, add_skip_keys=False, minimum_allowed_numel=0)
    from sdnq.utils import get_sdnq_params  # pyright: ignore[reportMissingImports]

    return made[0], made[0].sdnq_dequantizer(**get_sdnq_params(made[0])).float()


def sdnq_int8(layer: nn.Linear) -> Stored:
    return sdnq(layer, "int8")


def sdnq_uint4(layer: nn.Linear) -> Stored:
    return sdnq(layer, "uint4")


def gguf(layer: nn.Linear, kind: str) -> Stored:
    found = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    of_kind = found.GGMLQuantizationType[kind]
    numbers = torch.from_numpy(found.quants.quantize(layer.weight.numpy(), of_kind))
    made = GGUFLinear(IN, OUT, bias=True, compute_dtype=torch.float32)
    made.weight, made.bias = GGUFParameter(numbers, quant_type=of_kind), layer.bias  # pyright: ignore[reportCallIssue]
    return made, dequantize_gguf_tensor(made.weight).float()


def gguf_q8(layer: nn.Linear) -> Stored:
    return gguf(layer, "Q8_0")


def gguf_q4(layer: nn.Linear) -> Stored:
    return gguf(layer, "Q4_0")


def diffusers_fp8(layer: nn.Linear) -> Stored:
    """Of the files that Black Forest Labs publish in 8 bits; ComfyUI's scaled ones become these."""
    made = BFLFP8RLinear(IN, OUT, compute_dtype=torch.float32)
    weight, scale = quantize_fp8r(layer.weight)
    made.weight, made.weight_scale, made.bias = nn.Parameter(weight, requires_grad=False), scale, layer.bias
    return made, dequantize_fp8r(weight, scale)


def diffusers_nvfp4(layer: nn.Linear) -> Stored:
    made = BFLNVFP4Linear(IN, OUT, compute_dtype=torch.float32)
    weight, scale, whole = quantize_nvfp4(layer.weight)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    made.weight_scale, made.weight_scale_2 = scale, whole
    return made, dequantize_nvfp4(weight, scale, whole)


def nunchaku_svdquant(layer: nn.Linear) -> Stored:
    made = SVDQuant(layer)
    return made, made.dense()


def nunchaku_awq(layer: nn.Linear) -> Stored:
    made = AWQ(layer)
    return made, made.dense()


ROUNDED = {"bitsandbytes_int8": 2e-2, "nunchaku_svdquant": 0.15}
"""The relative error of layers that round their inputs as well; the others, and plain LoRAs, are exact to rounding."""
LAYERS: list[Callable[[nn.Linear], Stored]] = [
    bitsandbytes_nf4, bitsandbytes_int8, torchao_int8, quanto_int8, quanto_float8, sdnq_int8, sdnq_uint4, gguf_q8,
    gguf_q4, diffusers_fp8, diffusers_nvfp4, nunchaku_svdquant, nunchaku_awq,
]  # fmt: skip
KINDS: list[Kind | None] = [None, "DoRA", "DoRA of inputs", "LoKr with DoRA", "OFT", "OFT of inputs"]
INPUT = torch.randn(ROWS, SIDE * SIDE, IN, generator=torch.Generator().manual_seed(3))


def dense_changes(base: Tensor, weight: Tensor, gates: Gates, changed: list[Tensor]) -> Tensor:
    """The output of the layer plus the sum of g (W' - W) x, concept by concept, in float64."""
    gate = gates.image[0].double()
    changes = (F.linear(INPUT.double(), one - weight) for one in changed)
    return base.double() + sum(gate[..., i : i + 1] * change for i, change in enumerate(changes))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("stored", LAYERS)
def test_concepts_are_relative_to_the_dequantised_weight(
    stored: Callable[[nn.Linear], Stored], kind: Kind | None
) -> None:
    original = plain_layer().weight.clone()
    layer, weight = stored(plain_layer())
    assert 1e-4 < error(weight, original.double()) < 0.2, "the weight is to be rounded"
    weight = weight.double()
    concepts = [concept(one, weight, seed) for seed, one in enumerate((kind, None, kind))]
    gates = gates_by("cell", len(concepts))
    with torch.no_grad():
        plain = layer(INPUT)
    expected = dense_changes(plain, weight, gates, [changed for _, changed in concepts])
    found = run(layer, [factors for factors, _ in concepts], gates, INPUT)
    assert error(plain, expected) > 0.1, "the concepts are to have an effect"
    assert error(found, expected) < (ROUNDED.get(stored.__name__, 1e-5) if kind else 1e-5)
    torch.testing.assert_close(found[: ROWS // 2], plain[: ROWS // 2], rtol=0, atol=0)  # unconditional rows


@torch.no_grad()
@pytest.mark.parametrize("stored", LAYERS)
def test_concepts_are_never_written_into_quantised_weights(stored: Callable[[nn.Linear], Stored]) -> None:
    layer, weight = stored(plain_layer())
    before, plain = dict(layer.named_parameters()), layer(INPUT)
    factors, _ = concept(None, weight, 0)
    loras: list[Lora] = [{"layer": factors}]
    model = nn.ModuleDict({"layer": layer})
    with installed_layers(model, loras, {"layer": Site("image")}, device=CPU, dtype=torch.float32) as there:
        assert there.fold(["image"], [1.0]) == 0
        assert list(there.bank) == ["layer"]
    assert model["layer"] is layer
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
    torch.testing.assert_close(layer(INPUT), plain, rtol=0, atol=0)


@pytest.mark.parametrize("stored", LAYERS)
def test_weights_are_read_as_the_library_dequantises_them(stored: Callable[[nn.Linear], Stored]) -> None:
    """Unit vectors are exact also where inputs are rounded."""
    layer, weight = stored(plain_layer())
    assert error(dense_weight(layer, CPU, torch.float32), weight.double()) < 1e-5


@pytest.mark.parametrize("stored", LAYERS)
def test_layers_say_the_shape_of_their_weight(stored: Callable[[nn.Linear], Stored]) -> None:
    layer, _ = stored(plain_layer())
    assert weight_shape(nn.ModuleDict({"layer": layer}), "layer") == (OUT, IN)


def test_the_precision_of_a_model_is_not_that_of_its_quantised_weights() -> None:
    first, _ = diffusers_fp8(plain_layer())
    first.register_parameter("bias", None)
    model = nn.Sequential(first, plain_layer(torch.bfloat16))
    assert dtype_of(model) == torch.bfloat16
