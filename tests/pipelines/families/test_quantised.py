"""Models in fewer bits, by a name or from a file: LoRAs act as on any other model; what is refused."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints import write_gguf
from components import sd_unet, small_pipeline
from flux import FLUX, flux_pipeline
from lora_compose import ComposePipeline
from lora_compose.pipelines.families.quantised import quantised_components, quantising_options
from pairs import slow_but
from transformer_families import as_file, assert_equals_dense_deltas, latents_of, random_lora_of_all
from z_image import Z_IMAGE


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    flux_pipeline().save_pretrained(folder / "model")
    return folder / "model"


def opened(folder: Path, quantize: str | None, **options: Any) -> Any:
    pipe: Any = ComposePipeline.from_pretrained(folder, quantize=quantize, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_concepts(pipe: Any, folder: Path) -> Any:
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        save_file(dict(as_file(random_lora_of_all(pipe.transformer, seed))), folder / f"{name}.safetensors")
        pipe.load_concept(folder / f"{name}.safetensors", trigger=trigger, class_word=name)
    return pipe


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in opened(folder, None).transformer.state_dict().items()}


def is_scaled(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2


def by_layer(tensors: dict[str, Tensor], scale: str, **more: Tensor) -> dict[str, Tensor]:
    """As ComfyUI writes them: one scale for each linear layer."""
    made = dict(more)
    for name, tensor in tensors.items():
        if is_scaled(name, tensor):
            size = tensor.abs().max() / 448
            made[name] = (tensor / size).to(torch.float8_e4m3fn)
            made[f"{name.removesuffix('.weight')}.{scale}"] = size
        else:
            made[name] = tensor
    return made


def of_comfyui(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = by_layer(tensors, "scale_weight", scaled_fp8=torch.zeros(2).to(torch.float8_e4m3fn))
    return made | {name.replace("scale_weight", "scale_input"): torch.ones(()) for name in made if "scale_w" in name}


def of_comfyui_since(tensors: dict[str, Tensor], kind: str = "float8_e4m3fn") -> dict[str, Tensor]:
    made = by_layer(tensors, "weight_scale")
    mark = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    return made | {name.replace("weight_scale", "comfy_quant"): mark.clone() for name in made if "weight_scale" in name}


def by_output(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Black Forest Labs write them."""
    made = {}
    for name, tensor in tensors.items():
        if is_scaled(name, tensor):
            size = tensor.abs().amax(dim=1) / 448
            made[name] = (tensor / size[:, None]).to(torch.float8_e4m3fn)
            made[f"{name.removesuffix('.weight')}.weight_scale"] = size
        else:
            made[name] = tensor
    return made


