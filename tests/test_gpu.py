"""What can be seen on an accelerator only: `pytest -m gpu`."""

import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import XFormersAttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from components import EVERYTHING, TINY, random_lora, sd_unet, small_pipeline
from lora_compose.compose.benchmark.timing import PEFT_WAYS, Job, open_with_concepts, time_ways
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.training import Stopped, train
from lora_compose.pipelines.methods import LoraComposer, Regional
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from trainings import TARA, paint_folder, training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
TRIGGERS = {"cat": "sks", "dog": "zwx", "bear": "xlo", "robot": "ohwx"}
PROMPT = "a sks cat, a zwx dog, a xlo bear and a ohwx robot"
METHODS = ("merge", "tara", "switch", "composite", Regional(), LoraComposer(), LoraComposer.official())


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Convolutions in full single precision, so that results can be compared."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def composer(write_lora) -> Any:
    """A small pipeline on the CPU with four concepts."""
    pipe = small_pipeline(unet=sd_unet(block_out_channels=(32, 64, 64, 64)))
    load_concepts(pipe, write_lora, targets=EVERYTHING, size=0.05)
    return pipe


def load_concepts(pipe: Any, write_lora: Any, **options: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    for seed, (name, trigger) in enumerate(TRIGGERS.items()):
        path = write_lora(name, unet=random_lora(pipe.unet, seed, **options), metadata={"method": "tara"})
        pipe.load_concept(path, trigger=trigger, class_word=name)


def latents_of(pipe: Any, *, method: Any = "tara", composed: bool = True, **arguments: Any) -> Tensor:
    if composed:
        first = Concept(name="cat", region=(0, 0, 64, 128))
        arguments |= {"concepts": [first, "dog", "bear", "robot"], "method": method}
    given = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(PROMPT, **given | arguments).images


def assert_close(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one.float().cpu(), other.float().cpu(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_device_gives_what_the_cpu_gives_and_the_same_bits_again(composer, method):
    expected = latents_of(composer, method=method)
    composer.to(DEVICE)
    first, second = (latents_of(composer, method=method) for _ in range(2))
    assert first.device.type == DEVICE
    assert_close(first, expected, 2e-3)
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_near(composer, method, dtype):
    composer.to(DEVICE)
    expected = latents_of(composer, method=method, num_inference_steps=1)
    composer.to(dtype=dtype)
    latents = latents_of(composer, method=method, num_inference_steps=1)
    assert latents.dtype == dtype
    assert torch.isfinite(latents_of(composer, method=method, num_inference_steps=8)).all()
    error = (latents.float() - expected).norm() / expected.norm()
    assert error < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("saver", [Saver.MODEL_OFFLOAD, Saver.SEQUENTIAL_OFFLOAD])
def test_a_record_names_the_device_of_an_offloaded_model(saver):
    run = Run(scene=Scene(prompt="a cat"), model=PLAYGROUND, steps=2, device=DEVICE)
    made = make(open_model(run, [saver, Saver.GRADIENT_CHECKPOINTING]), run)
    assert torch.device(made.record.machine.device).type == DEVICE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_offloaded_models_give_the_same_image_and_come_back_as_they_were(composer, method, layer_by_layer):
    composer.to(DEVICE)
    expected = latents_of(composer, method=method), latents_of(composer, composed=False)
    composer.to("cpu")
    if layer_by_layer:
        composer.enable_sequential_cpu_offload()
    else:
        composer.enable_model_cpu_offload()
    place = "meta" if layer_by_layer else "cpu"
    tree, bits = repr(composer.unet), [p.clone() for p in composer.unet.parameters()]
    for _ in range(2):
        assert_close(latents_of(composer, method=method), expected[0], 2e-3)
        assert_close(latents_of(composer, composed=False), expected[1], 2e-3)
        assert repr(composer.unet) == tree
        parameters = list(composer.unet.parameters())
        assert {p.device.type for p in parameters} == {place}
        if not layer_by_layer:
            assert all(torch.equal(now, before) for now, before in zip(parameters, bits, strict=True))


def test_moving_a_pipeline_between_calls_moves_nothing_half(composer):
    expected = latents_of(composer)
    parameters = dict(composer.unet.named_parameters())
    for device in (DEVICE, "cpu", DEVICE):
        composer.to(device)
        assert_close(latents_of(composer), expected, 2e-3)
        now = dict(composer.unet.named_parameters())
        assert all(now[name] is parameter for name, parameter in parameters.items())
        assert {parameter.device.type for parameter in now.values()} == {device}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float16, 0.1)])
