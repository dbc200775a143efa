"""Damaged and hostile files: never a crash without a message, never code that runs, never a half-loaded concept.

`HYPOTHESIS_PROFILE=thorough pytest <this file>` tries thousands of files; the suite some hundreds.
"""

import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from components import random_lora, tiny_pipeline
from lora_compose.compose.lora.inspection import inspect
from lora_compose.pipelines.concepts.loading import LoraError, read_lora

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def sound_files() -> dict[str, Tensors]:
    """One small file of every kind, as they should be."""
    pipe = tiny_pipeline()
    lora = random_lora(pipe.unet, 1, rank=2, targets=("attn2.to_k", "conv1"))
    text = random_lora(pipe.text_encoder, 2, rank=2, targets=("q_proj",))
    kohya = {f"lora_unet_{name}".replace(".", "_"): factors for name, factors in lora.items()}
    kohya |= {f"lora_te_text_model_{name}".replace(".", "_"): factors for name, factors in text.items()}
    name, factors = next((n, f) for n, f in kohya.items() if f.down.ndim == 2)
    up, down, one = factors.up, factors.down, torch.ones(1)
    return {
        "diffusers": {
            f"unet.{n}.lora_{side}.weight": t for n, f in lora.items() for side, t in (("A", f.down), ("B", f.up))
        },
        "PEFT": {
            f"base_model.model.{n}.lora_{s}.weight": t for n, f in lora.items() for s, t in (("A", f.down), ("B", f.up))
        },
        "kohya": {
            f"{n}.{key}": t
            for n, f in kohya.items()
            for key, t in (("lora_down.weight", f.down), ("lora_up.weight", f.up), ("alpha", torch.tensor(4.0)))
        },
        "TARA": {
            f"{n}.lora_layer.{s}.weight": t for n, f in lora.items() for s, t in (("down", f.down), ("up", f.up))
        },
        "LoHa": {
            f"{name}.hada_w{i}_{s}": t for i in (1, 2) for s, t in (("a", up), ("b", down))
        } | {f"{name}.alpha": one},
        "LoKr": {
            f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2_a": torch.ones(len(up) // 2, 2),
            f"{name}.lokr_w2_b": torch.ones(2, down.shape[1] // 2), f"{name}.alpha": one,
        },
        "DoRA": {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
            f"{name}.dora_scale": torch.ones(len(up), 1),
        },
        "OFT": {f"{name}.oft_blocks": torch.eye(len(up) // 2).triu().repeat(2, 1, 1), f"{name}.alpha": one},
        "OFT of inputs": {f"{name}.oft_R.weight": torch.ones(down.shape[1] // 2, 1) / 9},
        "difference": {f"{name}.diff": up @ down, f"{name}.diff_b": torch.ones(len(up))},
        "ED-LoRA": {
            "new_concept_embedding.<x1>": torch.ones(4, 24), "new_concept_embedding.<x2>": torch.ones(4, 24),
            f"unet.{next(iter(lora))}_lora.down.weight": next(iter(lora.values())).down,
            f"unet.{next(iter(lora))}_lora.up.weight": next(iter(lora.values())).up,
        },
    }  # fmt: skip


FILES = sound_files()


def saved(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    return save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, metadata)


def attempt(pipe: Any, path: Path, **options: Any) -> bool:
    """Loads and inspects a file; whether it could be used. Fails for anything but LoraError or a whole concept."""
    for number in (None, 4.0):  # alpha: some files ask for it, others say it themselves
        try:
            pipe.load_concept(path, name="it", alpha=number, max_rank=8, **options)
        except LoraError as error:
            message = str(error)
        else:
            message = None
        if message is not None:
            assert len(message) > 10
            assert dict(pipe.concepts) == {}
            continue
        (loaded,) = pipe.resolve_concepts(["it"])
        pipe.unload_concept("it")
        loras = [loaded.factors.model, *loaded.factors.text_encoders.values()]
        assert any(loras)
        for lora in loras:
            for factors in lora.values():
                assert math.isfinite(factors.scale)
                assert torch.isfinite(factors.down).all()
                assert torch.isfinite(factors.up).all()
        found, _ = inspect(read_lora(path, allow_pickle=True), pipe, alpha=number, max_rank=8)
        assert found.problem is None
        json.dumps(found.model_dump())
        return True
    return False


@pytest.mark.parametrize("kind", FILES)
def test_the_files_are_sound_before_they_are_damaged(pipe: Any, folder: Path, kind: str) -> None:
    path = folder / "sound.safetensors"
    path.write_bytes(saved(FILES[kind]))
    assert attempt(pipe, path)


# Bytes.


@given(st.sampled_from(list(FILES)), st.data())
def test_truncated_and_overwritten_bytes(pipe: Any, folder: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(saved(FILES[kind]))
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 4))):
        where = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    path = folder / "bytes.safetensors"
    path.write_bytes(bytes(content[:cut]) + data.draw(st.binary(max_size=9)))
    event(f"usable: {attempt(pipe, path)}")


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SHAPES = st.lists(st.integers(-1, 2**40) | st.integers(0, 8), max_size=5)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64", "X"]),
        "shape": SHAPES,
        "data_offsets": st.lists(st.integers(-1, 2**63), max_size=3) | st.just([0, 64]),
    }
)


@given(
    st.dictionaries(
        st.sampled_from([key for file in FILES.values() for key in file]) | st.text(), ENTRY | HEADERS, max_size=4
    )
    | HEADERS,
    st.integers(-9, 9) | st.sampled_from([2**20, 2**31, 2**40, 2**62]),
)
def test_headers_that_lie(pipe: Any, folder: Path, header: Any, off: int) -> None:
    text = json.dumps(header).encode()
    path = folder / "header.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(text) + off)) + text + bytes(64))
    event(f"usable: {attempt(pipe, path)}")


def test_huge_headers_are_not_opened(pipe: Any, folder: Path) -> None:
    path = folder / "huge.safetensors"
    header = b'{"__metadata__":{"a":"' + b"x" * (40 << 20) + b'"}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(LoraError, match=r"has a header of 40\.0 MiB; a LoRA's has at most 8"):
        pipe.load_concept(path)
    path.unlink()


# Tensors.


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Tensors], None]:
    """Something that goes wrong with one tensor of a file."""
    number = draw(st.integers(0, 10**6))
    shape = draw(st.lists(st.integers(0, 9), max_size=5))
    kind = draw(st.sampled_from(["drop", "rename", "reshape", "dtype", "value", "copy", "zero"]))
    dtype = draw(
        st.sampled_from(
            [torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
        )
    )
    value = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38, -1.0, 0.0, 1e-40]))
    piece, other = draw(st.sampled_from(PIECES)), draw(st.sampled_from(PIECES) | st.text(max_size=5))

    def mutate(tensors: Tensors) -> None:
        if not tensors:
            return
        key = sorted(tensors)[number % len(tensors)]
        if kind in ("drop", "rename"):
            tensor = tensors.pop(key)
            if kind == "rename":
                tensors[key.replace(piece, other)] = tensor
        elif kind == "copy":
            tensors[key.replace(piece, other)] = tensors[key].clone()
        elif kind == "reshape":
            tensors[key] = torch.ones(shape)
        elif kind == "dtype":
            tensors[key] = tensors[key].to(dtype)
        elif kind == "zero":
            tensors[key] = torch.zeros_like(tensors[key])
        elif tensors[key].is_floating_point() and tensors[key].numel():
            tensors[key] = tensors[key].float().clone()
            tensors[key].view(-1)[number % tensors[key].numel()] = value

    return mutate


