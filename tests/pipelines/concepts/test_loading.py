"""LoRA files of every spelling give what diffusers itself makes of them, and bad files are refused with a reason."""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from components import EVERYTHING, random_lora, tiny_pipeline, tiny_unet
from lora_compose import ComposePipeline, Concept
from lora_compose.attention import Lora
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.loading import Factors, LoraError, adapter_factors, match, read_lora
from reference import deltas

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Is never changed here."""
    return tiny_pipeline()


@pytest.fixture(scope="module")
def unet_lora(pipe: Any) -> Lora:
    """Linear layers and convolutions of every kind that kohya's names can express."""
    return random_lora(pipe.unet, 1, targets=EVERYTHING)


@pytest.fixture(scope="module")
def attention_lora(pipe: Any) -> Lora:
    return random_lora(pipe.unet, 2, rank=2)


@pytest.fixture(scope="module")
def text_lora(pipe: Any) -> Lora:
    return random_lora(pipe.text_encoder, 3, rank=4, targets=TEXT_TARGETS)


def spelled(lora: Lora, key: Callable[[str], str], down: str, up: str, alpha: float | None = None) -> dict[str, Tensor]:
    """The tensors of a file: `key` turns a layer's name into the file's."""
    tensors = {}
    for name, factors in lora.items():
        tensors[key(name) + down] = factors.down
        tensors[key(name) + up] = factors.up
        if alpha is not None:
            tensors[f"{key(name)}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, {"format": "pt", **metadata})
    return path


def loaded(pipe: Any, path: Path) -> Factors:
    return match(read_lora(path), pipe)


def deltas_of_peft(pipe: Any, adapter: str) -> dict[str, Tensor]:
    """The change of every weight by an adapter, from PEFT."""
    found = {}
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipe, part).named_modules():
            if isinstance(module, Linear | Conv2d) and adapter in module.scaling:
                found[f"{part}.{name}"] = module.get_delta_weight(adapter).detach()
    return found


def deltas_of_diffusers(path: Path) -> dict[str, Tensor]:
    """What diffusers' own pipeline makes of a file."""
    plain = tiny_pipeline(StableDiffusionPipeline)
    plain.load_lora_weights(str(path), adapter_name="it")
    return deltas_of_peft(plain, "it")


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) > 0
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, msg=lambda text, name=name: f"{name}: {text}")
        assert delta.abs().max() > 0.01


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def kohya_text(name: str) -> str:
    return f"lora_te_text_model_{name.replace('.', '_')}"


def unet_key(name: str) -> str:
    return f"unet.{name}"


def text_key(name: str) -> str:
    return f"text_encoder.text_model.{name}"


