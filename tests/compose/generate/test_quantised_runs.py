"""Runs in fewer bits, from every door: what is opened, what records say, and what is made again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import call, flat
from lora_compose import Concept, Run, Scene
from lora_compose.compose.batch.entries import read_entries
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.generate.facts import run_facts
from lora_compose.compose.page import export
from lora_compose.compose.page.open_models import ModelChoice, OpenModels
from lora_compose.compose.playground.assets import PLAYGROUND, assets_dir, lora_source
from lora_compose.compose.serve import launch
from lora_compose.compose.serve.recording import record_of
from lora_compose.compose.serve.requests import ImageRequest

BEAR = Concept(name="bear", lora="playground:bear", trigger="xlo", class_word="bear")
RUN = Run(scene=Scene(prompt="a xlo bear on grass", concepts=(BEAR,)), model=PLAYGROUND, method="merge", device="cpu")
WHAT = (
    PLAYGROUND, "--prompt", "a xlo bear on grass", "--lora", "playground:bear", "--method", "merge", "--steps", 1,
    "--width", 64, "--height", 64,
)  # fmt: skip


def stored(pipe: Any) -> set[torch.dtype]:
    return {weight.dtype for weight in pipe.unet.parameters()}


@pytest.mark.usefixtures("costs_do_not_matter")
def test_run_check_and_replay_in_8_bits(tmp_path: Path) -> None:
    call("run", *WHAT, "--device", "cpu", "--out", tmp_path / "whole")
    call("run", *WHAT, "--device", "cpu", "--quantize", "fp8", "--out", tmp_path / "fp8")
    whole, few = (tmp_path / name / "0.png" for name in ("whole", "fp8"))
    assert read_record(whole).run.quantize is None
    assert read_record(few).run.quantize == "fp8"
    difference = np.abs(np.asarray(read_pixels(few), float) - np.asarray(read_pixels(whole), float))
    assert 0 < difference.mean() < 20
    assert "identical" in call("replay", few).output
    assert "playground, float32, fp8" in flat(call("check", *WHAT, "--device", "cpu", "--quantize", "fp8").output)


def test_the_server_opens_its_model_in_fewer_bits_and_with_options_that_save_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = []
    monkeypatch.setattr(launch, "run_server", lambda server, engine: engines.append(engine))
    loras = assets_dir() / "playground" / "loras"
    options = "--quantize", "fp8", "--save-memory", "tiling"
    call("serve", "playground", "--loras", loras, "--device", "cpu", *options)
    (engine,) = engines
    assert torch.float8_e4m3fn in stored(engine._pipe)
    assert engine._pipe.vae.use_tiling
    engine.stop(5)
    request = ImageRequest(prompt="a bear", steps=1)
    run = RUN.model_copy(update={"quantize": "/folder/of/the/server/few.gguf"})
    assert record_of(engine._pipe, run, request, None, 1).run.quantize == "few.gguf"


def test_a_batch_file_names_its_weights_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "batch.yaml").write_text("model: playground\nquantize: few.gguf\nscenes: [{name: a, prompt: b}]\n")
    assert read_entries([str(tmp_path / "batch.yaml")]).settings["quantize"] == str(tmp_path / "few.gguf")
    (tmp_path / "batch.yaml").write_text("model: playground\nquantize: nf4\nscenes: [{name: a, prompt: b}]\n")
    assert read_entries([str(tmp_path / "batch.yaml")]).settings["quantize"] == "nf4"


def test_a_batch_in_8_bits(tmp_path: Path) -> None:
    scenes = "[{name: a, prompt: a bear, width: 64, height: 64}]"
    text = f"model: playground\nquantize: fp8\nsteps: 1\ndevice: cpu\nscenes: {scenes}\n"
    (tmp_path / "batch.yaml").write_text(text)
    call("batch", tmp_path / "batch.yaml", "--out", tmp_path)
    assert read_record(tmp_path / "a-0.png").run.quantize == "fp8"


def test_facts_are_the_numbers_in_the_file_and_those_of_other_runs_stay(tmp_path: Path) -> None:
    whole = run_facts(RUN, (0,), None, ())
    assert "quantize" not in whole[0]
    assert run_facts(RUN.model_copy(update={"quantize": "int8"}), (0,), None, ())[0]["quantize"] == "int8"
    one, same, other = (tmp_path / name for name in ("one.gguf", "same.gguf", "other.gguf"))
    for file, content in ((one, b"1"), (same, b"1"), (other, b"2")):
        file.write_bytes(content)
    facts = [run_facts(RUN.model_copy(update={"quantize": str(file)}), (0,), None, ()) for file in (one, same, other)]
    assert facts[0] == facts[1] != facts[2]


def test_the_page_opens_and_exports_fewer_bits() -> None:
    choice = ModelChoice(PLAYGROUND, device="cpu", quantize="fp8")
    model = OpenModels().open(choice)
    assert torch.float8_e4m3fn in stored(model._pipe)
    assert model.read(BEAR.model_copy(update={"lora": lora_source("playground:bear")})).model
    run = RUN.model_copy(update={"quantize": "fp8"})
    assert "--quantize fp8" in export.command(run)
    assert 'quantize="fp8"' in export.python(run)
    assert "quantize" not in export.python(RUN) + export.command(RUN)


@pytest.mark.parametrize("command", [("run", *WHAT), ("check", *WHAT)])
def test_what_cannot_be_opened_is_said_before_the_model_is(command: tuple[Any, ...]) -> None:
    told = call(*command, "--device", "cpu", "--quantize", "nowhere.gguf", code=2).output
    assert "there is no file 'nowhere.gguf'; quantize names a file of the denoiser on this machine" in flat(told)
