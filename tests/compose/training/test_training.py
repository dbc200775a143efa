"""Training from a folder to a file: what is written, interrupted, resumed and refused."""

import io
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from commands import call, flat, free_port
from components import TINY, sd_unet, seeded, unet_inputs, with_bank
from disks import files_of_at_most
from lora_compose.compose.files import atomic
from lora_compose.compose.files.paths import ModelError
from lora_compose.compose.playground.assets import playground_references
from lora_compose.compose.support.terminal import BAD_INPUT, FAILED
from lora_compose.compose.training import PRESETS, DivergedError, Stopped, TaraTraining, Training, train
from lora_compose.compose.training.bases import _UNet as UNetBase
from lora_compose.compose.training.bases import base_of
from lora_compose.compose.training.checkpoint import CheckpointError, FullError, load_checkpoint
from lora_compose.compose.training.command import INTERRUPTED
from lora_compose.compose.training.data import DataError
from lora_compose.compose.training.focus import FocusedLinear
from lora_compose.compose.training.model import open_base, preset_of
from lora_compose.compose.training.optimizers import learning_rate
from lora_compose.compose.training.output import metadata_of
from lora_compose.compose.training.preparation import encode, read_captioned
from lora_compose.pipelines.concepts.loading import match, read_lora
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.text.prompts import about
from made_once import made_once
from reference import constant_gates, relative_error
from trainings import SIDE, TARA, paint_folder, sd_pipeline, training, xl_pipeline

# Where keys start aligned, the l1 distance is at its kink, and rounding decides where the first steps go.
APART = TaraTraining(start_aligned=False)

MODELS = {"sd": sd_pipeline, "xl": xl_pipeline}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.fixture(autouse=True, scope="module")
def _models_are_read_once() -> Iterator[None]:
    """Trainings get copies of the pipelines that were opened before."""
    with pytest.MonkeyPatch.context() as patched:
        for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline):
            patched.setattr(cls, "from_pretrained", made_once(cls.from_pretrained))
        yield