# Spellings that diffusers reads too.


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
    ],
)
def test_unet_keys_of_diffusers(pipe: Any, unet_lora: Lora, tmp_path: Path, down: str, up: str) -> None:
    path = write(tmp_path / "cat.safetensors", spelled(unet_lora, unet_key, down, up))
    factors = loaded(pipe, path)
    assert factors.unmatched == ()
    assert factors.text_encoders == {}
    assert factors.report == f"{len(unet_lora)} unet layers, rank 3"
    assert_same(deltas(factors), deltas_of_diffusers(path))


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_kohya_keys(pipe: Any, unet_lora: Lora, text_lora: Lora, tmp_path: Path, alpha: float | None) -> None:
    tensors = spelled(unet_lora, kohya, ".lora_down.weight", ".lora_up.weight", alpha)
    tensors |= spelled(
        text_lora, kohya_text, ".lora_down.weight", ".lora_up.weight", None if alpha is None else alpha / 2
    )
    path = write(tmp_path / "cat.safetensors", tensors)
    factors = loaded(pipe, path)
    assert factors.unmatched == ()
    assert (len(factors.model), len(factors.text_encoders["text_encoder"])) == (len(unet_lora), len(text_lora))
    assert {found.scale for found in factors.model.values()} == {1.0 if alpha is None else alpha / 3}
    assert_same(deltas(factors), deltas_of_diffusers(path))


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"lora_alpha": 12}, marks=pytest.mark.slow),
        {"lora_alpha": 12, "use_rslora": True},
        {"lora_alpha": 5, "alpha_pattern": {"to_q": 1.5, "attn2.to_v": 9, r".*\.proj_in": 2}},
        {"lora_alpha": 5, "rank_pattern": {"attn1.to_k": 5}, "use_rslora": True},
    ],
)
def test_alphas_from_the_configuration_that_diffusers_saves(pipe: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    plain = tiny_pipeline(StableDiffusionPipeline)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]
    plain.unet.add_adapter(LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **config), "default")
    text = LoraConfig(r=2, lora_alpha=7, target_modules=list(TEXT_TARGETS), init_lora_weights=False)
    inject_adapter_in_model(text, plain.text_encoder, "default")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        **{
            f"{part}_lora_layers": get_peft_model_state_dict(getattr(plain, part), adapter_name="default")
            for part in ("unet", "text_encoder")
        },  # pyright: ignore[reportArgumentType]
        weight_name="cat.safetensors",
        **_collate_lora_metadata({"unet": plain.unet, "text_encoder": plain.text_encoder}),  # pyright: ignore[reportArgumentType]
    )
    file = read_lora(tmp_path / "cat.safetensors")
    assert "lora_adapter_metadata" in file.metadata
    factors = match(file, pipe)
    assert factors.unmatched == ()
    assert_same(deltas(factors), deltas_of_peft(plain, "default"))
    scales = {found.scale for found in factors.model.values()}
    assert (scales == {8 / 3}) == (config == {}), "the settings are to change something"


def test_a_file_that_a_model_of_diffusers_has_saved_itself(pipe: Any, tmp_path: Path) -> None:
    """`save_lora_adapter` writes keys and settings without a component's name."""
    plain = tiny_pipeline(StableDiffusionPipeline)
    settings = LoraConfig(
        r=2, lora_alpha=8, alpha_pattern={"attn2.to_k": 3}, target_modules=["to_q", "to_k"], init_lora_weights=False
    )
    plain.unet.add_adapter(settings, "default")
    plain.unet.save_lora_adapter(tmp_path, adapter_name="default")
    factors = loaded(pipe, tmp_path / "pytorch_lora_weights.safetensors")
    assert factors.complete
    assert_same(deltas(factors), deltas_of_peft(plain, "default"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "orthogonal"])
def test_a_lora_that_began_as_a_part_of_the_weights_is_refused(pipe: Any, tmp_path: Path, start: Any) -> None:
    """Its factors alone are not the change that was trained; those of other starts are."""
    plain, name = tiny_pipeline(StableDiffusionPipeline), TO_Q
    before = plain.unet.get_submodule(name).weight.detach().clone()
    plain.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=start), "default")
    layer = plain.unet.get_submodule(name)
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    plain.unet.save_lora_adapter(tmp_path, adapter_name="default")
    file = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    trained = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach() - before
    if start == "orthogonal":
        torch.testing.assert_close(match(file, pipe).model[name].delta(), trained, atol=1e-5, rtol=1e-4)
        return
    assert float((layer.get_delta_weight("default").detach() - trained).norm()) > float(trained.norm())
    with pytest.raises(LoraError, match=f"began as a part of the model's weights .init_lora_weights is '{start}'"):
        match(file, pipe)


# Spellings that diffusers does not read: the same tensors under diffusers' keys say what is right.


