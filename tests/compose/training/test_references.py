"""Training with reference images: the network sees what diffusers' pipelines show it; pairs are found by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.pipelines.flux import pipeline_flux_kontext as diffusers_own
from PIL import Image

from chroma import CHROMA
from components import seeded
from flux_kontext import KONTEXT
from lora_compose import ComposePipeline
from lora_compose.attention.backbones.joint import unpacked
from lora_compose.compose.training import Training, train
from lora_compose.compose.training.bases import base_of
from lora_compose.compose.training.batches import batches_of
from lora_compose.compose.training.data import DataError, digest, load_image, read_images, with_references
from lora_compose.compose.training.learner import Learner, Weights
from lora_compose.compose.training.preparation import adapt, encode, read_captioned
from qwen_image_edit import QWEN_IMAGE_EDIT
from trainings import PAIRED, paint_folder, sd_pipeline, trained_pipeline, training

SIDE = 64  # pixels: the smallest side that FLUX.2 reads, and that of Qwen's references here
CAPTIONS = ("a sks cat on grass", "a sks cat and a dog")
UNGUIDED = {
    "FLUX.1 Kontext": {
        "guidance_scale": 1.0, "_auto_resize": False, "max_area": SIDE**2, "max_sequence_length": 48
    },
    "FLUX.2-klein": {"guidance_scale": 1.0}, "FLUX.2-dev": {"guidance_scale": 1.0},
    "FLUX.3": {"guidance_scale": 1.0},
}  # fmt: skip
SLOW = "FLUX.2-dev", "Qwen-Image-Edit-Plus"
"""Of which the default suite has a sister."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two captioned images, and folders with a first and a second reference of each."""
    paint_folder(tmp_path / "images", 2, (SIDE, SIDE))
    for i, caption in enumerate(CAPTIONS):
        (tmp_path / "images" / f"{i}.txt").write_text(caption)
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        for i in range(2):
            colour = (200 * number, 100 * i, 50)
            Image.new("RGB", (SIDE, SIDE), colour).save(tmp_path / name / f"{i}.png")
    return tmp_path


def pairs(folder: Path, count: int = 2) -> tuple[Path, ...]:
    return tuple(folder / name for name in ("first", "second")[:count])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PAIRED])