@pytest.fixture
def begin(tmp_path: Path, models: dict[str, Path]) -> Callable[..., Training]:
    """Settings for three images in a folder of the test's own."""
    paint_folder(tmp_path / "images")

    def settings(model: str = "sd", **fields: Any) -> Training:
        return training(tmp_path, models[model], **fields)

    return settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """What `begin()` trains if nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    paint_folder(folder / "images")
    return train(training(folder, models["sd"]))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def opened(models: dict[str, Path], kind: str) -> Any:
    pipe = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}[kind].from_pretrained(models[kind])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def largest_difference(first: Path, second: Path) -> float:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


# --- what is written ---


@pytest.mark.parametrize(
    ("kind", "scope"),
    [
        pytest.param("sd", "cross_kv", marks=pytest.mark.slow),
        ("sd", "convolutions"),
        ("xl", "attention"),
        pytest.param("sd", "transformer", marks=pytest.mark.slow),
    ],
)
def test_the_file_opens_in_diffusers_with_the_trained_weights(
    begin: Callable[..., Training], models: dict[str, Path], kind: str, scope: str
) -> None:
    settings = begin(kind, scope=scope, alpha=5, tara=TARA, steps=1)
    path = train(settings)
    tensors = load_file(path)
    pipe = opened(models, kind)
    given = unet_inputs(pipe.unet, grid=(4, 4), tokens=32)
    before = pipe.unet(**given)[0]
    pipe.load_lora_weights(path, adapter_name="cat")
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="cat")
    assert {f"unet.{name}" for name in loaded} == tensors.keys()
    for name, weight in loaded.items():
        assert torch.equal(weight, tensors[f"unet.{name}"])
    assert pipe.unet.peft_config["cat"].lora_alpha == 5
    assert {m.scaling["cat"] for m in pipe.unet.modules() if hasattr(m, "scaling") and m.scaling} == {2.5}
    assert not torch.allclose(pipe.unet.eval()(**given)[0], before, atol=1e-4)
    kinds = {"cross_kv": 2, "attention": 8, "transformer": 10, "convolutions": 10}[scope]
    blocks = sum(name.endswith("attn2") for name, _ in pipe.unet.named_modules())
    layers = {name.rsplit(".lora_", 1)[0].removeprefix("unet.") for name in tensors}
    assert sum("transformer_blocks" in name for name in layers) == kinds * blocks
    convolutions = {name for name in layers if re.search(r"(resnets|samplers)\.\d+\.conv", name)}
    assert bool(convolutions) == (scope == "convolutions")


def test_a_trained_dora_is_read_as_what_peft_makes_of_it(
    begin: Callable[..., Training], models: dict[str, Path]
) -> None:
    path = train(begin("sd", scope="convolutions", alpha=5, dora=True, steps=1))
    pipe = opened(models, "sd")
    given = unet_inputs(pipe.unet, grid=(4, 4), tokens=32)
    factors = match(read_lora(path), pipe)
    assert factors.complete
    assert all(one.transform is not None for one in factors.model.values())
    with torch.no_grad():
        before = pipe.unet(**given)[0]
        found = with_bank(pipe.unet, [factors.model], constant_gates((1.0,), tokens=32, latent_grid=(4, 4))[0], given)
        pipe.load_lora_weights(path, adapter_name="cat")
        expected = pipe.unet.eval()(**given)[0]
    assert relative_error(before, expected) > 1e-3
    assert relative_error(found, expected) < 1e-5


def test_dora_and_tara_are_refused_together(begin: Callable[..., Training]) -> None:
    with pytest.raises(ValueError, match="leave dora out, or tara"):
        begin("sd", dora=True, tara=TARA)


def test_a_file_in_half_precision_is_half_as_large_and_as_good(begin: Callable[..., Training], whole: Path) -> None:
    full, half = load_file(whole), load_file(train(begin(save_dtype="float16")))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    for key, tensor in half.items():
        assert torch.equal(tensor, full[key].half())


@pytest.mark.parametrize(
    "tara", [None, TARA, pytest.param(TaraTraining(token_mask="inference"), marks=pytest.mark.slow)]
)
def test_the_file_says_what_inference_needs(begin: Callable[..., Training], tara: TaraTraining | None) -> None:
    settings = begin(tara=tara, alpha=4, steps=1)
    told = metadata(train(settings))
    method = "dreambooth" if tara is None else "tara"
    expected = {
        "trigger": "sks", "class_word": "cat", "alpha": "4", "rank": "2", "scope": "attention", "method": method,
        "base_model": "sd", "modelspec.trigger_phrase": "sks cat", "format": "pt",
    }  # fmt: skip
    assert expected.items() <= told.items()
    assert told.get("token_mask") == (None if tara is None else tara.token_mask)
    assert json.loads(told["training"])["learning_rate"] == settings.learning_rate
    assert str(settings.images.parent) not in json.dumps(told)  # whose folder it was is nobody's business


@pytest.mark.parametrize(
    ("text", "prediction", "told"),
    [
        (16, "epsilon", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_the_file_names_the_kind_of_its_base_model(tmp_path: Path, text: int, prediction: str, told: str) -> None:
    pipe = sd_pipeline(sd_unet(**TINY, cross_attention_dim=text))
    pipe.scheduler.register_to_config(prediction_type=prediction)
    assert metadata_of(base_of(pipe), training(tmp_path, "m"))["modelspec.architecture"] == told
    assert (
        metadata_of(base_of(xl_pipeline()), training(tmp_path, "m"))["modelspec.architecture"]
        == "stable-diffusion-xl-v1-base/lora"
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the playground's preset trains with Muon, of PyTorch 2.9")
def test_the_playground_is_named_as_its_own_loras_name_it(tmp_path: Path) -> None:
    settings = Training.preset(
        "playground", images=playground_references("cat")[0].parent, out=tmp_path / "it.safetensors", trigger="sks",
        class_word="cat", steps=1, warmup=0, class_count=0, batch_size=1, tara=TARA,
    )  # fmt: skip
    told = metadata_of(base_of(open_base("playground")), settings)
    assert told["base_model"] == "lora-compose playground"
    assert told["modelspec.prediction_type"] == "v"


# --- TARA ---


def test_training_aligns_keys(begin: Callable[..., Training]) -> None:
    losses = []
    start_apart = TaraTraining(start_aligned=False, align_weight=100)
    train(begin(tara=start_apart, steps=8), on_step=lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] * 0.8
    aligned: list[float] = []
    aligned_at_once = begin(tara=TaraTraining(align_weight=100), steps=1)
    train(aligned_at_once, on_step=lambda _, loss: aligned.append(loss), overwrite=True)
    assert aligned[0] < losses[0] * 0.8


def test_variants_differ(begin: Callable[..., Training]) -> None:
    """So that no switch is without effect."""
    variants = [
        None, TARA, TaraTraining(align_norm="l2"), TaraTraining(align_weight=0), TaraTraining(class_target="clean"),
        TaraTraining(keys="tied"), TaraTraining(token_mask="inference"), TaraTraining(start_aligned=False),
    ]  # fmt: skip
    files = []
    for number, tara in enumerate(variants):
        out = begin().out.with_name(f"{number}.safetensors")
        files.append(train(begin(tara=tara, out=out, steps=2, scope="cross_kv")))
    for number, first in enumerate(files):
        for second in files[number + 1 :]:
            assert largest_difference(first, second) > 1e-6, (first, second)


# --- the same bits ---


def test_a_seed_decides_everything(begin: Callable[..., Training], whole: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    again = train(begin())
    assert torch.equal(torch.get_rng_state(), state)
    other = train(begin(out=tmp_path / "other.safetensors", seed=1))
    assert same(whole, again)
    assert largest_difference(whole, other) > 1e-3


def test_a_training_that_was_stopped_goes_on_with_the_same_bits(begin: Callable[..., Training], tmp_path: Path) -> None:
    optimizer = "muon" if hasattr(torch.optim, "Muon") else "adamw"  # with muon there are two
    common: dict[str, Any] = {"optimizer": optimizer, "scope": "transformer", "tara": TARA, "steps": 3}
    common |= {"schedule": "cosine", "warmup": 1}
    whole = train(begin(**common, out=tmp_path / "whole.safetensors"))
    settings = begin(**common)
    before = signal.getsignal(signal.SIGINT)
    steps: list[int] = []

    def press_ctrl_c(step: int, _: float) -> None:
        steps.append(step)
        if step in (1, 2):
            signal.raise_signal(signal.SIGINT)

    for number in (1, 2):
        with pytest.raises(Stopped, match=rf"stopped after step {number} of 3; run the same command to resume"):
            train(settings, on_step=press_ctrl_c)
        assert settings.checkpoint.exists()
        assert not settings.out.exists()
    assert signal.getsignal(signal.SIGINT) is before
    train(settings, on_step=press_ctrl_c)
    assert steps == [1, 2, 3]
    assert same(whole, settings.out)
    assert not settings.checkpoint.exists()


def test_a_second_ctrl_c_ends_at_once(begin: Callable[..., Training]) -> None:
    def press_twice(step: int, _: float) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            train(begin(), on_step=press_twice)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(raised.value, Stopped)


def test_a_killed_training_goes_on_from_its_last_checkpoint(begin: Callable[..., Training], whole: Path) -> None:
    class KilledError(Exception):
        pass

    def die(step: int, _: float) -> None:
        if step == 4:
            raise KilledError

    settings, steps = begin(), []
    with pytest.raises(KilledError):
        train(settings, on_step=die)
    train(settings, on_step=lambda step, _: steps.append(step))
    assert steps == [3, 4]
    assert same(whole, settings.out)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_training_that_is_killed_at_random_moments_gives_the_same_bits(
    begin: Callable[..., Training], tmp_path: Path
) -> None:
    common: dict[str, Any] = {"steps": 100, "checkpoint_every": 1}
    whole = train(begin(**common, out=tmp_path / "whole.safetensors"))
    settings, fork, moments = begin(**common), multiprocessing.get_context("fork"), random.Random(0)
    done = fork.Value("i", 0)

    def note(step: int, _: float) -> None:
        done.value = step

    for _ in range(12):
        before = done.value
        process = fork.Process(target=train, args=(settings,), kwargs={"on_step": note})
        process.start()
        while done.value < before + moments.randint(2, 6):
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
    atomic._remove_leftovers.cache_clear()  # as in a new process
    train(settings)
    assert same(whole, settings.out)
    assert not list(tmp_path.glob(".*"))


def test_the_lora_stays_in_single_precision_whatever_the_model_is_in(
    begin: Callable[..., Training], tmp_path: Path
) -> None:
    full = train(begin(tara=TARA, steps=2, out=tmp_path / "full.safetensors"))
    settings = begin(tara=TARA, steps=2, mixed_precision="bf16")
    stopped_at(settings, 1)
    state = torch.load(settings.checkpoint, weights_only=True)
    moments = [
        value for optimizer in state["optimizers"] for kept in optimizer["state"].values() for value in kept.values()
    ]
    assert len(moments) > len(state["weights"])
    assert {tensor.dtype for tensor in (*moments, *state["weights"].values())} == {torch.float32}
    half = train(settings)
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float32}
    assert 1e-6 < largest_difference(full, half) < 0.1
    undisturbed = train(begin(tara=TARA, steps=2, mixed_precision="bf16", out=tmp_path / "undisturbed.safetensors"))
    assert same(half, undisturbed)


def test_the_network_is_cast_and_all_else_is_encoded_before_it_is_moved(
    begin: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may have no room for it in single precision, nor beside the text encoders."""

    class MovedError(Exception):
        pass

    def moved_to(network: Any, device: torch.device) -> None:
        raise MovedError(network.dtype, list(used))

    used: list[str] = []
    for part in (CLIPTextModel, AutoencoderKL):
        to = part.to
        monkeypatch.setattr(part, "to", lambda it, device, to=to: used.append(f"{it.dtype}") or to(it, device))
    monkeypatch.setattr(UNet2DConditionModel, "to", moved_to)
    with pytest.raises(MovedError) as moved:
        train(begin(mixed_precision="bf16"))
    assert moved.value.args == (torch.bfloat16, ["torch.float32"] * 4)  # both to the device, and back