def without_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.to(torch.float8_e4m3fn) if is_scaled(name, tensor) else tensor for name, tensor in tensors.items()
    }


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a file stands for, from its own numbers."""
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        scale = next(
            (tensors[f"{stem}.{end}"] for end in ("scale_weight", "weight_scale") if f"{stem}.{end}" in tensors), None
        )
        found[name] = tensor.float() if scale is None or name == stem else tensor.float() * scale.view(-1, 1)
    return found


@pytest.mark.parametrize(
    "written", slow_but([of_comfyui_since, without_scales], [of_comfyui, of_comfyui_since, by_output, without_scales])
)
def test_a_file_in_float8_is_opened_as_its_dequantised_weights(
    written: Callable[..., dict[str, Tensor]], flux_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "flux-fp8.safetensors"
    tensors = written(tensors_of(flux_folder))
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, file)
    pipe, whole = opened(flux_folder, str(file)), opened(flux_folder, None)
    call = {"num_inference_steps": 1, **FLUX.unguided}
    plain = latents_of(whole, **call)
    expected = {name: tensor for name, tensor in dequantised(tensors).items() if name in whole.transformer.state_dict()}
    whole.transformer.load_state_dict(expected)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == torch.float8_e4m3fn
    found = latents_of(pipe, **call)
    if written is not without_scales:  # layerwise casting leaves embeddings and norms in full precision
        torch.testing.assert_close(found, latents_of(whole, **call), atol=1e-5, rtol=0)
    assert 1e-4 < (found - plain).abs().max() < 1


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Z-Image's tensors under the names of its original checkpoint."""
    names = {
        "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.", ".attention.norm_k.": ".attention.k_norm.",
        ".attention.norm_q.": ".attention.q_norm.",
    }  # fmt: skip
    made = {}
    for name, tensor in tensors.items():
        for ours, original in names.items():
            name = name.replace(ours, original)
        made[name] = tensor
    for name in [name for name in made if name.endswith("attention.to_q.weight")]:
        parts = [made.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        made[name.replace("to_q", "qkv")] = torch.cat(parts)
    return made


def test_an_original_checkpoint_of_comfyui_in_float8_is_split_with_its_scales(tmp_path: Path) -> None:
    whole = Z_IMAGE.pipeline()
    whole.save_pretrained(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in whole.transformer.state_dict().items()}
    tensors = of_comfyui(fused(before))
    save_file({f"model.diffusion_model.{name}": one for name, one in tensors.items()}, tmp_path / "z.safetensors")
    pipe = opened(tmp_path / "model", str(tmp_path / "z.safetensors"))
    quantised = [name for name, layer in pipe.transformer.named_modules() if type(layer).__name__ == "BFLFP8RLinear"]
    assert any("attention.to_v" in name for name in quantised)
    for name, layer in pipe.transformer.named_modules():
        if name in quantised:
            dense = layer.weight.float() * layer.weight_scale[:, None]
            assert (dense - before[f"{name}.weight"]).abs().max() < 0.05 * before[f"{name}.weight"].abs().max()
    assert_equals_dense_deltas(Z_IMAGE, with_concepts(pipe, tmp_path), "regional", guided=False)


def test_fp8_needs_nothing_but_diffusers(flux_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = latents_of(opened(flux_folder, None), **FLUX.unguided)
    with caplog.at_level("INFO", "lora_compose"):
        pipe = with_concepts(opened(flux_folder, "fp8"), tmp_path)
    assert "fp8: transformer" in caplog.text
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert pipe.text_encoder_2.dtype == pipe.transformer.dtype == torch.float32
    assert 1e-4 < (latents_of(pipe, **FLUX.unguided) - plain).abs().max() < 1
    assert_equals_dense_deltas(FLUX, pipe, "regional")


def test_a_unet_in_fp8_from_a_folder(tmp_path: Path) -> None:
    small_pipeline(unet=sd_unet()).save_pretrained(tmp_path)
    pipe = opened(tmp_path, "fp8")
    types = {layer.weight.dtype for layer in pipe.unet.modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert torch.float8_e4m3fn in types
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32


def test_int8_is_of_the_denoiser_and_large_text_encoders(flux_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    pipe = opened(flux_folder, "int8", dtype=torch.bfloat16)
    parts = {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    layers = {name: [layer for layer in part.modules() if isinstance(layer, nn.Linear)] for name, part in parts.items()}
    counts = {name: sum(type(one.weight.data) is not Tensor for one in found) for name, found in layers.items()}
    assert counts["text_encoder"] == 0
    assert counts["transformer"] > len(layers["transformer"]) / 2
    assert counts["text_encoder_2"] > len(layers["text_encoder_2"]) / 2
    pipe = with_concepts(opened(flux_folder, "int8"), tmp_path)
    assert_equals_dense_deltas(FLUX, pipe, "regional")


def test_a_gguf_file_is_opened_with_the_configuration_of_the_model(flux_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    write_gguf(tensors_of(flux_folder), tmp_path / "flux-Q8_0.gguf")
    pipe = opened(flux_folder, str(tmp_path / "flux-Q8_0.gguf"))
    names = [name for name, layer in pipe.transformer.named_modules() if type(layer).__name__ == "GGUFLinear"]
    assert any("attn.to_q" in name for name in names)
    assert_equals_dense_deltas(FLUX, with_concepts(pipe, tmp_path), "regional")


CONFIG = {
    "_class_name": "FluxPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.mark.parametrize(("changes", "quantize", "expected"), [
    ({}, "nf4", ("transformer", "text_encoder_2")), ({}, "fp8", ("transformer",)), ({}, "a.gguf", ("transformer",)),
    ({"text_encoder_2": [None, None]}, "int8", ("transformer",)),
    ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "unet": ["diffusers", "U"]}, "nf4", ("unet",)),
    ({"text_encoder": ["transformers", "Qwen3Model"]}, "int8", ("transformer", "text_encoder", "text_encoder_2")),
])  # fmt: skip
def test_the_denoiser_and_text_encoders_that_are_not_clip_are_quantised(changes, quantize, expected) -> None:
    assert quantised_components(CONFIG | changes, quantize) == expected


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_nf4_asks_diffusers_for_bitsandbytes_on_a_gpu(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"nf4 needs a GPU, .* use int8, fp8 or a GGUF file"):
            opened(flux_folder, "nf4")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = quantising_options("nf4", str(flux_folder), {"dtype": torch.bfloat16})["quantization_config"].quant_mapping
    assert {name: type(one).__module__.partition(".")[0] for name, one in asked.items()} == {
        "transformer": "diffusers", "text_encoder_2": "transformers"
    }  # fmt: skip
    assert {(one.bnb_4bit_quant_type, one.bnb_4bit_compute_dtype) for one in asked.values()} == {
        ("nf4", torch.bfloat16)
    }


@pytest.mark.parametrize(("quantize", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("a.gguf", "gguf")])
def test_a_missing_package_is_named_with_the_line_to_type(quantize: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    given = str(tmp_path / quantize) if "." in quantize else quantize
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install {package}, or"):
        quantising_options(given, "nowhere", {})


@pytest.mark.parametrize(("quantize", "message"), [
    ("nf5", "expected fp8, int8, nf4, or a file .*did you mean 'nf4'"), ("flux.ckpt", "FILE.gguf, or FILE.safetensors"),
    ("flux.gguf", "there is no file 'flux.gguf'"),
])  # fmt: skip
def test_what_is_no_name_and_no_file_is_refused(quantize: str, message: str, flux_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        opened(flux_folder, quantize)


def test_layers_are_not_quantised_twice_in_two_ways(flux_folder: Path) -> None:
    with pytest.raises(ValueError, match="quantize='fp8' and transformer are for the same layers; give one"):
        opened(flux_folder, "fp8", transformer=flux_pipeline().transformer)


@pytest.mark.parametrize(("made", "message"), [
    (lambda t: t, "has no weights in float8; expected a denoiser in fp8, or a GGUF file"),
    (lambda t: of_comfyui_since(t, "mxfp8"), "is in mxfp8, a layout of ComfyUI that diffusers does not read"),
    (lambda t: by_output(t) | {"a.weight_scale_2": torch.ones(())}, "is in NVFP4, whose scales are stored"),
    (lambda t: by_output(t) | {"transformer_blocks.0.attn.to_q.weight_scale": torch.ones(3)}, "with 3 scales"),
])  # fmt: skip
def test_files_in_other_layouts_are_refused(made: Any, message: str, flux_folder: Path, tmp_path: Path) -> None:
    save_file(made(tensors_of(flux_folder)), tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=message):
        opened(flux_folder, str(tmp_path / "flux.safetensors"))


def test_a_whole_model_in_one_file_takes_fp8_alone(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.raises(ValueError, match="is opened with quantize='fp8' or without; for int8, name its folder"):
        ComposePipeline.from_single_file(tmp_path / "model.safetensors", quantize="int8")
