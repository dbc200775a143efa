"""Ways to need less memory: what they do with a pipeline, with images, and where they are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from commands import call
from components import small_vae, tiny_pipeline
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.generate import images, replay
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.savers import SAVERS, Saver, check_savers, enable_tiling, in_order, place
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from qwen_image import qwen_image_vae

BOXES = {"bear": ("xlo", (0, 8, 30, 56)), "robot": ("qrt", (34, 8, 64, 56))}
SCENE = Scene(
    prompt="a xlo bear and a qrt robot on a white background",
    concepts=tuple(
        Concept(name=name, lora=f"playground:{name}", trigger=trigger, class_word=name, region=box)
        for name, (trigger, box) in BOXES.items()
    ),
    width=64,
    height=64,
)
RUN = Run(scene=SCENE, model=PLAYGROUND, method="lora-composer", steps=2, device="cpu")


class Placed(ComposeStableDiffusionPipeline):
    """Writes down where it is put, and goes nowhere."""

    where: tuple[Any, ...] = ()

    def to(self, device: Any) -> Any:
        Placed.where = "to", device
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        Placed.where = "model", device

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        Placed.where = "layers", device


def test_a_model_is_opened_as_asked() -> None:
    pipe = open_model(RUN)
    assert not pipe.vae.use_tiling
    assert not pipe.unet.is_gradient_checkpointing
    pipe = open_model(RUN, [Saver.TILING, Saver.GRADIENT_CHECKPOINTING])
    assert pipe.vae.use_tiling
    assert pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize(("savers", "where"), [
    ([], ("to", "cuda:1")), ([Saver.TILING], ("to", "cuda:1")), ([Saver.MODEL_OFFLOAD], ("model", "cuda:1")),
    ([Saver.SEQUENTIAL_OFFLOAD, Saver.GRADIENT_CHECKPOINTING], ("layers", "cuda:1")),
])  # fmt: skip
def test_a_model_goes_where_it_is_needed(savers: list[Saver], where: tuple[str, str]) -> None:
    place(tiny_pipeline(Placed), "cuda:1", savers)
    assert Placed.where == where


@pytest.mark.parametrize(
    ("made_for", "latents", "tiles"),
    [pytest.param(1024, 128, 9, marks=pytest.mark.slow), (512, 64, 1), (128, 16, 1), (128, 24, 4)],
)
def test_tiles_are_smaller_than_the_images_of_large_models(made_for: int, latents: int, tiles: int) -> None:
    vae: Any = small_vae(sample_size=made_for, block_out_channels=(4,) * 4, norm_num_groups=2)
    decoded = []
    vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    enable_tiling(vae)
    with torch.no_grad():
        image = vae.decode(torch.zeros(1, 4, latents, latents)).sample
    assert image.shape[-2:] == (latents * 8, latents * 8)
    assert len(decoded) == tiles


def test_a_vae_for_videos_has_tiles_of_its_own() -> None:
    vae, decoded = qwen_image_vae(), []
    vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    enable_tiling(vae)
    with torch.no_grad():
        image = vae.decode(torch.zeros(1, 4, 1, 48, 32)).sample
    assert image.shape[-2:] == (384, 256)
    assert len(decoded) == 4, "256 x 256 pixels each, every 192 pixels"


def test_every_way_is_explained() -> None:
    assert set(SAVERS) == set(Saver)


def test_the_order_in_which_they_are_given_makes_no_difference() -> None:
    one, two = Saver.GRADIENT_CHECKPOINTING, Saver.TILING
    assert in_order([one, two, one]) == in_order([two, one]) == (two, one)


@pytest.mark.slow
def test_the_command_line_makes_the_same_image_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    concepts = []
    for name, (trigger, box) in BOXES.items():
        region = ":".join(map(str, box))
        concepts += ["--concept", f"path=playground:{name},trigger={trigger},class={name},region={region}"]
    what = [PLAYGROUND, "--prompt", SCENE.prompt, *concepts, "--method", "lora-composer", "--steps", 2]
    what += ["--device", "cpu", "--width", 64, "--height", 64]
    call("run", *what, "--out", tmp_path / "plain")
    saving = ["--save-memory", "gradient-checkpointing", "--save-memory", "tiling"]
    opened = []

    def remembered(run: Run, savers: Any = (), variant: str | None = None) -> Any:
        opened.append(list(savers))
        return open_model(run, savers, variant)

    for command in (images, replay):
        monkeypatch.setattr(command, "open_model", remembered)
    call("run", *what, *saving, "--out", tmp_path / "saving")
    plain, saved = (tmp_path / name / "0.png" for name in ("plain", "saving"))
    assert read_pixels(plain).tobytes() == read_pixels(saved).tobytes()
    assert read_record(plain).run == read_record(saved).run
    assert "identical" in call("replay", plain, *saving).output
    assert opened == [[Saver.GRADIENT_CHECKPOINTING, Saver.TILING]] * 2


@pytest.mark.parametrize(("savers", "device", "message"), [
    ([Saver.MODEL_OFFLOAD, Saver.SEQUENTIAL_OFFLOAD], "cuda", "model-offload and sequential-offload do not"),
    ([Saver.MODEL_OFFLOAD], "cpu", "model-offload keeps on the CPU what an accelerator does not need"),
    ([Saver.SEQUENTIAL_OFFLOAD, Saver.TILING], "cpu", "sequential-offload keeps on the CPU"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(savers: list[Saver], device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_savers(savers, device)


def test_a_refusal_comes_before_anything_is_opened() -> None:
    nowhere = RUN.model_copy(update={"model": "/nowhere"})
    with pytest.raises(ValueError, match="model-offload keeps on the CPU"):
        open_model(nowhere, [Saver.MODEL_OFFLOAD])
    offloaded = "--save-memory", "sequential-offload", "--device", "cpu"
    assert "accelerator" in call("run", PLAYGROUND, "--prompt", "a cat", *offloaded, code=2).stderr


def test_a_record_names_the_device_that_worked_not_where_an_offloaded_model_waits() -> None:
    run = RUN.model_copy(update={"method": "regional", "steps": 1})
    pipe = open_model(run)
    expected = make(pipe, run)
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert pipe.device.type == "meta"
    found = make(pipe, run)
    assert found.record == expected.record
    assert (found.record.machine.device, found.record.run.device) == ("cpu", "cpu")