@pytest.mark.parametrize(("kind", "zeros"), [("sd", False), ("xl", True)])
def test_the_class_is_kept_in_unconditional_rows_too(
    begin: Callable[..., Training], models: dict[str, Path], kind: str, zeros: bool
) -> None:
    base, settings = base_of(opened(models, kind)), begin(kind, preserve_class=True)
    data = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    concept, prior = data.concept, data.prior
    assert prior is not None
    assert torch.equal(prior.latents, torch.cat([concept.latents] * 2))
    about_class, unconditional = prior.caption.chunk(2)
    assert set(about_class.tolist()).isdisjoint(unconditional.tolist())
    (empty,) = set(unconditional.tolist())
    expected, negative, *pooled = base.pipe.encode_prompt(
        "a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    assert expected.abs().max() > 0
    assert torch.equal(prior.text[empty], negative[0])
    assert bool((negative == 0).all()) is zeros
    if pooled:
        assert torch.equal(prior.by_caption["text_embeds"][empty], pooled[1][0])
        assert prior.by_image["time_ids"].shape[0] == len(prior)


def test_the_empty_caption_alone_is_kept(begin: Callable[..., Training], models: dict[str, Path]) -> None:
    both, alone = (
        encode(base, read_captioned(base, asked), asked, Accelerator(cpu=True)).prior
        for base in (base_of(opened(models, "sd")),)
        for asked in (begin("sd", preserve_class=True), begin("sd", preserve_empty=True))
    )
    assert both is not None
    assert alone is not None
    of_empty = both.caption.chunk(2)[1]
    assert len(alone) == len(of_empty)
    assert torch.equal(alone.text[alone.caption], both.text[of_empty])


def test_batches_may_be_split_and_accumulated(begin: Callable[..., Training], tmp_path: Path) -> None:
    together = train(begin(batch_size=4, steps=2, tara=APART, out=tmp_path / "together.safetensors"))
    split = train(begin(batch_size=1, steps=2, accumulate=4, tara=APART))
    assert largest_difference(together, split) < 1e-4


STOPPED_AT = """
import signal, sys
from lora_compose.compose.training import Stopped, Training, train

def stop(step, _):
    if step == int(sys.argv[2]):
        signal.raise_signal(signal.SIGINT)

try:
    train(Training.model_validate_json(sys.argv[1]), on_step=stop)
except Stopped:
    sys.exit(130)
"""


def by_two(*arguments: object) -> list[tuple[int, str, str]]:
    """Runs Python in two processes of one group; returns exit codes and output."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *said) for process, said in zip(processes, told, strict=True)]


@pytest.mark.slow
def test_two_processes_share_a_batch_and_go_on_together(begin: Callable[..., Training], tmp_path: Path) -> None:
    together = train(begin(batch_size=2, tara=APART, out=tmp_path / "together.safetensors"))
    settings = begin(batch_size=1, tara=APART, checkpoint_every=100)
    stopped = by_two("-c", STOPPED_AT, settings.model_dump_json(), 2)
    assert [code for code, _, _ in stopped] == [130, 130], stopped
    with pytest.raises(CheckpointError, match=r"at step 2 of another training:\n  processes was 2 and is 1 now\n"):
        train(settings)
    given = arguments(settings, "--batch-size", 1, "--tara", "--start-apart", "--checkpoint-every", 100)
    ended = by_two("-m", "lora_compose", *given)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [said.count("The LoRA:") for _, said, _ in ended] == [1, 0]
    assert largest_difference(together, settings.out) < 1e-4


@pytest.mark.slow
def test_accelerate_starts_several_processes(begin: Callable[..., Training], tmp_path: Path) -> None:
    together = train(begin(batch_size=2, tara=APART, out=tmp_path / "together.safetensors"))
    settings = begin(batch_size=1, tara=APART)
    launch = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    given = arguments(settings, "--batch-size", 1, "--tara", "--start-apart")
    command = [sys.executable, "-m", *launch, *fixed, "--module", "lora_compose", *map(str, given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The LoRA:") == 1
    assert largest_difference(together, settings.out) < 1e-4


# --- checkpoints ---


def stopped_at(settings: Training, step: int) -> None:
    def stop(done: int, _: float) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        train(settings, on_step=stop)


def test_changed_settings_and_images_are_refused_with_what_changed(begin: Callable[..., Training]) -> None:
    settings = begin(tara=TARA)
    stopped_at(settings, 1)
    changed = settings.model_copy(
        update={"learning_rate": 0.5, "tara": TaraTraining(align_norm="l2"), "checkpoint_every": 1}
    )
    with pytest.raises(CheckpointError) as raised:
        train(changed)
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("is a checkpoint at step 1 of another training:")
    assert lines[1:3] == ["  learning_rate was 0.01 and is 0.5 now", "  tara.align_norm was l1 and is l2 now"]
    assert "start over with --fresh" in lines[3]
    assert len(lines) == 4
    paint_folder(settings.images, 4)
    with pytest.raises(CheckpointError, match="the images or captions have changed"):
        train(settings)


def test_a_fresh_start_forgets_the_checkpoint_at_once(begin: Callable[..., Training], whole: Path) -> None:
    stopped_at(begin(seed=1), 1)
    settings, steps = begin(checkpoint_every=100), []

    def die(step: int, _: float) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(settings, on_step=die, fresh=True)
    assert not settings.checkpoint.exists()
    train(settings, on_step=lambda step, _: steps.append(step))
    assert steps == [1, 2, 3, 4]
    assert same(whole, settings.out)


def test_what_cannot_be_used_leaves_the_checkpoint_of_a_fresh_start(begin: Callable[..., Training]) -> None:
    settings = begin()
    settings.checkpoint.write_bytes(b"of an earlier training")
    with pytest.raises(DataError):
        train(begin(images=settings.out.parent), fresh=True)
    assert settings.checkpoint.exists()


def test_what_changes_no_result_may_change(begin: Callable[..., Training], whole: Path, tmp_path: Path) -> None:
    settings = begin()
    stopped_at(settings, 2)
    settings.images.rename(tmp_path / "moved")
    train(begin(images=tmp_path / "moved", checkpoint_every=1, gradient_checkpointing=True))
    assert largest_difference(whole, settings.out) < 1e-6


@pytest.mark.slow
def test_compiled_blocks_change_the_lora_by_rounding_alone(begin: Callable[..., Training], tmp_path: Path) -> None:
    usual = train(begin(out=tmp_path / "usual.safetensors"))
    compiled = train(begin(out=tmp_path / "compiled.safetensors", compile=True))
    assert 0 < largest_difference(usual, compiled) < 1e-4


def _flipped(data: bytes) -> bytes:
    """Another number in the largest tensor of the file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    flipped = bytearray(data)
    flipped[data.index(tensor) + len(tensor) // 2] ^= 1
    return bytes(flipped)


def test_damaged_checkpoints_and_other_files_are_refused(begin: Callable[..., Training], whole: Path) -> None:
    settings = begin()
    stopped_at(settings, 1)
    intact, others = settings.checkpoint.read_bytes(), []
    for content in ([1, 2], torch.zeros(3), {"step": 3}):
        torch.save(content, settings.checkpoint)
        others.append(settings.checkpoint.read_bytes())
    for content in (b"", intact[:-1], _flipped(intact), *others, whole.read_bytes()):
        settings.checkpoint.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged: .*start over with --fresh"):
            load_checkpoint(settings.checkpoint, settings, "", 1)
    with pytest.raises(CheckpointError, match=r"is damaged: .*start over with --fresh"):
        train(settings)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    begin: Callable[..., Training], whole: Path, tmp_path: Path
) -> None:
    settings, kept = begin(checkpoint_every=1), []

    def note(step: int, _: float) -> None:
        if step == 3:
            kept.append(settings.checkpoint.read_bytes())
            disk.enter_context(files_of_at_most(1000))

    with (
        ExitStack() as disk,
        pytest.raises(FullError, match=r"at step 3 could not be written .*File too large; the one before it"),
    ):
        train(settings, on_step=note)
    assert settings.checkpoint.read_bytes() == kept[0]
    assert list(tmp_path.glob(".*")) == []
    train(settings)
    assert same(whole, settings.out)


def test_a_full_disk_at_the_end_loses_nothing(begin: Callable[..., Training]) -> None:
    settings, steps = begin(steps=2, checkpoint_every=1), []

    def note(step: int, _: float) -> None:
        if step == 2:
            disk.enter_context(files_of_at_most(1000))

    with ExitStack() as disk, pytest.raises(OSError, match=r"at step 2 could not be written .*the one before it is"):
        train(settings, on_step=note)
    assert not settings.out.exists()
    train(settings, on_step=lambda step, _: steps.append(step))
    assert steps == [2]
    assert settings.out.exists()


def test_a_file_that_cannot_be_put_in_its_place_is_written_by_the_same_command(begin: Callable[..., Training]) -> None:
    settings, steps = begin(steps=1), []

    def obstruct(_: int, __: float) -> None:
        settings.out.mkdir()

    with pytest.raises(OSError, match=r"Is a directory; all steps are done and kept in .*without --fresh"):
        train(settings, on_step=obstruct)
    settings.out.rmdir()
    train(settings, on_step=lambda step, _: steps.append(step))
    assert steps == []
    assert settings.out.exists()


def test_an_existing_file_is_not_overwritten_unless_asked(begin: Callable[..., Training]) -> None:
    settings = begin(steps=1)
    settings.out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already; choose another name, or overwrite it with --overwrite"):
        train(settings)
    assert settings.out.read_bytes() == b"precious"
    train(settings, overwrite=True)
    assert load_file(settings.out)


def test_a_loss_that_is_no_number_stops_with_advice(begin: Callable[..., Training]) -> None:
    settings = begin(learning_rate=1e30, steps=6, max_grad_norm=None, checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"diverged. Try a lower learning rate \(it is 1e\+30\)"):
        train(settings)
    assert not settings.out.exists()


# --- images ---


def test_one_image_is_enough_but_mentioned(
    begin: Callable[..., Training], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = paint_folder(tmp_path / "one", 1)
    assert train(begin(images=folder, steps=1)).exists()
    assert "there is one image" in caplog.text


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "holds no images"), (b"\x89PNG\r\n", "is not a readable image")]
)
def test_a_folder_without_usable_images_is_refused_before_anything_is_done(
    begin: Callable[..., Training], tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    folder = paint_folder(tmp_path / "other", 0 if content is None else 2)
    if content is not None:
        (folder / "1.png").write_bytes(content)
    settings = begin(images=folder)
    assert complaint in flat(call(*arguments(settings), code=BAD_INPUT).stderr)
    assert not settings.checkpoint.exists()
    assert not settings.out.exists()


def test_unusable_captions_are_refused_before_anything_is_done(begin: Callable[..., Training]) -> None:
    settings = begin(tara=TARA)
    (settings.images / "1.txt").write_text("a sks dog")
    with pytest.raises(DataError, match="lacks the class word 'cat'"):
        train(settings)
    assert not settings.checkpoint.exists()


def test_variants_without_alignment_do_without_the_class_word(begin: Callable[..., Training]) -> None:
    tara = TaraTraining(align_weight=0, start_aligned=False)
    assert train(begin(tara=tara, prompt="a {trigger} thing", steps=1)).exists()


def test_the_model_paints_missing_class_images(begin: Callable[..., Training]) -> None:
    settings = begin(
        class_count=5, class_steps=1, class_prompts=("a {class_word}", "a dog"), prior_batch=1, tara=TARA, steps=1
    )
    folder = settings.class_folder
    paint_folder(folder, 1)
    first = load_file(train(settings))
    assert sorted(path.name for path in folder.glob("*.png")) == ["0.png", *(f"class-000{i}.png" for i in range(4))]
    captions = [(folder / f"class-000{i}.txt").read_text().strip() for i in range(4)]
    assert captions == ["a cat", "a dog", "a cat", "a dog"]
    again = load_file(train(settings, overwrite=True))
    assert all(torch.equal(first[key], again[key]) for key in first)
    without = load_file(train(settings.model_copy(update={"class_count": 0}), overwrite=True))
    assert any(not torch.equal(first[key], without[key]) for key in first)


@pytest.mark.parametrize("token_mask", ["training", "inference"])
def test_samples_are_painted_with_the_mask_of_inference_and_change_nothing(
    begin: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_mask: Any
) -> None:
    generate, tara, masks = UNetBase.generate, TaraTraining(token_mask=token_mask), []

    def in_two_steps(base: Any, accelerator: Any, prompts: Any, noise: Any, steps: int, *others: Any) -> Any:
        layers = [layer for layer in base.network.modules() if isinstance(layer, FocusedLinear)]
        masks.append([layer.focus.mask[-1].sum().item() for layer in layers if layer.focus.mask is not None])
        return generate(base, accelerator, prompts, noise, 2, *others)

    monkeypatch.setattr(UNetBase, "generate", in_two_steps)
    plain = train(begin("sd", tara=tara, steps=2, out=tmp_path / "plain.safetensors"))
    prompts = ("a sks cat",)
    settings = begin("sd", tara=tara, steps=2, sample_every=1, sample_prompts=prompts)
    train(settings)
    names = sorted(path.name for path in (tmp_path / "cat-samples").iterdir())
    assert names == ["000001-0.png", "000002-0.png"]
    assert len(masks) == 2
    assert all(of_layers and set(of_layers) == {1} for of_layers in masks)  # the trigger is one token
    assert same(plain, settings.out)


# --- settings ---


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"class_word": "Sks"}, "the trigger and the class word are both 'sks'"),
        ({"trigger": "sks cat"}, "holds the class word 'cat'; give the rare word alone"),
        ({"trigger": "sks_cat"}, "holds the class word 'cat'; give the rare word alone"),
        ({"trigger": "  "}, "need letters"),
        ({"out": Path("cat.bin")}, r"must end with \.safetensors"),
        ({"prompt": "a {name}"}, r"has \{name\}; there are \{trigger\}"),
        ({"prompt": "a {"}, "prompt"),
        ({"resolution": 100}, "multiple of 8"),
        ({"warmup": 4}, "a warm-up of 4 steps leaves nothing of 4 steps"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"mixed_precision": "fp16", "optimizer": "muon", "cpu": False}, "fp16 scales gradients for one optimizer"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"steps": 0}, "steps"),
        ({"preserve_class": True, "class_count": 3}, "preserve_class needs no class images"),
        ({"preserve_empty": True, "class_count": 3}, "preserve_empty needs no class images"),
        ({"preserve_class": True, "preserve_empty": True}, "leave preserve_empty out"),
        ({"speed": 1}, "speed"),
    ],
)
def test_unusable_settings_are_refused(tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        training(tmp_path, "playground", **fields)


def test_presets(models: dict[str, Path], tmp_path: Path) -> None:
    chosen = [preset_of(str(model)) for model in (models["sd"], models["xl"], "playground")]
    assert chosen == ["sd", "sdxl", "playground"]
    assert set(chosen) < set(PRESETS)
    out = tmp_path / "a.safetensors"
    words: dict[str, Any] = {"images": tmp_path, "out": out, "trigger": "sks", "class_word": "cat"}
    sd, xl = (Training.preset(name, model="m", **words) for name in ("sd", "sdxl"))
    assert (sd.rank, sd.steps, sd.learning_rate, xl.learning_rate) == (8, 1000, 1e-4, 5e-5)
    small = Training.preset("playground", **words)
    assert (small.scope, Training.preset("playground", **words, tara=TARA).scope) == ("convolutions", "attention")
    assert Training.preset("playground", **words, tara=TARA, scope="cross_kv").scope == "cross_kv"
    assert len(small.class_prompts) == small.class_count
    own = Training.preset("playground", **words, class_images=tmp_path)
    assert (own.class_count, own.class_prompts) == (0, ("a photo of {class_word}",))
    added = Training.preset("playground", **words, class_images=tmp_path, class_count=40)
    assert added.class_prompts == small.class_prompts
    owl = Training.preset("playground", **words | {"class_word": "owl"})
    assert {owl.filled(prompt)[:6] for prompt in owl.class_prompts if "{class_word}" in prompt} == {"an owl"}
    assert (owl.filled("A {class_word}"), owl.filled("a {trigger} {class_word}")) == ("An owl", "a sks owl")
    assert small.filled("via {class_word}, a {class_word}") == "via cat, a cat"
    told = Training.preset("playground", **words, class_images=tmp_path, class_prompts=("a fox",))
    assert (told.class_count, told.class_prompts) == (0, ("a fox",))
    assert Training.preset("playground", **words, preserve_class=True).class_count == 0
    empty = Training.preset("playground", **words, preserve_empty=True, prior_batch=1)
    assert (empty.class_count, empty.prior_batch) == (0, 1)
    with pytest.raises(ValueError, match="prior_batch: for the class, of which nothing is kept; give preserve_class"):
        Training.preset("sd", model="m", **words, prior_batch=2)
    with pytest.raises(ValueError, match="sample_prompts: for sample images, of which there are none"):
        Training.preset("sd", model="m", **words, sample_prompts=("a cat",))
    with pytest.raises(ValueError, match="unknown preset 'flux'; there are sd, sdxl, transformer, playground"):
        Training.preset("flux", model="m", **words)


def test_models_of_other_kinds_are_refused(begin: Callable[..., Training], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "ChromaPipeline", "transformer": ["diffusers", "X"]}')
    with pytest.raises(ModelError, match=r"a model for ChromaPipeline.* expected a text-to-image model"):
        train(begin().model_copy(update={"model": str(folder)}))
    sd_pipeline(sd_unet(**TINY, in_channels=9)).save_pretrained(tmp_path / "inpaint")
    with pytest.raises(ModelError, match="is it for inpainting"):
        train(begin().model_copy(update={"model": str(tmp_path / "inpaint")}))


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    settings = training(tmp_path, "m", steps=101, warmup=1, learning_rate=1)
    rates: dict[str, list[float]] = {
        schedule: [learning_rate(settings.model_copy(update={"schedule": schedule}), step) for step in range(101)]
        for schedule in ("constant", "linear", "cosine")
    }
    assert {found[0] for found in rates.values()} == {0.5}
    assert {found[1] for found in rates.values()} == {1}
    assert [found[51] for found in rates.values()] == pytest.approx([1, 0.5, 0.5])
    assert [found[26] for found in rates.values()] == pytest.approx([1, 0.75, 0.5 + 0.5 * 0.5**0.5])
    assert rates["cosine"][-1] < 1e-3


# --- the command ---


def arguments(settings: Training, *more: object) -> list[object]:
    return [
        "train", settings.images, "--out", settings.out, "--trigger", "sks", "--class", "cat",
        "--model", settings.model, "--resolution", SIDE, "--steps", 4, "--rank", 2, "--lr", "1e-2",
        "--batch-size", 2, "--cpu", *more,
    ]  # fmt: skip


def test_the_command_trains_as_python_does(begin: Callable[..., Training], tmp_path: Path) -> None:
    tara = TaraTraining(align_norm="l2", keys="aligned", align_weight=2, start_aligned=False)
    expected = train(begin(tara=tara, checkpoint_every=100, out=tmp_path / "expected.safetensors"))
    settings = begin()
    result = call(*arguments(settings, "--tara", "--align-norm", "l2", "--align-weight", 2, "--start-apart"))
    assert "trigger 'sks', class 'cat', method tara" in result.stdout
    assert same(expected, settings.out)


def test_two_women_with_triggers_of_three_words_are_composed_without_naming_the_triggers(
    begin: Callable[..., Training], models: dict[str, Path], tmp_path: Path
) -> None:
    women = {"alice": "alc blue coat", "berta": "brt red hat"}
    (tmp_path / "loras").mkdir()
    for name, trigger in women.items():
        settings = begin(out=tmp_path / "loras" / f"{name}.safetensors")
        call(*arguments(settings, "--trigger", trigger, "--class", "woman", "--tara", "--steps", 1))
        told = metadata(settings.out)
        assert (told["trigger"], told["class_word"]) == (trigger, "woman")
        assert told["modelspec.trigger_phrase"] == f"{trigger} woman"
    pipe: Any = ComposeStableDiffusionPipeline(**opened(models, "sd").components, requires_safety_checker=False)
    pipe.add_concepts(tmp_path / "loras")
    prompt = "an alc blue coat woman and a brt red hat woman in a park"
    ids = pipe.tokenizer(prompt).input_ids
    read = [piece.replace("</w>", " ") for piece in pipe.tokenizer.convert_ids_to_tokens(ids)]
    boxes = {"alice": (0, 0, 32, 64), "berta": (32, 0, 64, 64)}
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    for method, concepts in {None: [*women], "tara": [*women], "regional": boxes, "clora": [*women]}.items():
        plan = pipe.plan(prompt, concepts=concepts, method=method, **size)
        assert plan.method == (method or "draft")
        for planned in plan.concepts:
            trigger = women[planned.concept.name]
            assert "".join(read[p] for p in planned.trigger[0]) == f"{trigger} "
            assert "".join(read[p] for p in planned.phrase[0]) == f"{trigger} woman "
    every = [loaded.concept for loaded in pipe.resolve_concepts([*women])]
    assert about(every[1], prompt, every) == "a brt red hat woman in a park"
    assert [chosen.name for chosen in pipe.plan(prompt, concepts="auto", **size).resolved.concepts.concepts] == [*women]
    with pytest.raises(ValueError, match="write 'alc blue coat woman' where the concept is meant"):
        pipe.plan("an alc woman and a brt red hat woman", concepts=[*women], method="tara", **size)
    image = pipe(prompt, concepts=[*women], generator=seeded(0), output_type="np", **size).images
    assert np.isfinite(image).all()


def test_the_command_reports_mistakes_without_a_traceback(begin: Callable[..., Training]) -> None:
    settings = begin()
    error = call(*arguments(settings, "--keys", "tied"), code=BAD_INPUT).stderr
    assert "--keys: these are options of --tara, which is not given" in error
    error = flat(call(*arguments(settings, "--scope", "all"), code=BAD_INPUT).stderr)
    assert "scope: expected 'cross_kv', 'attention', 'transformer' or 'convolutions', found 'all'" in error
    settings.out.write_bytes(b"")
    assert "exists already" in call(*arguments(settings), code=FAILED).stderr
    elsewhere = settings.model_copy(update={"model": "no"})
    assert "there is no model" in call(*arguments(elsewhere), code=BAD_INPUT).stderr
    settings.out.unlink()
    error = call(*arguments(settings, "--lr", "1e30"), code=FAILED).stderr
    assert "diverged" in error


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_says_how_to_go_on(begin: Callable[..., Training]) -> None:
    settings = begin()
    command = [sys.executable, "-m", "lora_compose", *map(str, arguments(settings, "--steps", 100_000))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any("parameters to train" in line for line in iter(process.stderr.readline, ""))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    error = flat(process.stderr.read())
    assert process.wait(60) == INTERRUPTED
    assert "run the same command to resume (without --fresh)" in error
    assert "Traceback" not in error
    assert settings.checkpoint.exists()


@pytest.fixture(autouse=True)
def _info_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lora_compose.compose")