PIECES = [
    "lora_down", "lora_up", "lora_mid", "lora_A", "lora_B", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_t2", "alpha", "scalar", "dora_scale", "diff", "diff_b",
    "weight", "default.weight", "unet.", "lora_unet_", "lora_te_", "lora_te2_", "base_model.model.", "text_encoder.",
    "down_blocks", "up_blocks", "input_blocks", "attentions", "resnets", "attn1", "attn2", "to_k", "to_q", "conv1",
    "conv2", "_0_", ".0.", "_1_", ".1.", "bundle_emb.x", "new_concept_embedding", "<x1>", ".lora_layer.", "norm", "",
]  # fmt: skip
METADATA = st.dictionaries(
    st.sampled_from(
        ["lora_adapter_metadata", "trigger", "class_word", "ss_tag_frequency", "ss_dataset_dirs",
         "modelspec.architecture", "ss_base_model_version", "ss_network_args", "modelspec.trigger_phrase", "method"]
    )
    | st.text(max_size=9),
    st.text(max_size=30) | HEADERS.map(json.dumps) | st.just('{"unet.lora_alpha": 4, "unet.r": 2}')
    | st.just("[" * 100_000),
    max_size=3,
)  # fmt: skip


@given(st.sampled_from(list(FILES)), st.lists(mutations(), min_size=1, max_size=4), METADATA)
def test_renamed_missing_and_misshapen_tensors(
    pipe: Any, folder: Path, kind: str, wrong: list[Callable[[Tensors], None]], metadata: dict[str, str]
) -> None:
    tensors = dict(FILES[kind])
    for mutate in wrong:
        mutate(tensors)
    path = folder / "tensors.safetensors"
    path.write_bytes(saved(tensors, metadata))
    event(f"usable: {attempt(pipe, path)}")


