"""`lora-compose inspect` shows what files contain, what fits a model, and what several files share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from commands import call, flat
from components import random_lora, sd_unet
from layouts import file_of, layout
from lora_compose.attention import Lora, LoraFactors
from lora_compose.compose.lora.file_inspection import block_of, merge_facts
from lora_compose.compose.lora.inspection import inspect, overlaps
from lora_compose.compose.playground.assets import playground_lora
from lora_compose.pipelines.concepts.loading import Factors, read_lora
from reference import dense

pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")


def keys_of(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return len(list(file.keys()))


def text_of(result: Any) -> str:
    return " ".join(result.output.split())


def test_a_file_of_the_playground() -> None:
    text = text_of(call("inspect", "playground:cat"))
    assert "LoRA, keys of diffusers (PEFT's names)" in text
    assert f"{keys_of(playground_lora('cat'))} keys fit playground, 0 do not" in text
    assert "unet mid_block" in text
    assert "sks" in text


def test_the_words_that_loading_takes_are_shown_beside_candidates(write_lora: Callable[..., Path]) -> None:
    tags = {"ss_tag_frequency": json.dumps({"10_ohwx man": {"ohwx man": 20, "boy": 3}})}
    found, _ = inspect(read_lora(write_lora("man", unet=random_lora(sd_unet(), 0), metadata=tags)))
    assert (found.trigger, found.class_word) == ("ohwx", "man")
    assert found.rows[3:5] == [("trigger", "ohwx"), ("class word", "man")]
    assert ("noun", "boy: in 3 captions") in found.rows
    assert json.loads(found.model_dump_json())["class_words"][0] == ["man", "in 20 captions"]


def test_several_files_and_what_they_share() -> None:
    result = call("inspect", "playground:cat", "playground:dog", "playground:cat", "--json")
    found = json.loads(result.stdout)
    assert [one["matched"] for one in found["files"]] == [
        keys_of(playground_lora(name)) for name in ("cat", "dog", "cat")
    ]
    whole = {tuple(one["files"]): one["whole"] for one in found["overlaps"]}
    assert whole["playground:cat", "playground:cat"] == pytest.approx(1.0)
    assert 0 < whole["playground:cat", "playground:dog"] < 0.5
    assert all(one["meaning"] for one in found["overlaps"])


def test_a_folder_shows_each_file_and_names_those_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        shutil.copy(playground_lora(name), tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"hello")
    result = call("inspect", tmp_path, "--json", code=2)
    found = json.loads(result.stdout)
    assert [Path(one["file"]).name for one in found["files"]] == ["cat.safetensors", "dog.safetensors"]
    assert [text.partition(" ")[0] for text in found["unreadable"]] == ["broken.safetensors"]
    assert found["overlaps"] == []


def test_a_folder_whose_only_file_is_damaged_is_said_to_have_no_other(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"hello")
    said = flat(call("inspect", tmp_path, code=2).output)
    assert "broken.safetensors" in said
    assert f"; {str(tmp_path)!r} has no other LoRA file" in said
    assert "no other" not in flat(call("inspect", tmp_path / "broken.safetensors", code=2).output)
    (tmp_path / "empty").mkdir()
    assert "no other" not in flat(call("inspect", tmp_path / "empty", code=2).output)


def test_without_a_model_family_and_content_are_reported_for_any_family(tmp_path: Path) -> None:
    tensors = {
        f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": torch.ones(4, 4) for side in ("down", "up")
    }
    path = tmp_path / "flux.safetensors"
    save_file(tensors, path)
    text = text_of(call("inspect", path))
    assert "LoRA, keys of kohya's scripts" in text
    assert "FLUX.1 or FLUX.2" in text
    assert "double_blocks" in text
    assert "problem" not in text


def test_without_a_model_nothing_is_reported_as_unfitting(tmp_path: Path, write_lora: Callable[..., Path]) -> None:
    path = write_lora("small", unet=random_lora(sd_unet(), 1, rank=2))  # of a model smaller than any that is known
    found = json.loads(call("inspect", path, "--json").stdout)["files"][0]
    assert found["problem"] is None
    assert found["matched_with"] is None
    assert {block["name"] for block in found["blocks"]} >= {"down_blocks_0", "mid_block", "up_blocks_1"}
    assert all(block["ranks"] == [2] and block["norm"] is None for block in found["blocks"])
    assert "does not fit" not in call("inspect", path).output
    assert "problem: small.safetensors does not fit this model" in text_of(
        call("inspect", path, "--model", "playground", code=2)
    )


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", "1", '{"files": 3}', '{"files": {"a": 1}}', '{"files": [1, null, "x"], "settings": []}',
     '{"files": [{"sha256": 5, "weight": {}}]}', '{"files": [{"name": "' + "x" * 10_000 + '"}], "rank": [1]}'],
)  # fmt: skip
def test_untrusted_metadata_about_merging_are_bounded(record: str) -> None:
    facts = list(merge_facts({"lora_compose.merge": record}))
    assert sum(len(text) for _, text in facts) < 1000


def test_many_merged_files_are_not_all_listed() -> None:
    facts = list(merge_facts({"lora_compose.merge": json.dumps({"files": [{"name": "a"}] * 5000})}))
    assert len(facts) <= 201


def test_untrusted_strings_do_not_control_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{s}.weight": torch.ones(4, 4) for s in ("down", "up")}
    tensors["lora_unet_\x1b[31m.lora_up.weight"] = torch.ones(4, 4)
    hostile = "\x1b]0;title\x07[bold]sks[/bold]\u202e"
    save_file(
        tensors,
        path,
        {"trigger": hostile, "modelspec.title": hostile, "ss_dataset_dirs": json.dumps({f"1_{hostile}": 1})},
    )
    result = call("inspect", path)
    assert "\x1b" not in result.output
    assert "\u202e" not in result.output
    assert "[bold]sks[/bold]" in result.output


def test_pickles_are_opened_only_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    lora = random_lora(sd_unet(), 1, targets=("mid_block.attentions.0.proj_in",))
    torch.save({f"unet.{n}.lora_{s}.weight": t for n, f in lora.items() for s, t in (("A", f.down), ("B", f.up))}, path)
    assert "is a pickle" in text_of(call("inspect", path, code=2))
    assert "LoRA, keys of diffusers (PEFT's names)" in text_of(call("inspect", path, "--allow-pickle"))


def test_norms_are_those_of_the_change(write_lora: Callable[..., Path]) -> None:
    unet = sd_unet()
    lora = random_lora(unet, 1, rank=2, scale=0.5)
    found, _ = inspect(read_lora(write_lora("it", unet=lora)), SimpleNamespace(unet=unet), "small")
    assert found.matched_with == "small"
    for block in found.blocks:
        inside = [dense(f) for name, f in lora.items() if block_of("unet", name) == f"unet.{block.name}"]
        assert len(inside) == block.layers
        assert block.norm == pytest.approx(float(sum((delta**2).sum() for delta in inside)) ** 0.5, rel=1e-4)
    assert [block.name for block in found.blocks] == [
        "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2", "up_blocks.3",
    ]  # fmt: skip


def test_overlap_is_the_squared_cosine_of_the_dense_changes() -> None:
    unet = sd_unet()
    one, other = random_lora(unet, 1, rank=2), random_lora(unet, 2, rank=3, targets=("to_q", "conv1"))
    mixed: Lora = {
        name: LoraFactors(
            torch.cat([f.down, other[name].down]), torch.cat([f.up, 2 * other[name].up], dim=1)
        )
        for name, f in one.items()
        if name in other
    }  # fmt: skip
    (found,) = overlaps([("mixed", Factors(mixed)), ("other", Factors(other))])
    a = torch.cat([dense(mixed[name]).flatten() for name in mixed]).double()
    b = torch.cat([dense(other[name]).flatten() for name in mixed]).double()
    expected = float(a @ b) ** 2 / float(a @ a) / float(b @ b)
    assert found.whole == pytest.approx(expected, rel=1e-4)
    assert 0.25 < expected < 1
    assert [block for block, _ in found.blocks][:2] == ["unet.down_blocks.0", "unet.down_blocks.1"]


def test_files_that_change_different_layers_share_nothing() -> None:
    unet = sd_unet()
    one, other = random_lora(unet, 1, targets=("to_q",)), random_lora(unet, 2, targets=("to_k",))
    (found,) = overlaps([("one", Factors(one)), ("other", Factors(other))])
    assert (found.whole, found.blocks) == (None, ())
    assert "no layer in common" in found.meaning


def test_the_family_is_found_by_trying_where_nothing_tells() -> None:
    known = layout("kohya-sdxl")
    known["metadata"] = {}
    known["tensors"] = {
        "lora_unet_input_blocks_4_1_proj_in": known["tensors"]["lora_unet_input_blocks_{4,5}_1_proj_{in,out}"],
        "lora_unet_label_emb_0_0": {".lora_down.weight": [4, 2816], ".lora_up.weight": [1280, 4]},
    }
    found, factors = inspect(file_of(known))
    assert factors is not None
    assert found.family == "SDXL"
    assert "but all its layers fit SDXL" in found.why