def test_the_network_sees_what_the_pipeline_of_diffusers_shows_it(name: str, folder: Path) -> None:
    """The prediction for a noisy example is that of diffusers' own call with its caption and references."""
    family, count = PAIRED[name]
    pipe = trained_pipeline(family)
    base = base_of(pipe)
    settings = training(folder, "unused", resolution=SIDE, references=pairs(folder, count))
    base.check(settings)
    captioned = read_captioned(base, settings)
    material = encode(base, captioned, settings, Accelerator(cpu=True))
    batches = batches_of(material.concept, None, None, seed=0, sizes=(1, 0), noising=base.noising(settings))
    batch, image = batches.of(0, 0), captioned.images[batches.concept.image(0)]
    calls: list[tuple[dict[str, Any], Any]] = []
    handle = pipe.transformer.register_forward_hook(
        lambda module, given, named, output: calls.append((named, output)), with_kwargs=True
    )
    plain = family.plain(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    plain(
        image=[load_image(reference.path) for reference in image.references], prompt=image.caption, height=SIDE,
        width=SIDE, num_inference_steps=2, output_type="latent", generator=seeded(1), **UNGUIDED.get(name, {}),
    )  # fmt: skip
    handle.remove()
    (seen, (velocity,)), cells, grid = calls[0], (SIDE // 16) ** 2, (SIDE // 8, SIDE // 8)
    noisy = unpacked(seen["hidden_states"][:, :cells], grid)
    with torch.no_grad():
        found = base.noising(settings).predict(noisy, seen["timestep"] * 1000, batch.text, batch.added)
        wrong = {"reference": torch.randn(batch.added["reference"].shape, generator=seeded(2))}
        other = base.noising(settings).predict(noisy, seen["timestep"] * 1000, batch.text, batch.added | wrong)
    expected = unpacked(velocity[:, :cells], grid)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    assert (other - expected).abs().max() > 1e-3


def test_the_class_is_kept_beside_the_same_references(folder: Path) -> None:
    base = base_of(QWEN_IMAGE_EDIT.pipeline())
    settings = training(folder, "unused", resolution=SIDE, references=pairs(folder), preserve_class=True)
    material = encode(base, read_captioned(base, settings), settings, Accelerator(cpu=True))
    concept, prior = material.concept, material.prior
    assert prior is not None
    assert torch.equal(prior.by_image["reference"], torch.cat([concept.by_image["reference"]] * 2))
    assert prior.text.shape[1:] == concept.text.shape[1:]
    assert not torch.equal(prior.text[: len(concept.text)], concept.text)
    batches = batches_of(concept, prior, None, seed=0, sizes=(1, 1), noising=base.noising(settings))
    adapt(base, settings, None)
    with torch.no_grad():
        assert Learner(base.network, base.noising(settings), Weights(), preserves=True)(batches.of(0, 0)).prior < 1e-10


def test_a_file_says_that_it_reads_references(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its concept acts on them without being told; samples show the reference of the first image."""
    monkeypatch.setattr(diffusers_own, "PREFERRED_KONTEXT_RESOLUTIONS", [(SIDE, SIDE)])
    KONTEXT.pipeline().save_pretrained(folder / "model")
    settings = training(folder, folder / "model", resolution=SIDE, references=pairs(folder, 1), steps=2, sample_every=2)
    path = train(settings)
    assert Image.open(folder / "cat-samples" / "000002-0.png").size == (SIDE, SIDE)
    pipe: Any = ComposePipeline.from_pretrained(folder / "model")
    assert pipe.load_concept(path).references is True
    assert pipe.load_concept(path, name="other", references=False).references is False
    assert pipe.resolve_concepts([{"name": "from disk", "lora": str(path)}])[0].concept.references is True
    trained = train(training(folder, folder / "model", resolution=SIDE, steps=2, out=folder / "plain.safetensors"))
    assert pipe.load_concept(trained).references is None


def test_references_are_found_by_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = read_images(folder / "images", ["x"])
    Image.new("RGB", (8, 8)).save(folder / "second" / "7.jpg")
    (folder / "second" / "0.png").rename(folder / "second" / "0.webp")
    found = with_references(images, pairs(folder))
    names = [[reference.path.relative_to(folder).as_posix() for reference in image.references] for image in found]
    assert names == [["first/0.png", "second/0.webp"], ["first/1.png", "second/1.png"]]
    assert "references of images that are not there: 7" in caplog.text
    assert len({digest(images), digest(found), digest(with_references(images, pairs(folder)[::-1]))}) == 3
    Image.new("RGB", (SIDE, SIDE), "red").save(folder / "first" / "1.png")
    assert digest(with_references(images, pairs(folder))) != digest(found)


def test_missing_and_doubtful_references_are_named(folder: Path) -> None:
    images = read_images(folder / "images", ["x"])
    Image.new("RGB", (8, 8)).save(folder / "first" / "1.jpg")
    with pytest.raises(DataError, match=r"first has 1\.jpg and 1\.png as references of one image"):
        with_references(images, pairs(folder, 1))
    (folder / "second" / "1.png").unlink()
    with pytest.raises(DataError, match="second has no reference image of 1; expected one of the same name"):
        with_references(images, pairs(folder)[1:])
    (folder / "second" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png is not a readable image"):
        with_references(images, pairs(folder)[1:])
    with pytest.raises(DataError, match="there is no folder"):
        with_references(images, [folder / "none"])


@pytest.mark.parametrize(
    ("pipeline", "count", "complaint"),
    [
        (sd_pipeline, 1, "Stable Diffusion reads no reference images"),
        (CHROMA.pipeline, 1, "Chroma reads no reference images; leave --references out"),
        (KONTEXT.pipeline, 2, "reads 1 reference image, not 2"),
        (QWEN_IMAGE_EDIT.pipeline, 0, "reads every text with a reference image; give --references FOLDER"),
    ],
)
def test_what_a_model_does_not_read_is_refused(
    pipeline: Callable[[], Any], count: int, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        base_of(pipeline()).check(training(tmp_path, "unused", references=pairs(tmp_path, count)))


def test_class_images_do_not_go_with_references(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images of the class have no reference images; keep the class with"):
        training(tmp_path, "unused", references=pairs(tmp_path), class_count=2)
    preset = {"images": tmp_path, "out": tmp_path / "cat.safetensors", "trigger": "sks", "class_word": "cat"}
    assert Training.preset("playground-flux", **preset, references=pairs(tmp_path)).class_count == 0
