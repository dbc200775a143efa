"""DoRA files are what PEFT and diffusers make of them, and what the formula says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from components import random_lora, small_pipeline, tiny_pipeline, tiny_unet, unet_inputs, with_bank
from layouts import file_of, layout
from lora_compose.compose.benchmark.architectures import without_weights
from lora_compose.pipelines.concepts.loading import match, read_lora
from reference import constant_gates, relative_error

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv2"]
LINEAR, CONVOLUTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"
ONE = constant_gates((1.0,))[0]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


def trained(unet: Any) -> Any:
    """A DoRA of PEFT in a UNet, with norms that differ from those of the weights."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True, init_lora_weights=False)
    unet.add_adapter(config, "cat")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    return config


@torch.no_grad()
def test_a_file_of_peft_equals_its_layers_and_what_diffusers_loads(tmp_path: Path) -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    plain = unet(**inputs)[0]
    config = trained(unet)
    expected = unet(**inputs)[0]
    layers: Any = get_peft_model_state_dict(unet, adapter_name="cat")
    settings = {name: sorted(it) if isinstance(it, set) else it for name, it in config.to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=settings)
    file = tmp_path / "pytorch_lora_weights.safetensors"

    theirs = small_pipeline(StableDiffusionPipeline, tiny_unet())
    theirs.load_lora_weights(file)
    assert relative_error(theirs.unet.eval()(**inputs)[0], expected) < 1e-6

    ours = tiny_pipeline()
    assert torch.equal(ours.unet(**inputs)[0], plain)
    factors = match(read_lora(file), ours)
    assert factors.complete
    found = with_bank(ours.unet, [factors.model], ONE, inputs)
    assert relative_error(plain, expected) > 0.1
    assert relative_error(found, expected) < 1e-5


def change(up: Tensor, down: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


@pytest.mark.parametrize("form", ["kohya", "vector", "ai-toolkit", "LoHa", "LoKr"])
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("name", [LINEAR, CONVOLUTION])
def test_the_scales_of_lycoris_are_the_norms_of_outputs_or_inputs(
    pipe: Any, tmp_path: Path, name: str, by_input: bool, form: str
) -> None:
    torch.manual_seed(1)
    weight = pipe.unet.get_submodule(name).weight.detach()
    outputs, inputs, *kernel = weight.shape
    down, up = torch.randn(2, inputs, *kernel), torch.randn(outputs, 2, *[1] * len(kernel))
    tensors, delta = {"lora_down.weight": down, "lora_up.weight": up}, 0.5 * change(up, down)
    if form == "LoHa":
        a, b = torch.randn(outputs, 2), torch.randn(2, inputs * weight[0, 0].numel())
        tensors, delta = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 0, "hada_w2_b": b + 0}, 0.5 * (a @ b) ** 2
    elif form == "LoKr":
        left, right = torch.randn(2, 2, *[1] * len(kernel)), torch.randn(outputs // 2, inputs // 2, *kernel)
        product = torch.einsum("ab,oi...->aobi...", left.view(2, 2), right).reshape(weight.shape)
        tensors, delta = {"lokr_w1": left.view(2, 2), "lokr_w2": right}, product
    vector = form in ("vector", "ai-toolkit")
    axis = int(by_input and not vector)
    norms = 1 + torch.rand(weight.shape[axis])
    shape = [-1 if i == axis else 1 for i in range(weight.dim())]
    scale = norms if vector else norms.view(shape)
    key = f"lora_unet_{name.replace('.', '_')}"
    tensors |= {"magnitude" if form == "ai-toolkit" else "dora_scale": scale, "alpha": torch.tensor(1.0)}
    save_file({f"{key}.{slot}": tensor for slot, tensor in tensors.items()}, tmp_path / "it.safetensors")
    factors = match(read_lora(tmp_path / "it.safetensors"), pipe, products=True).model[name]
    changed = weight.double() + delta.double().view(weight.shape)
    rest = [i for i in range(weight.dim()) if i != axis]
    changed = changed / changed.square().sum(rest, keepdim=True).sqrt() * norms.double().view(shape)
    assert relative_error(factors.change_of(weight).double(), changed - weight) < 1e-5


def with_scales(shape: list[int]) -> dict[str, Any]:
    """A file whose layers are several of the model, as DoRAs."""
    known = layout("kohya-flux")
    (fused,) = [name for name in known["tensors"] if name.endswith("linear1")]
    known["tensors"] = {fused: known["tensors"][fused] | {".dora_scale": shape}}
    return known


def test_norms_of_outputs_are_shared_out_over_the_layers_of_a_model() -> None:
    found = match(file_of(with_scales([21504, 1])), without_weights("FLUX.1")).model
    assert {one.transform.size for one in found.values() if one.transform} == {3072, 12288}


def test_norms_of_inputs_are_those_of_all_layers_that_are_one_in_the_file() -> None:
    found = match(file_of(with_scales([1, 3072])), without_weights("FLUX.1")).model
    for start in {name.partition(".attn")[0].partition(".proj")[0] for name in found}:
        mine: Any = [one.transform for name, one in found.items() if name.startswith(f"{start}.")]
        layers = (*(f"{start}.attn.to_{x}" for x in "qkv"), f"{start}.proj_mlp")
        assert [transform.fused for transform in mine] == [layers] * 4


def test_a_strength_is_a_share_of_the_change(pipe: Any, tmp_path: Path) -> None:
    """PEFT has its scale inside the norm; a gate of a half is half of what the file does."""
    lora = random_lora(pipe.unet, 1, targets=("attn2.to_k",))[LINEAR]
    weight = pipe.unet.get_submodule(LINEAR).weight.detach()
    key = f"unet.{LINEAR}"
    tensors = {f"{key}.lora_A.weight": lora.down, f"{key}.lora_B.weight": lora.up}
    save_file(tensors | {f"{key}.lora_magnitude_vector": 2 * weight.norm(dim=1)}, tmp_path / "it.safetensors")
    found = match(read_lora(tmp_path / "it.safetensors"), pipe).model
    inputs = unet_inputs(pipe.unet)
    whole = weight + found[LINEAR].change_of(weight) / 2
    half = with_bank(pipe.unet, [found], constant_gates((0.5,))[0], inputs)
    layer = pipe.unet.get_submodule(LINEAR)
    layer.weight.data, before = whole, layer.weight.data
    with torch.no_grad():
        expected = pipe.unet(**inputs)[0]
    layer.weight.data = before
    assert relative_error(half, expected) < 1e-5
