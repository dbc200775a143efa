"""Transformers that are offloaded, or whose weights are stored in fewer bits: LoRAs act as on any other model."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from torch import nn

from all_transformers import EVERY
from components import seeded
from nunchaku_layers import AWQ, fits
from pairs import slow_but
from simulated_device import DEVICE, autocast_switched_off, parameters_that_move
from transformer_families import BOXES, CALL, assert_equals_dense_deltas, latents_of, pipeline_with_concepts


def each(*by_default: str) -> Any:
    """Every family; all but those by default are slow."""
    marks = {name: () if name in by_default else pytest.mark.slow for name in EVERY}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


def replaced(model: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> None:
    """Other layers in place of the linear ones of all blocks."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".0." in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made(layer))


def layerwise_casting(transformer: Any, folder: Path) -> None:
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def bitsandbytes(transformer: Any, folder: Path, **kind: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def made(layer: nn.Linear) -> nn.Module:
        to: dict[str, Any] = {"bias": layer.bias is not None}
        if kind:
            quantised = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=torch.float32, **kind, **to
            )
        else:
            quantised = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, **to)
        quantised.load_state_dict(layer.state_dict())
        return quantised.to("cpu").requires_grad_(False)  # it quantises when it is moved

    replaced(transformer, made)


def nf4(transformer: Any, folder: Path) -> None:
    bitsandbytes(transformer, folder, quant_type="nf4")


def torchao(transformer: Any, folder: Path) -> None:
    found = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    found.quantize_(transformer, found.Int8WeightOnlyConfig(), lambda layer, _: isinstance(layer, nn.Linear))


def quanto(transformer: Any, folder: Path) -> None:
    found = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    found.quantize(transformer, weights=found.qint8)
    found.freeze(transformer)


def sdnq(transformer: Any, folder: Path) -> Any:
    found = pytest.importorskip("sdnq", reason="sdnq is not installed")
    return found.sdnq_post_load_quant(transformer, weights_dtype="int8", minimum_allowed_numel=0)


def gguf(transformer: Any, folder: Path) -> Any:
    found = pytest.importorskip("gguf", reason="gguf is not installed")
    writer, kinds = found.GGUFWriter(folder / "model.gguf", "any"), found.GGMLQuantizationType
    layers = dict(transformer.named_modules())
    for name, tensor in transformer.state_dict().items():
        linear = isinstance(layers[name.rpartition(".")[0]], nn.Linear) and ".0." in name
        of_blocks = kinds.Q8_0 if tensor.shape[-1:].numel() % 32 == 0 else kinds.BF16  # GGUF has blocks of 32 weights
        kind = of_blocks if linear and tensor.ndim == 2 else kinds.F32
        writer.add_tensor(name, found.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    transformer.save_config(folder)
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return type(transformer).from_single_file(
        str(folder / "model.gguf"), config=str(folder), quantization_config=config, torch_dtype=torch.float32
    )


def nunchaku_awq(transformer: Any, folder: Path) -> None:
    # Not SVDQuant: it rounds inputs to four bits, so that a difference in the last bit of one may be one of a step.
    replaced(transformer, lambda layer: AWQ(layer) if fits(layer) else layer)


STORED = (layerwise_casting, bitsandbytes, nf4, torchao, quanto, sdnq, gguf, nunchaku_awq)
NOT_READ = {(gguf, "ideogram4")}
"""Families of which diffusers opens no file in this format."""


@pytest.mark.parametrize(
    ("store", "name"),
    [
        pytest.param(store, name, marks=() if name == "flux" else pytest.mark.slow)
        for store, name in product(STORED, EVERY)
        if (store, name) not in NOT_READ
    ],
)
def test_loras_act_on_weights_in_few_bits_as_dense_deltas_beside_them(store, name, tmp_path):
    family = EVERY[name]
    pipe = pipeline_with_concepts(family, tmp_path)
    whole = latents_of(pipe, **family.unguided)
    pipe.transformer = store(pipe.transformer, tmp_path) or pipe.transformer
    assert (latents_of(pipe, **family.unguided) - whole).abs().max() > 1e-4
    before = dict(pipe.transformer.named_parameters())
    for method in ("merge", "regional"):
        assert_equals_dense_deltas(family, pipe, method, guided=bool(family.guided))
    assert all(weight is before[key] for key, weight in pipe.transformer.named_parameters())


def by_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device=DEVICE)


def by_layers(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device=DEVICE)


def by_blocks(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(DEVICE, offload_type="block_level", num_blocks_per_group=1)
    further = ("vae", "text_encoder", "text_encoder_2", "text_conditioner", "unconditional_transformer")
    for part in map(pipe.components.get, further):
        if part is not None:
            part.to(DEVICE)


@each("z-image")
@pytest.mark.parametrize("offload", slow_but([by_layers], [by_models, by_layers, by_blocks]))
def test_an_offloaded_transformer_gives_the_same_images(name, offload, tmp_path):
    family = EVERY[name]
    pipe = pipeline_with_concepts(family, tmp_path)
    call = {**CALL, "num_inference_steps": 1, "output_type": "np", **(family.guided or family.unguided)}

    def image(method: str) -> Any:
        concepts = BOXES if method == "regional" else ["cat", "dog"]
        return pipe(**call, concepts=concepts, method=method, generator=seeded(3)).images

    methods = ("merge", "regional")
    expected = [image(method) for method in methods]
    with parameters_that_move(), autocast_switched_off():
        offload(pipe)
        for method, images in zip(methods, expected, strict=True):
            np.testing.assert_allclose(image(method), images, atol=1e-5)
            places = {weight.device.type for weight in pipe.transformer.parameters()}
            assert places == {"meta" if offload is by_layers else "cpu"}
