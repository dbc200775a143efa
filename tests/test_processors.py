"""Our attention processor computes what the processor that it stands in for computes."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from lora_compose.attention.processors import ComposeAttnProcessor
from torch import Tensor

from components import sd_unet, sdxl_unet, unet_inputs
from lora_compose.attention import AttentionLayer, install
from lora_compose.attention.kernels import XFormersKernel, kernel_of
from lora_compose.attention.slot import Slot
from reference import random_gates, relative_error

CPU = torch.device("cpu")
PROCESSORS = {"AttnProcessor": AttnProcessor, "AttnProcessor2_0": AttnProcessor2_0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attention(seed: int = 0, **options: Any) -> Attention:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"query_dim": 16, "heads": 4, "dim_head": 8, **options}
    return Attention(**settings).eval()


def both(attn: Attention, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Output with diffusers' processor and with ours in its place."""
    expected = attn(*args)
    layer = AttentionLayer("attn", attn.is_cross_attention, "mid", 0)
    attn.set_processor(ComposeAttnProcessor(layer, kernel_of("attn", attn), Slot()))  # pyright: ignore[reportArgumentType]
    return attn(*args), expected


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("family", [sd_unet, lambda: sdxl_unet(transformer_layers_per_block=(1, 1, 2))])
@torch.no_grad()
def test_whole_models_give_diffusers_own_output(processor: str, family: Any) -> None:
    unet = family()
    unet.set_attn_processor(PROCESSORS[processor]())
    inputs = unet_inputs(unet, grid=(8, 12))
    expected = unet(**inputs)[0]
    gates, _ = random_gates("constant", rows=2, tokens=7, concepts=0, latent_grid=(8, 12))
    with install(unet, [], device=CPU, dtype=torch.float32) as installation:
        installation.use(gates, inputs["encoder_hidden_states"])
        found = unet(**inputs)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"upcast_attention": True},
        {"upcast_softmax": True},
        {"upcast_attention": True, "upcast_softmax": True},
        {"scale_qk": False},
        {"residual_connection": True, "rescale_output_factor": 1.7},
        {"bias": True, "out_bias": False},
    ],
)
@torch.no_grad()
def test_plain_kernel_has_the_bits_of_diffusers_attn_processor(options: dict[str, Any], dtype: torch.dtype) -> None:
    attn = attention(processor=AttnProcessor(), cross_attention_dim=12, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.randn(2, 24, 16, generator=generator) * 8).to(dtype)
    text = (torch.randn(2, 7, 12, generator=generator) * 8).to(dtype)
    found, expected = both(attn, hidden, text)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual_connection": True, "rescale_output_factor": 1.7},
        {"bias": True},
        {"cross_attention_norm": "layer_norm"},
    ],
)
@torch.no_grad()
def test_default_kernel_has_the_bits_of_diffusers_attn_processor_2_0(
    options: dict[str, Any], cross: bool, dtype: torch.dtype
) -> None:
    dim = {"cross_attention_dim": 12} if cross else {}
    if not cross:
        options = {key: value for key, value in options.items() if key != "cross_attention_norm"}
    attn = attention(processor=AttnProcessor2_0(), **dim, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 24, 16, generator=generator).to(dtype)
    text = torch.randn(2, 7, 12, generator=generator).to(dtype)
    found, expected = both(attn, hidden, *([text] if cross else []))
    assert torch.equal(found, expected)


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
    with install(unet, [], device=CPU, dtype=torch.float32) as installation:
        installation.use(gates)
        with pytest.raises(ValueError, match="attention masks"):
            unet(**inputs, encoder_attention_mask=torch.ones(2, 7))
