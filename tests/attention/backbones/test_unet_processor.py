"""Our attention processor computes what the processor that it stands in for computes."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor

from components import installed, sd_unet, shallow_sdxl_unet, unet_inputs, with_bank
from lora_compose.attention import Recorder
from lora_compose.attention.backbones.processors import kernel_of
from lora_compose.attention.backbones.unet import AttentionLayer, ComposeAttnProcessor
from lora_compose.attention.forward_state import ForwardState, LayerInputs
from lora_compose.attention.kernels import XFormersKernel
from reference import random_gates, relative_error

PROCESSORS = {"AttnProcessor": AttnProcessor, "AttnProcessor2_0": AttnProcessor2_0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMMON: list[dict[str, Any]] = [{}, {"residual_connection": True, "rescale_output_factor": 1.7}]
UPCAST: list[dict[str, Any]] = [
    {"upcast_attention": True},
    {"upcast_softmax": True},
    {"upcast_attention": True, "upcast_softmax": True},
    {"scale_qk": False},
    {"bias": True, "out_bias": False},
]


def attention(seed: int = 0, **options: Any) -> Attention:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"query_dim": 16, "heads": 4, "dim_head": 8, **options}
    return Attention(**settings).eval()


def both(attn: Attention, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Output with diffusers' processor and with ours in its place."""
    expected = attn(*args)
    layer = AttentionLayer("attn", attn.is_cross_attention, "mid", 0)
    attn.set_processor(ComposeAttnProcessor(layer, kernel_of("attn", attn), ForwardState()))  # pyright: ignore[reportArgumentType]
    return attn(*args), expected


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("family", [sd_unet, shallow_sdxl_unet])
@torch.no_grad()
def test_whole_models_give_diffusers_own_output(processor: str, family: Any) -> None:
    unet = family()
    unet.set_attn_processor(PROCESSORS[processor]())
    inputs = unet_inputs(unet, grid=(8, 12))
    expected = unet(**inputs)[0]
    gates, _ = random_gates("constant", rows=2, tokens=7, concepts=0, latent_grid=(8, 12))
    assert torch.equal(with_bank(unet, [], gates, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(
    ("processor", "options"),
    [
        *((AttnProcessor, options) for options in (*COMMON, *UPCAST)),
        *((AttnProcessor2_0, options) for options in (*COMMON, {"bias": True}, {"cross_attention_norm": "layer_norm"})),
    ],
)
@torch.no_grad()
def test_kernels_have_the_bits_of_diffusers_processors(
    processor: Any, options: dict[str, Any], cross: bool, dtype: torch.dtype
) -> None:
    if not cross:
        options = {key: value for key, value in options.items() if key != "cross_attention_norm"}
    attn = attention(processor=processor(), **({"cross_attention_dim": 12} if cross else {}), **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    size = 8 if processor is AttnProcessor else 1  # large scores, which rounding and upcasting change
    hidden = (torch.randn(2, 24, 16, generator=generator) * size).to(dtype)
    text = (torch.randn(2, 7, 12, generator=generator) * size).to(dtype)
    found, expected = both(attn, hidden, *([text] if cross else []))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("processor", PROCESSORS.values())
@torch.no_grad()
def test_a_bias_on_the_text_is_diffusers_attention_mask(processor: Any, dtype: torch.dtype) -> None:
    attn: Any = attention(processor=processor(), cross_attention_dim=12).to(dtype)
    generator = torch.Generator().manual_seed(1)
    hidden, text, bias = (torch.randn(2, *size, generator=generator).to(dtype) for size in ((24, 16), (7, 12), (24, 7)))
    expected = attn(hidden, text, attention_mask=bias)
    layer, state = AttentionLayer("attn", True, "mid", 2), ForwardState(LayerInputs(text_bias={2: bias[:, None]}))
    recorder = Recorder(["attn"], torch.eye(7).expand(2, -1, -1))
    state.recorders = [recorder]
    ours: Any = ComposeAttnProcessor(layer, kernel_of("attn", attn), state)
    attn.set_processor(ours)
    assert torch.equal(attn(hidden, text), expected)
    if dtype == torch.float32 and processor is AttnProcessor:
        query, key = (attn.head_to_batch_dim(side(x)) for side, x in ((attn.to_q, hidden), (attn.to_k, text)))
        probabilities = attn.get_attention_scores(query, key, bias.repeat_interleave(4, dim=0))
        torch.testing.assert_close(recorder.maps["attn"], probabilities.unflatten(0, (2, 4)).mean(dim=1))


def test_gradients_equal_diffusers_own() -> None:
    for processor in PROCESSORS.values():
        attn = attention(processor=processor(), cross_attention_dim=12)
        hidden = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        text = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(2))
        gradients = [torch.autograd.grad(out.square().sum(), hidden)[0] for out in both(attn, hidden, text)]
        assert relative_error(*gradients) < 1e-5


def test_kernels_of_xformers_keep_the_operator_that_was_chosen() -> None:
    class Operator:
        pass

    attn = attention()
    attn.set_processor(XFormersAttnProcessor(attention_op=Operator))  # pyright: ignore[reportArgumentType]
    assert kernel_of("attn", attn) == XFormersKernel(8**-0.5, Operator)


@pytest.mark.parametrize("part", ["spatial_norm", "group_norm", "norm_q", "add_k_proj"])
def test_layers_with_further_parts_are_refused(part: str) -> None:
    options: dict[str, Any] = {
        "spatial_norm": {"query_dim": 32, "spatial_norm_dim": 8},
        "group_norm": {"norm_num_groups": 4},
        "norm_q": {"qk_norm": "layer_norm"},
        "add_k_proj": {"added_kv_proj_dim": 12, "cross_attention_dim": 12},
    }[part]
    attn = attention(processor=AttnProcessor2_0(), **options)
    with pytest.raises(ValueError, match=r"mid.attn has .*which cannot be combined"):
        kernel_of("mid.attn", attn)


@torch.no_grad()
def test_attention_masks_of_the_caller_are_refused() -> None:
    unet = sd_unet()
    inputs = unet_inputs(unet)
    gates, _ = random_gates("constant", rows=2, tokens=7, concepts=0, latent_grid=(16, 16))
    with installed(unet) as installation:
        installation.use(installation.inputs(gates))
        with pytest.raises(ValueError, match="attention masks"):
            unet(**inputs, encoder_attention_mask=torch.ones(2, 7))
