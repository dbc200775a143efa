"""The memory of a call, worked out without numbers, against what real calls take on the CPU."""

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from commands import call
from components import FAMILIES, random_lora, sd_unet, small_vae
from lora_compose.compose.benchmark import bench as bench_module
from lora_compose.compose.benchmark.architectures import NOUNS, SDXL, TRIGGERS, attention_lora, columns, with_lora
from lora_compose.compose.benchmark.bench import decoding_bytes_by_architecture
from lora_compose.compose.benchmark.counting import meta_unet
from lora_compose.compose.benchmark.memory import peak_memory
from lora_compose.compose.benchmark.peaks import decoding_bytes, peak
from lora_compose.compose.support.savers import enable_tiling
from lora_compose.pipelines.methods import Clora, Composite, LoraComposer, Merge, Regional, Settings, Switch, Tara

GIB = 2**30
pytestmark = pytest.mark.usefixtures("tensors_of_others_do_not_count")
SIDE, GUIDANCE = 128, 5.0
PROMPT = " ".join(f"{trigger} {noun}" for trigger, noun in zip(TRIGGERS[:2], NOUNS, strict=False))
WITH_UPDATES = {"lora-composer": LoraComposer(), "clora": Clora(), "by branch": Clora(branch_batch_size=1)}
METHODS = WITH_UPDATES | {
    "plain": None, "merge": Merge(), "regional": Regional(), "composite": Composite(), "tara": Tara(),
    "switch": Switch(),
    "no updates": LoraComposer(step_size=0),
}  # fmt: skip


BY_DEFAULT = (("sd", "by branch"), ("sd", "composite"))


@pytest.fixture
def ready(family: str, write_lora: Any) -> Any:
    """A tiny pipeline with two concepts."""
    pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    for seed, concept in enumerate(columns(2, SIDE, SIDE)):
        file = write_lora(f"lora-{seed}", unet=random_lora(pipe.unet, seed, rank=8))
        pipe.load_concept(file, name=concept.name, trigger=concept.trigger, class_word=concept.class_word)
    return pipe


def taken_by(pipe: Any, method: Settings | None) -> int:
    """What a real call takes above what is there before it; passes and their graphs, by far the most of it."""
    ours = {} if method is None else {"concepts": columns(2, SIDE, SIDE), "method": method}
    call = {
        "prompt": PROMPT,
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
        **ours,
    }
    pipe(**call, num_inference_steps=1)  # what is made once
    with peak_memory("cpu") as memory:
        before = memory.peak_bytes
        pipe(**call, num_inference_steps=2)
    return memory.peak_bytes - before


@pytest.mark.parametrize(("family", "method"), [
    pytest.param(family, method, id=f"{family}-{name}",
                 marks=() if (family, name) in BY_DEFAULT else pytest.mark.slow)
    for family in FAMILIES for name, method in METHODS.items()
])  # fmt: skip
def test_what_is_worked_out_is_what_a_real_call_takes(ready, method):
    unet = meta_unet(ready.unet.config)
    concepts = with_lora(columns(2, SIDE, SIDE), attention_lora(ready.unet))
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    tokens = ready.tokenizer.model_max_length
    for checkpointing in (False, True) if method in WITH_UPDATES.values() else (False,):
        if checkpointing:
            ready.unet.enable_gradient_checkpointing()
        found = peak(
            unet, concepts, method, 2, GUIDANCE, (SIDE, SIDE), tokens=tokens, gradient_checkpointing=checkpointing
        )
        passes = found.peak_bytes - weights
        assert passes == pytest.approx(taken_by(ready, method), rel=0.05, abs=100_000)  # text encoders and scheduler
        assert found.updates == (method in WITH_UPDATES.values())


@pytest.mark.parametrize("tiled", [False, True])
def test_decoding_takes_what_is_worked_out(tiled):
    side, real = 256, small_vae(sample_size=128 if tiled else 256)
    with torch.device("meta"):
        without_numbers: Any = AutoencoderKL.from_config(real.config)
    for vae in (real, without_numbers):
        if tiled:
            enable_tiling(vae)
    latents: Any = torch.zeros(1, 4, side // 8, side // 8)
    with torch.no_grad(), peak_memory("cpu") as memory:
        before = memory.peak_bytes
        real.decode(latents)
    taken = memory.peak_bytes - before + sum(parameter.nbytes for parameter in real.parameters())
    assert decoding_bytes(without_numbers, (side, side)) == pytest.approx(taken, rel=0.05)


@pytest.mark.slow
def test_tiles_of_sdxl_need_much_less():
    whole, tiled = decoding_bytes_by_architecture()["SDXL"]
    assert whole > 3 * GIB
    assert tiled < 1.2 * GIB


@pytest.mark.slow
def test_the_unet_is_left_as_it_was():
    unet = meta_unet(sd_unet().config)
    concepts = with_lora(columns(2, 128, 128), attention_lora(unet))
    before = repr(unet)
    for _ in range(2):
        peak(unet, concepts, LoraComposer(), 1, GUIDANCE, (128, 128), gradient_checkpointing=True)
        assert not unet.is_gradient_checkpointing
        assert repr(unet) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", [LoraComposer(), Clora()], ids=["lora-composer", "clora"])
def test_updates_of_sdxl_fit_a_card_of_8_gb_with_gradient_checkpointing(method):
    unet = meta_unet(SDXL).half()
    call = unet, with_lora(columns(2, 1024, 1024), attention_lora(unet)), method, 4, GUIDANCE, (1024, 1024)
    assert peak(*call).peak_bytes > 12 * GIB
    assert peak(*call, gradient_checkpointing=True).peak_bytes < 6.5 * GIB


@pytest.mark.slow
def test_the_command_shows_both_ways(tmp_path, monkeypatch):
    small = {name: sd_unet(sample_size=side).config for name, side in (("small", 16), ("wide", 32))}
    monkeypatch.setattr(bench_module, "ARCHITECTURES", small)
    written = tmp_path / "it.json"
    methods = ("--method", "lora-composer", "--method", "tara")
    result = call("bench", "--memory", *methods, "-n", 2, "--steps", 2, "--json", written)
    rows = {(row["architecture"], row["method"]): row for row in json.loads(written.read_text())["peaks"]}
    assert set(rows) == {(name, method) for name in small for method in (None, "lora-composer", "tara")}
    for name in small:
        assert rows[name, "tara"]["checkpointed"] is None
        kept, again = (rows[name, "lora-composer"][way] for way in ("peak", "checkpointed"))
        assert again["peak_bytes"] < kept["peak_bytes"]
        assert again["flops"] > kept["flops"]
    assert "decoding on small, in float32: " in result.output
    shown = [line.split() for line in result.output.splitlines() if "lora-composer" in line][-1]
    assert [shown[i] for i in (4, 7)] == [
        f"{rows[name, 'lora-composer']['checkpointed']['flops'] / rows[name, 'lora-composer']['peak']['flops']:.2f}"
        for name in small
    ]