@pytest.mark.parametrize(
    ("key", "down", "up"),
    [
        (str, ".lora_A.weight", ".lora_B.weight"),
        ("base_model.model.{}".format, ".lora_A.weight", ".lora_B.weight"),
        ("base_model.model.unet.{}".format, ".lora_A.weight", ".lora_B.weight"),
        (unet_key, ".lora_A.default.weight", ".lora_B.default.weight"),
        (str, ".lora.down.weight", ".lora.up.weight"),
    ],
    ids=["bare", "peft", "peft-unet", "adapter-name", "bare-old"],
)
def test_other_spellings_give_the_same(
    pipe: Any, unet_lora: Lora, tmp_path: Path, key: Callable[[str], str], down: str, up: str
) -> None:
    usual = write(tmp_path / "usual.safetensors", spelled(unet_lora, unet_key, ".lora_A.weight", ".lora_B.weight"))
    factors = loaded(pipe, write(tmp_path / "cat.safetensors", spelled(unet_lora, key, down, up)))
    assert factors.unmatched == ()
    assert_same(deltas(factors), deltas(loaded(pipe, usual)))


def test_alpha_keys_beside_diffusers_keys_and_over_the_configuration(
    pipe: Any, attention_lora: Lora, tmp_path: Path
) -> None:
    tensors = spelled(attention_lora, unet_key, ".lora_A.weight", ".lora_B.weight", alpha=6.0)
    config = json.dumps({"unet.lora_alpha": 40})
    del tensors[f"unet.{TO_Q}.alpha"]
    factors = loaded(pipe, write(tmp_path / "cat.safetensors", tensors, lora_adapter_metadata=config))
    assert factors.model[TO_Q].scale == 20.0
    assert {found.scale for name, found in factors.model.items() if name != TO_Q} == {3.0}


@pytest.mark.parametrize("outer", ["text_model.", ""])
@pytest.mark.parametrize("start", ["", "^"])
def test_patterns_of_alphas_with_and_without_the_outer_name_of_text_encoders(
    pipe: Any, text_lora: Lora, tmp_path: Path, outer: str, start: str
) -> None:
    """Files of transformers 4 have it, those of transformers 5 have not."""
    bare = {name.removeprefix("text_model."): name for name in text_lora}
    first, *others = bare
    tensors = {
        f"text_encoder.{outer}{name}.lora_{side}.weight": tensor
        for name, own in bare.items()
        for side, tensor in (("A", text_lora[own].down), ("B", text_lora[own].up))
    }
    config = {"text_encoder.r": 4, "text_encoder.lora_alpha": 4}
    config |= {"text_encoder.alpha_pattern": {f"{start}{outer}{first}": 20}}
    path = write(tmp_path / "cat.safetensors", tensors, lora_adapter_metadata=json.dumps(config))
    scales = {name: found.scale for name, found in loaded(pipe, path).text_encoders["text_encoder"].items()}
    assert scales == {bare[first]: 5.0, **{bare[name]: 1.0 for name in others}}