@given(HEADERS.map(json.dumps) | st.text(max_size=40) | st.dictionaries(
    st.sampled_from(["lora_alpha", "alpha", "r", "alpha_pattern", "use_dora", "use_rslora"]), HEADERS
).map(json.dumps))  # fmt: skip
def test_settings_beside_the_file(pipe: Any, folder: Path, text: str) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(saved(FILES["PEFT"]))
    (folder / "adapter_config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    event(f"usable: {attempt(pipe, path)}")


# Pickles.


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path, how: int) -> None:
        self.mark, self.how = mark, how

    def __reduce__(self) -> tuple[Any, ...]:
        command = f"open({str(self.mark)!r}, 'w').close()"
        return [
            (exec, (command,)),
            (eval, (command,)),
            (os.system, (f"touch {self.mark}",)),
            (Path.touch, (self.mark,)),
            (torch.load, (str(self.mark),)),
            (getattr(__import__("builtins"), "__import__"), ("this",)),  # noqa: B009
            (dict, (), {"a": 1}),
        ][self.how % 7]


CONTENTS = st.recursive(
    st.integers(0, 6) | st.none() | st.text(max_size=5) | st.sampled_from(["tensor", "view", "sparse"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["params", "unet", "text_encoder", "new_concept_embedding", "x.lora_A.weight", "x"]
    ), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(
    st.sampled_from(list(FILES)), CONTENTS, st.booleans(), st.sampled_from(["params", None]), st.data(),
    st.sampled_from([".pt", ".bin", ".ckpt", ".safetensors"]),
)  # fmt: skip
def test_pickles_run_nothing(
    pipe: Any, folder: Path, kind: str, extra: Any, archive: bool, outer: str | None, data: st.DataObject, suffix: str
) -> None:
    mark = folder / "code-was-run"
    content: Any = dict(FILES[kind])
    content["extra"] = _filled(extra, mark)
    content = {outer: content} if outer else content
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    written = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 2))):
        written[data.draw(st.integers(0, len(written) - 1))] = data.draw(st.integers(0, 255))
    path = folder / f"pickled{suffix}"
    path.write_bytes(bytes(written[: data.draw(st.just(len(written)) | st.integers(0, len(written)))]))
    event(f"usable: {attempt(pipe, path, allow_pickle=True)}")
    assert not mark.exists()
    if suffix != ".safetensors":
        with pytest.raises(LoraError, match="is a pickle, which could run code"):
            pipe.load_concept(path)


def _filled(content: Any, mark: Path) -> Any:
    """The content with its placeholders replaced by bombs and odd tensors."""
    if isinstance(content, int):
        return Bomb(mark, content)
    if isinstance(content, Mapping):
        return {key: _filled(value, mark) for key, value in content.items()}
    if isinstance(content, list):
        return [_filled(value, mark) for value in content]
    odd = {"tensor": torch.ones(2, 2), "view": torch.ones(1).expand(10**12), "sparse": torch.eye(3).to_sparse()}
    return odd.get(content, content) if isinstance(content, str) else content


@pytest.mark.parametrize("how", range(6))
def test_bombs_are_refused_and_do_not_go_off(pipe: Any, folder: Path, how: int) -> None:
    mark = folder / "code-was-run"
    path = folder / "bomb.pt"
    path.write_bytes(pickle.dumps({**FILES["kohya"], "bomb": Bomb(mark, how)}))
    with pytest.raises(LoraError, match=r"bomb\.pt (holds more than tensors|is not a readable)"):
        pipe.load_concept(path, allow_pickle=True)
    assert not mark.exists()


def test_sound_pickles_are_read_when_they_are_allowed(pipe: Any, folder: Path) -> None:
    for kind, outer in (("kohya", None), ("ED-LoRA", "params")):
        path = folder / "sound.pt"
        torch.save({outer: FILES[kind]} if outer else FILES[kind], path)
        assert attempt(pipe, path, allow_pickle=True)


def test_an_ed_lora_in_nested_dictionaries(pipe: Any, folder: Path) -> None:
    """As Mix-of-Show saves it: three dictionaries in one."""
    nested: dict[str, dict[str, Tensor]] = {"new_concept_embedding": {}, "text_encoder": {}, "unet": {}}
    for key, tensor in FILES["ED-LoRA"].items():
        part, _, name = key.partition(".")
        nested[part][name] = tensor
    torch.save({"params": nested}, folder / "potter.pt")
    concept = pipe.load_concept(folder / "potter.pt", allow_pickle=True)
    (loaded,) = pipe.resolve_concepts([concept.name])
    pipe.unload_concept(concept.name)
    assert concept.trigger == "<x1> <x2>"
    vectors = loaded.factors.embeddings["<x1>"]["text_encoder"]
    assert vectors.shape == (1, 4, 24)
    assert loaded.factors.complete


def test_archives_that_unpack_to_more_than_their_size_are_refused(pipe: Any, folder: Path) -> None:
    path = folder / "archive.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(LoraError, match="unpacks to 1048576 bytes, more than its size"):
        pipe.load_concept(path, allow_pickle=True)