def test_xformers_is_kept_and_gives_what_sdpa_gives(composer, method, dtype, tolerance):
    pytest.importorskip("xformers.ops")
    composer.to(DEVICE, dtype)
    expected = latents_of(composer, method=method)
    composer.enable_xformers_memory_efficient_attention()
    processors = composer.unet.attn_processors
    assert {type(processor) for processor in processors.values()} == {XFormersAttnProcessor}
    assert_close(latents_of(composer, method=method), expected, tolerance)
    assert composer.unet.attn_processors == processors


def test_four_concepts_need_little_more_memory_than_none(write_lora):
    """In the size of Stable Diffusion 1.5, 512 pixels, half precision."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=24, attention_head_dim=8).half().eval()
    pipe = small_pipeline(unet=unet)
    pipe.to(DEVICE, torch.float16)
    load_concepts(pipe, write_lora, rank=8, size=0.01)

    def peak(**arguments: Any) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        latents_of(pipe, width=512, height=512, **arguments)
        return torch.cuda.max_memory_allocated()

    peak(composed=False)  # workspaces of the libraries
    plain, composed = peak(composed=False), peak(method="tara")
    assert plain > 1.5e9
    assert composed <= 1.3 * plain
    assert peak(composed=False) <= 1.01 * plain


# All updates that there can be: when an image stops is a matter of its numbers.
WAITING = [replace(method, least_updates=1.0) if isinstance(method, LoraComposer) else method for method in METHODS]


@pytest.mark.parametrize("method", WAITING)
def test_steps_after_the_first_wait_for_the_device_once_for_an_update_and_otherwise_never(composer, method):
    """Launches run ahead: from the end of one step to the scheduler's next nothing else may synchronise."""
    composer.to(DEVICE)
    waits: list[int] = []

    class Watched(DDIMScheduler):
        """The end of what is watched; it waits for the device itself."""

        def step(self, *args: Any, **options: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("called a synchronizing" in str(warning.message) for warning in caught))
            caught.clear()
            return super().step(*args, **options)

    def watch(pipe, step, timestep, tensors):
        torch.cuda.set_sync_debug_mode("warn")
        return tensors

    composer.scheduler = Watched.from_config(composer.scheduler.config)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            latents = latents_of(composer, method=method, num_inference_steps=4, callback_on_step_end=watch)
            caught.clear()
            latents.sum().item()
            assert any("called a synchronizing" in str(warning.message) for warning in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Updates end at half of the steps, with that of the step which begins there.
    assert waits == ([0, 1, 1, 0] if isinstance(method, LoraComposer) else [0, 0, 0, 0])


def test_several_loras_cost_no_more_time_than_adapters_of_peft():
    """On the structure of Stable Diffusion 1.5; `lora-compose bench --time --device cuda` shows the figures."""
    plain = Job("random:sd-1.5", DEVICE, steps=10, concepts=8, dtype="float16")
    pipe = open_with_concepts(plain)
    for concepts in (1, 2, 4, 8):
        ways = ("merge", "tara", "regional", *PEFT_WAYS)
        timed = time_ways(pipe, [replace(plain, method=name, concepts=concepts) for name in ways], rounds=5)
        ratios = {name: one.ratio for name, one in zip(ways, timed, strict=True)}
        assert ratios["merge"] < 1.1 * ratios["fuse_lora"], ratios
        assert max(ratios[name] for name in ("merge", "tara")) < ratios["set_adapters"], ratios
        assert concepts < 4 or ratios["regional"] < ratios["set_adapters"], ratios


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_training_in_half_precision_goes_on_as_if_undisturbed(tmp_path, precision):
    paint_folder(tmp_path / "images")
    small_pipeline(StableDiffusionPipeline, unet=sd_unet(**TINY)).save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"cpu": False, "tara": TARA, "steps": 6, "mixed_precision": precision}
    whole = training(tmp_path, tmp_path / "model", **given, out=tmp_path / "whole.safetensors")
    settings = training(tmp_path, tmp_path / "model", **given)

    def stop(step: int, _: float) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        train(settings, on_step=stop)
    state = torch.load(settings.checkpoint, weights_only=True)
    assert bool(state["scaler"]) == (precision == "fp16")
    assert {tensor.dtype for tensor in state["weights"].values()} == {torch.float32}
    expected, found = load_file(train(whole)), load_file(train(settings))
    for name, tensor in expected.items():
        assert tensor.isfinite().all()
        assert_close(found[name], tensor, 1e-4)
