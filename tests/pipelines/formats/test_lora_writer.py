"""What is written is read: by the safetensors library, by diffusers, and by ourselves."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from anima import anima_pipeline
from components import EVERYTHING, FAMILIES, random_lora, text_loras
from lora_compose.attention import Lora, LoraFactors
from lora_compose.pipelines.concepts.loading import match, read_lora
from lora_compose.pipelines.formats.keys import PARTS
from lora_compose.pipelines.formats.lora_writer import SPELLINGS, FileLayer, Spelling, stems, tensors
from lora_compose.pipelines.formats.safetensors_writer import SafetensorsWriter
from pairs import in_pairs
from reference import dense

FC1 = "encoder.layers.0.mlp.fc1"
PLAIN = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def written(found: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    writer, file = SafetensorsWriter(io.BytesIO()), io.BytesIO()
    for key, tensor in found.items():
        writer.add(key, tensor)
    writer.write(file, metadata or {})
    return file.getvalue()


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@given(st.lists(st.tuples(dtypes, st.lists(st.integers(0, 5), max_size=4)), max_size=6), st.text(max_size=5))
def test_the_safetensors_library_reads_what_is_written(kinds: list[tuple[torch.dtype, list[int]]], name: str) -> None:
    given = {f"{name}{i}": torch.randn(shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    content = written(given, {"what": name})
    found = load(content)
    assert found.keys() == given.keys()
    for key, tensor in given.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_tensors_that_are_no_view_of_their_own_are_written_as_they_look() -> None:
    whole = torch.arange(12.0).view(3, 4)
    found = load(written({"turned": whole.T, "column": whole[:, 1]}))
    assert torch.equal(found["turned"], whole.T)
    assert torch.equal(found["column"], whole[:, 1])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, torch.nan]), "it has values that torch.float32 cannot hold"),
        (torch.tensor([1e6]).half(), "it has values that torch.float16 cannot hold; write float32"),
        (torch.tensor([1]), "it is there already, or of type torch.int64"),
    ],
)
def test_numbers_that_make_no_lora_are_refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafetensorsWriter(io.BytesIO()).add("it", tensor)


def test_two_tensors_of_one_name_are_refused() -> None:
    writer = SafetensorsWriter(io.BytesIO())
    writer.add("it", torch.ones(1))
    with pytest.raises(ValueError, match="it is there already"):
        writer.add("it", torch.ones(1))


def everywhere(pipe: Any) -> dict[str, Lora]:
    """Factors for layers of every kind, of two ranks."""
    lora = random_lora(pipe.unet, 1, targets=EVERYTHING)
    # diffusers reads kohya's keys of a text encoder only where out_proj is among them, as it always is
    text = text_loras(pipe, 3, targets=("q_proj", "v_proj", "out_proj", "fc1"))
    return {"unet": {**lora, **random_lora(pipe.unet, 2, rank=2, targets=("to_k", "conv1"))}, **text}


def write(path: Path, pipe: Any, loras: dict[str, Lora], spelling: Spelling) -> Path:
    called = stems(spelling, pipe, {part: [*loras.get(part, {})] for part in PARTS})
    found: dict[str, Tensor] = {}
    for part, lora in loras.items():
        for name, factors in lora.items():
            layer = FileLayer(
                next(stem for (p, n), stem in called.items() if (p, n) == (part, name)), factors.down.shape[2:]
            )
            change = LoraFactors(factors.down.flatten(1), factors.up.flatten(1))
            found |= tensors(spelling, layer, change, torch.float32, 3)
    path.write_bytes(written(found))
    return path


@pytest.mark.parametrize(("family", "spelling"), in_pairs(["sd", "sdxl"], SPELLINGS))
def test_layers_of_all_kinds_are_what_diffusers_and_we_read(family: str, spelling: Spelling, tmp_path: Path) -> None:
    pipe = FAMILIES[family](PLAIN[family])
    loras = everywhere(pipe)
    path = write(tmp_path / "it.safetensors", pipe, loras, spelling)
    found = match(read_lora(path), pipe)
    assert found.complete, found.report
    read: dict[Any, Any] = dict(found.by_part)
    assert {part: lora.keys() for part, lora in read.items()} == {part: lora.keys() for part, lora in loras.items()}
    pipe.load_lora_weights(str(path), adapter_name="it")
    for part, lora in loras.items():
        for name, factors in lora.items():
            torch.testing.assert_close(dense(read[part][name]), dense(factors))
            layer = getattr(pipe, part).get_submodule(name)
            torch.testing.assert_close(layer.get_delta_weight("it"), dense(factors), msg=lambda m, n=name: f"{n}: {m}")


def test_kohyas_keys_of_sdxl_have_the_original_names_of_blocks() -> None:
    pipe = FAMILIES["sdxl"]()
    called = stems("kohya", pipe, {"unet": ["down_blocks.1.attentions.0.proj_in"], "text_encoder_2": [FC1]})
    assert [*called.values()] == ["lora_unet_input_blocks_3_1_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"]


def test_only_layers_of_clip_have_an_outer_name() -> None:
    pipe = anima_pipeline()
    called = stems(
        "diffusers", pipe, {"text_conditioner": ["blocks.0.mlp.0"], "text_encoder": ["layers.0.mlp.up_proj"]}
    )
    assert [*called.values()] == ["text_conditioner.blocks.0.mlp.0", "text_encoder.layers.0.mlp.up_proj"]
    called = stems("diffusers", pipe, {"text_encoder": [FC1, f"text_model.{FC1}"]})  # transformers 5, and 4
    assert {*called.values()} == {f"text_encoder.text_model.{FC1}"}
    with pytest.raises(ValueError, match="write those of diffusers"):
        stems("kohya", pipe, {"text_conditioner": ["blocks.0.mlp.0"]})


def test_a_change_of_rank_0_is_not_written() -> None:
    assert [*tensors("kohya", FileLayer("it"), LoraFactors(torch.ones(0, 3), torch.ones(4, 0)), torch.float32, 3)] == []
