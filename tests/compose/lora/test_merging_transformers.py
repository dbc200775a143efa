"""Merged files of transformers: diffusers and our pipelines open them, and the image is that of all files together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from components import seeded
from flux import flux_pipeline
from lora_compose import Concept
from lora_compose.attention import Lora
from lora_compose.compose.benchmark.architectures import without_weights
from lora_compose.compose.cli import app
from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given, merge_files
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.formats.lora_writer import stems
from lora_compose.pipelines.merging import make_merger
from pairs import slow_but
from transformer_families import TOKENS, as_file, random_lora_of_all

BLOCKS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "proj_mlp", "proj_out")


def image(pipe: Any, **more: Any) -> Tensor:
    return pipe(
        "a sks cat and a zwx cat", num_inference_steps=2, height=64, width=64, generator=seeded(), output_type="latent",
        max_sequence_length=TOKENS, **more,
    ).images  # fmt: skip


def blocks(lora: Lora) -> Lora:
    return {name: factors for name, factors in lora.items() if name.endswith(BLOCKS) and "blocks" in name}


def fused(lora: Lora) -> Mapping[str, Tensor]:
    """One fused layer as original checkpoints have it: the outputs of q, k and v one after the other."""
    q, k, v = (lora[f"transformer_blocks.0.attn.to_{one}"] for one in "qkv")
    ups = torch.block_diag(*(factors.up * factors.scale for factors in (q, k, v)))
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    rank = ups.shape[1]
    return {f"{stem}.lora_down.weight": torch.cat([q.down, k.down, v.down]), f"{stem}.lora_up.weight": ups,
            f"{stem}.alpha": torch.tensor(float(rank))}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file in diffusers' keys, and one in those of kohya's scripts, which fuse layers."""
    transformer = flux_pipeline().transformer
    one, other = (blocks(random_lora_of_all(transformer, seed)) for seed in (1, 2))
    save_file(dict(as_file(one)), tmp_path / "one.safetensors")
    save_file(dict(fused(other)), tmp_path / "other.safetensors")
    return tmp_path / "one.safetensors", tmp_path / "other.safetensors"


@pytest.mark.parametrize("first", slow_but([0], [0, 1]))
def test_the_sum_opens_everywhere_and_is_the_image_of_both(
    first: int, files: tuple[Path, Path], tmp_path: Path
) -> None:
    ours = flux_pipeline()
    given = [Given(path.name, read_lora(path), weight) for path, weight in zip(files, (1.0, 0.5), strict=True)]
    out = tmp_path / "out.safetensors"
    merge_files(match_files(given if first == 0 else given[::-1], ours), make_merger("cat"), out)
    assert all(key.startswith("transformer.") for key in load_file(out))

    apart = [Concept(name=str(i), lora=str(one.file.path), weight=one.weight) for i, one in enumerate(given)]
    expected = image(ours, concepts=apart, method="merge")
    together = image(ours, concepts=[Concept(name="both", lora=str(out))], method="merge")
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
    plain = flux_pipeline(FluxPipeline)
    before = image(plain)
    plain.load_lora_weights(out)
    torch.testing.assert_close(image(plain), expected, atol=1e-4, rtol=1e-4)
    assert float((before - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("method", slow_but(["tsv"], ["tsv", "ssr", "iteris"]))
def test_merged_when_loaded_is_as_merged_before(method: str, tmp_path: Path) -> None:
    ours = flux_pipeline()
    paths = []
    for seed, trigger in ((1, "sks"), (2, "zwx")):
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        lora = blocks(random_lora_of_all(ours.transformer, seed))
        save_file(dict(as_file(lora)), paths[-1], {"trigger": trigger, "class_word": "cat"})
    ours.load_concept(paths, "both", merge=method)
    (loaded,) = ours.resolve_concepts(["both"])
    assert loaded.factors.part == "transformer"
    assert len(loaded.factors.model) == len(lora)
    found = image(ours, concepts=["both"], method="merge")
    apart = image(ours, concepts=[Concept(name=path, lora=path) for path in paths], method="merge")
    assert found.isfinite().all()
    assert float((found - apart).abs().max()) > 1e-3


def test_files_of_the_full_model_need_no_model_and_get_diffusers_keys(tmp_path: Path) -> None:
    stem = "lora_unet_single_blocks_3_linear1"
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {}
    for name, inputs, outputs in ((stem, 3072, 7 * 3072), (text, 768, 768)):
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, inputs),
            f"{name}.lora_up.weight": torch.randn(outputs, 2),
        }
    path, out = str(tmp_path / "one.safetensors"), tmp_path / "out.safetensors"
    save_file(tensors, path, {"modelspec.architecture": "flux-1-dev/lora"})
    result = CliRunner().invoke(app, ["merge", path, f"{path}:0.5", "--method", "svd", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = load_file(out)
    single = "transformer.single_transformer_blocks.3"
    layers = {f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v", f"{single}.proj_mlp"}
    layers.add("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    assert {key.partition(".lora_")[0] for key in found} == layers
    delta = found[f"{min(layers)}.lora_B.weight"] @ found[f"{min(layers)}.lora_A.weight"]
    expected = 1.5 * tensors[f"{text}.lora_up.weight"] @ tensors[f"{text}.lora_down.weight"]
    torch.testing.assert_close(delta, expected, atol=1e-3, rtol=1e-3)
    out.unlink()
    refused = CliRunner().invoke(app, ["merge", path, "--keys", "kohya", "--out", str(out)])
    assert refused.exit_code == 2
    assert "write those of diffusers" in " ".join(refused.output.split())
    assert not out.exists()


def test_no_layer_of_a_transformer_is_taken_for_one_of_a_text_encoder() -> None:
    pipe = without_weights("Z-Image")
    assert stems("diffusers", pipe, {"transformer": ["layers.0.attention.to_q"]}) == {
        ("transformer", "layers.0.attention.to_q"): "transformer.layers.0.attention.to_q"
    }