@pytest.mark.parametrize("alpha", [torch.tensor(6), torch.tensor([6.0]), torch.tensor(6.0, dtype=torch.float16)])
def test_alphas_may_be_whole_numbers(pipe: Any, attention_lora: Lora, tmp_path: Path, alpha: Tensor) -> None:
    tensors = spelled(attention_lora, kohya, ".lora_down.weight", ".lora_up.weight", alpha=1.0)
    tensors = {key: alpha if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    factors = loaded(pipe, write(tmp_path / "cat.safetensors", tensors))
    assert {found.scale for found in factors.model.values()} == {3.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_precision(pipe: Any, attention_lora: Lora, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = spelled(attention_lora, unet_key, ".lora_A.weight", ".lora_B.weight")
    factors = loaded(pipe, write(tmp_path / "cat.safetensors", {key: t.to(dtype) for key, t in tensors.items()}))
    name, found = next(iter(factors.model.items()))
    assert found.down.dtype == dtype
    assert torch.equal(found.down, attention_lora[name].down.to(dtype))


def test_compiled_models_take_the_same_files(unet_lora: Lora, text_lora: Lora, tmp_path: Path) -> None:
    tensors = spelled(unet_lora, unet_key, ".lora_A.weight", ".lora_B.weight")
    tensors |= spelled(text_lora, text_key, ".lora_A.weight", ".lora_B.weight")
    path = write(tmp_path / "cat.safetensors", tensors)
    pipe = tiny_pipeline()
    expected = loaded(pipe, path)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    assert_same(deltas(loaded(pipe, path)), deltas(expected))


# What is known from the file, and what is left over.


def concept_file(path: Path, **metadata: str) -> Path:
    lora = random_lora(tiny_unet(), 1, rank=2, targets=("attn2.to_k",))
    return write(path, spelled(lora, unet_key, ".lora_A.weight", ".lora_B.weight"), **metadata)


def test_name_trigger_and_class_word_come_from_the_file_unless_given(tmp_path: Path) -> None:
    pipe: ComposePipeline = tiny_pipeline()
    path = concept_file(tmp_path / "my cat.safetensors", trigger="sks", class_word="cat", method="tara")
    known = Concept(name="my cat", lora=str(path), trigger="sks", class_word="cat", weight=1.0)
    assert pipe.load_concept(path) == known
    other = pipe.load_concept(str(path), name="tiger", trigger="zwx", weight=0.5)
    assert other == known.model_copy(update={"name": "tiger", "trigger": "zwx", "weight": 0.5})
    bare = pipe.load_concept(concept_file(tmp_path / "dog.safetensors", trigger=""))
    assert not bare.trigger
    assert bare.class_word is None
    assert pipe.concepts == {"my cat": known, "tiger": other, "dog": bare}
    first, _, last = pipe.resolve_concepts(["my cat", "tiger", "dog"])
    assert (first.trained_with, last.trained_with) == ("tara", None)
    assert first.files
    assert first.files[0].metadata["trigger"] == "sks"


def test_keys_without_a_layer_are_reported_and_warned_about(
    attention_lora: Lora, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe: Any = tiny_pipeline()
    tensors = spelled(attention_lora, unet_key, ".lora_A.weight", ".lora_B.weight")
    tensors["unet.down_blocks.7.attn.to_q.lora_A.weight"] = torch.ones(2, 8)
    tensors["unet.down_blocks.7.attn.to_q.lora_B.weight"] = torch.ones(8, 2)
    tensors["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 8)
    path = write(tmp_path / "cat.safetensors", tensors)
    factors = loaded(pipe, path)
    assert len(factors.model) == len(attention_lora)
    left_over = (
        "unet.down_blocks.7.attn.to_q.lora_A.weight",
        "unet.down_blocks.7.attn.to_q.lora_B.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    )
    assert factors.unmatched == left_over
    assert "3 keys fit no layer and are left out" in factors.report
    with caplog.at_level(logging.WARNING, logger="lora_compose"):
        pipe.load_concept(path)
    (record,) = [record for record in caplog.records if record.name.startswith("lora_compose.pipelines")]
    assert record.levelno == logging.WARNING
    for part in ("cat.safetensors", f"{len(attention_lora)} unet layers", *left_over):
        assert part in record.getMessage()


def test_complete_files_are_loaded_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe: Any = tiny_pipeline()
    with caplog.at_level(logging.WARNING):
        pipe.load_concept(concept_file(tmp_path / "cat.safetensors"))
    assert [record.getMessage() for record in caplog.records] == []


# Refusals.


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".PT"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cat{suffix}"
    path.write_bytes(b"whatever")
    with pytest.raises(LoraError, match=rf"cat{re.escape(suffix)} is a pickle.*convert it to safetensors"):
        read_lora(path)
    with pytest.raises(LoraError, match="is a pickle"):
        find_file(tmp_path / f"missing{suffix}")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise AssertionError('a pickle was opened')",)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_named_safetensors_are_refused(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "cat.safetensors"
    path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    with pytest.raises(LoraError, match="a pickle or an archive under another name"):
        read_lora(path)


def test_archives_named_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    torch.save({"lora_A.weight": torch.ones(2)}, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(LoraError, match="a pickle or an archive under another name"):
        read_lora(path)


@pytest.mark.parametrize("header", [640, 1152, 0x4B50])
def test_sound_files_whose_length_looks_like_a_pickle_are_read(tmp_path: Path, header: int) -> None:
    """The first bytes are the length of the header, which may be those that begin a pickle or an archive."""
    path = tmp_path / "cat.safetensors"
    missing = header - header_length_with_padding(path, 0)
    assert header_length_with_padding(path, missing) == header
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
    assert len(read_lora(path).tensors) == 2


def header_length_with_padding(path: Path, padding: int) -> int:
    tensors = {f"unet.{TO_Q}.lora_A.weight": torch.ones(2, 8), f"unet.{TO_Q}.lora_B.weight": torch.ones(8, 2)}
    return int.from_bytes(write(path, tensors, note="x" * padding).read_bytes()[:8], "little")


@pytest.mark.parametrize(("where", "value"), [("down", float("nan")), ("up", float("inf")), ("alpha", -float("inf"))])
def test_values_that_are_not_finite_are_refused(attention_lora: Lora, tmp_path: Path, value: float, where: str) -> None:
    tensors = spelled(attention_lora, kohya, ".lora_down.weight", ".lora_up.weight", alpha=1.0)
    key = next(key for key in tensors if where in key.rpartition("lora_unet")[2].partition(".")[2])
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = value
    with pytest.raises(LoraError, match=rf"{re.escape(key)} has values that are NaN or infinite"):
        read_lora(write(tmp_path / "cat.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_ordinary_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"unet.x.lora_A.weight": torch.ones(2, 8).to(dtype), "unet.x.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(LoraError, match=r"unet.x.lora_A.weight is stored as \S+; expected float32"):
        read_lora(write(tmp_path / "cat.safetensors", tensors))


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["weight"],
        ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"],
        ["down_blocks.0.conv.weight"],
    ],
    ids=["empty", "one", "checkpoint", "unet"],
)
def test_files_without_lora_keys_are_refused(tmp_path: Path, keys: Sequence[str]) -> None:
    path = write(tmp_path / "cat.safetensors", {key: torch.ones(2) for key in keys})
    found = re.escape(", ".join(sorted(keys)) or "none")
    with pytest.raises(LoraError, match=f"cat.safetensors is not a LoRA: expected keys .* found {found}$"):
        read_lora(path)


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PLAIN = {f"{LAYER}.lora_down.weight": torch.ones(2, 8), f"{LAYER}.lora_up.weight": torch.ones(8, 2)}
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER_KINDS = {
    "an OFT of an early LyCORIS": {f"{LAYER}.oft_diag": torch.ones(2, 4, 4)},
    "a GLoRA": {f"{LAYER}.{side}{i}.weight": torch.ones(2, 2) for i in (1, 2) for side in "ab"},
    "an IA3": {f"{LAYER}.weight": torch.ones(8), f"{LAYER}.on_input": torch.ones(1)},
}


def test_unknown_keys_of_a_layer_that_is_read_are_more_than_left_over(pipe: Any, tmp_path: Path) -> None:
    """As of MoSLoRA, whose factors have a third one between them."""
    mixed = PLAIN | {f"{LAYER}.lora_mixer.weight": torch.eye(2), "lora_unet_elsewhere.lora_mixer.weight": torch.eye(2)}
    report = loaded(pipe, write(tmp_path / "cat.safetensors", mixed)).report
    assert "2 keys fit no layer and are left out" in report
    assert f"1 of the keys that are left out belong to layers that are read ({LAYER}.lora_mixer.weight)" in report


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused_by_name(pipe: Any, tmp_path: Path, kind: str) -> None:
    with pytest.raises(LoraError, match=rf"is {kind}, (which|whose) "):
        loaded(pipe, write(tmp_path / "cat.safetensors", OTHER_KINDS[kind]))


def test_a_dora_by_its_configuration_alone_is_incomplete(pipe: Any, attention_lora: Lora, tmp_path: Path) -> None:
    tensors = spelled(attention_lora, unet_key, ".lora_A.weight", ".lora_B.weight")
    config = json.dumps({"unet.use_dora": True, "unet.lora_alpha": 4})
    with pytest.raises(LoraError, match=r"is a DoRA by its settings \(use_dora\), but has no tensors of one"):
        loaded(pipe, write(tmp_path / "cat.safetensors", tensors, lora_adapter_metadata=config))


def test_two_adapters_in_one_file_are_refused(pipe: Any, attention_lora: Lora, tmp_path: Path) -> None:
    tensors = spelled(attention_lora, unet_key, ".lora_A.cat.weight", ".lora_B.cat.weight")
    tensors |= spelled(attention_lora, unet_key, ".lora_A.dog.weight", ".lora_B.dog.weight")
    with pytest.raises(LoraError, match=r"more than one LoRA for unet.*expected one adapter"):
        loaded(pipe, write(tmp_path / "cat.safetensors", tensors))


def test_files_for_a_wider_model_are_refused_with_both_shapes(pipe: Any, tmp_path: Path) -> None:
    wider = random_lora(tiny_unet(block_out_channels=(16, 16)), 1, rank=2, targets=("attn1.to_q",))
    path = write(tmp_path / "cat.safetensors", spelled(wider, unet_key, ".lora_A.weight", ".lora_B.weight"))
    with pytest.raises(LoraError, match=r"cat.safetensors does not fit this model: unet\.down_blocks.*") as caught:
        loaded(pipe, path)
    assert "its change is 16 x 16, the model's weight 8 x 8" in str(caught.value)


FOREIGN = {
    "flux": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
    "sd3": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "flux kohya": [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
    ],
    "wan": ["diffusion_model.blocks.0.self_attn.q.lora_down.weight"],
    "kohya without layers": ["lora_unet_nothing.lora_down.weight", "lora_unet_nothing.lora_up.weight"],
    "no name of a layer": ["lora_A.weight", "lora_B.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_for_other_architectures_are_refused(pipe: Any, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "cat.safetensors", {key: torch.ones(2, 2) for key in FOREIGN[kind]})
    with pytest.raises(LoraError, match=r"matches no layer of this model|is not a LoRA"):
        loaded(pipe, path)


DAMAGED_SETTINGS = {
    "no JSON": "{",
    "a list": "[1, 2]",
    "alpha in words": json.dumps({"unet.lora_alpha": "many"}),
    "an alpha that is no number": json.dumps({"unet.lora_alpha": float("nan")}),
    "a huge alpha": '{"unet.lora_alpha": 1' + "0" * 400 + "}",
    "a pattern that is a list": json.dumps({"unet.alpha_pattern": ["to_q"]}),
    "a pattern that is no pattern": json.dumps({"unet.alpha_pattern": {"(": 3}}),
    "a pattern that takes forever": json.dumps({"unet.alpha_pattern": {"(.+)+(.+)+x": 3}}),
    "a pattern without numbers": json.dumps({"unet.alpha_pattern": {"to_q": {}}}),
}


@pytest.mark.parametrize("damage", DAMAGED_SETTINGS)
def test_damaged_settings_in_the_header_are_refused(
    pipe: Any, attention_lora: Lora, tmp_path: Path, damage: str
) -> None:
    tensors = spelled(attention_lora, unet_key, ".lora_A.weight", ".lora_B.weight")
    path = write(tmp_path / "cat.safetensors", tensors, lora_adapter_metadata=DAMAGED_SETTINGS[damage])
    with pytest.raises(LoraError, match="lora_adapter_metadata"):
        loaded(pipe, path)


# Where files are found.


def test_a_file_or_a_folder_with_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = concept_file(tmp_path / "cat.safetensors")
    (tmp_path / "readme.md").write_text("about")
    assert find_file(path) == path
    assert find_file(str(path)) == path
    assert find_file(tmp_path) == path
    assert find_file(tmp_path, "cat.safetensors") == find_file(path, "cat.safetensors") == path
    with pytest.raises(LoraError, match=r"is a file, not a folder with a dog\.safetensors: leave out weight_name"):
        find_file(path, "dog.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_file("~/cat.safetensors") == path


def test_a_folder_with_two_files_asks_which(tmp_path: Path) -> None:
    paths = [concept_file(tmp_path / f"{name}.safetensors") for name in ("cat", "dog")]
    with pytest.raises(
        LoraError,
        match=r"has 2 safetensors files; name one of them, .* or by weight_name: cat\S+, dog",
    ):
        find_file(tmp_path)
    assert [find_file(tmp_path, path.name) for path in paths] == paths
    for name in ("bird.safetensors", "../cat.safetensors", str(paths[0])):
        with pytest.raises(LoraError, match=r"it has cat.safetensors, dog.safetensors"):
            find_file(tmp_path, name)


def test_an_empty_folder_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="has no safetensors files"):
        find_file(tmp_path)
    for source in (
        tmp_path / "cat.safetensors",
        tmp_path / "cat",
        "loras/cat.safetensors",
        "cat",
        "a/b/c",
        "no such/cat",
    ):
        with pytest.raises(LoraError, match="there is no file"):
            find_file(source)


# Adapters that the user has loaded into the pipeline.


def pipeline_with_adapter(tmp_path: Path, unet_lora: Lora, text_lora: Lora) -> Any:
    tensors = spelled(unet_lora, kohya, ".lora_down.weight", ".lora_up.weight", alpha=1.5)
    tensors |= spelled(text_lora, kohya_text, ".lora_down.weight", ".lora_up.weight", alpha=8.0)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(str(write(tmp_path / "cat.safetensors", tensors)), adapter_name="cat")
    return pipe


def test_loaded_adapters_give_pefts_numbers(tmp_path: Path, unet_lora: Lora, text_lora: Lora) -> None:
    pipe = pipeline_with_adapter(tmp_path, unet_lora, text_lora)
    factors = adapter_factors(pipe, "cat")
    assert (len(factors.model), len(factors.text_encoders["text_encoder"])) == (len(unet_lora), len(text_lora))
    assert_same(deltas(factors), deltas_of_peft(pipe, "cat"))
    assert_same(deltas(factors), deltas(loaded(tiny_pipeline(), tmp_path / "cat.safetensors")))
    pipe.set_adapters(["cat"], [0.4])
    assert_same(deltas(adapter_factors(pipe, "cat")), deltas_of_peft(pipe, "cat"))
    assert not any(factors.down.requires_grad for factors in adapter_factors(pipe, "cat").model.values())


def test_fused_adapters_are_refused(tmp_path: Path, unet_lora: Lora, text_lora: Lora) -> None:
    pipe = pipeline_with_adapter(tmp_path, unet_lora, text_lora)
    pipe.fuse_lora()
    with pytest.raises(LoraError, match=r"'cat' is fused into the weights.*unfuse_lora"):
        adapter_factors(pipe, "cat")
    pipe.unfuse_lora()
    assert len(adapter_factors(pipe, "cat").model) == len(unet_lora)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["to_out.0"], use_dora=True),
        LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True),
        LoKrConfig(r=2, target_modules=["to_out.0"]),
        LoHaConfig(r=2, target_modules=["to_out.0"]),
    ],
    ids=["DoRA", "bias", "LoKr", "LoHa"],
)
def test_other_kinds_of_loaded_adapters_are_refused(config: Any) -> None:
    pipe = tiny_pipeline()
    if isinstance(config, LoraConfig):
        pipe.unet.add_adapter(config, "cat")
    else:
        inject_adapter_in_model(config, pipe.unet, "cat")
    with pytest.raises(LoraError, match=r"adapter 'cat' is not a plain LoRA at .*to_out\.0"):
        adapter_factors(pipe, "cat")
