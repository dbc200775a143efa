"""The metric arcface: networks of faces in ONNX files, against torch, OpenCV's own recogniser, and numbers by hand."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from commands import call, flat
from lora_compose.compose.evaluation.chosen import Chosen, chosen
from lora_compose.compose.evaluation.faces import FaceEncoder
from lora_compose.compose.evaluation.planning import plan_batches
from lora_compose.compose.evaluation.scoring import open_scorer, squared
from lora_compose.compose.evaluation.suite import Suite, SuiteScene, moved_suite, read_suite
from onnx_files import MARK, POINTS, REACH, weights, write, write_finder, write_recogniser


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recogniser(tmp_path_factory.mktemp("faces") / "recogniser.onnx")


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finder(tmp_path_factory.mktemp("finder") / "finder.onnx")


def noise(seed: int, size: tuple[int, int] = (112, 112)) -> Image.Image:
    """Smooth grey, in which no mark is found."""
    small = np.random.default_rng(seed).integers(60, 200, (6, 6), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def with_face(seed: int, cell: tuple[int, int] = (20, 20), size: int = 320) -> Image.Image:
    """Smooth grey with a mark in a cell of 40 x 40."""
    image = noise(seed, (size, size))
    side = size // 40
    image.paste(MARK, (cell[0] * side, cell[1] * side, (cell[0] + 1) * side, (cell[1] + 1) * side))
    return image


def embedded(face: np.ndarray) -> torch.Tensor:
    """The recogniser in torch; `face` is RGB. Shape: [channels] of length 1."""
    kernel, bias, matrix = (torch.from_numpy(weights()[name]) for name in ("kernel", "bias", "matrix"))
    pixels = torch.tensor(face).float().permute(2, 0, 1)[None] / 127.5 - 1
    means = F.avg_pool2d(F.conv2d(pixels, kernel, bias, padding=2).relu(), 16)
    return F.normalize((means.reshape(1, -1) @ matrix)[0], dim=0)


# --- one face ---


def test_an_image_that_is_a_face_is_embedded_as_the_network_does_in_torch(recogniser: Path) -> None:
    images = [noise(1), noise(2)]
    found = FaceEncoder(str(recogniser)).images(images)
    torch.testing.assert_close(found, torch.stack([embedded(np.asarray(it)) for it in images]), atol=1e-4, rtol=0)
    assert FaceEncoder(str(recogniser)).images([]).shape == (0, len(found[0]))


def test_a_network_that_scales_pixels_itself_gets_them_as_they_are(recogniser: Path, tmp_path: Path) -> None:
    own = write_recogniser(tmp_path / "own.onnx", scales=True)
    both = [FaceEncoder(str(path)).images([noise(3)]) for path in (recogniser, own)]
    torch.testing.assert_close(both[0], both[1], atol=1e-4, rtol=0)
    pixels = cv2.cvtColor(np.asarray(noise(3)), cv2.COLOR_RGB2BGR)
    opencv = torch.from_numpy(cv2.FaceRecognizerSF.create(str(own), "").feature(pixels))
    torch.testing.assert_close(both[1], F.normalize(opencv, dim=-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [320, 640])
def test_a_face_is_turned_and_scaled_as_opencv_does(recogniser: Path, finder: Path, size: int) -> None:
    image = with_face(4, (18, 22), size)
    face = FaceEncoder(str(recogniser), str(finder)).face(image)
    assert face is not None
    cell, corner = size / 40, np.array([18, 22]) * size / 40
    points = (corner + np.array(POINTS) * cell).reshape(-1)
    box = [*(corner + cell / 2 - REACH * size / 640), REACH * size / 320, REACH * size / 320]
    row = np.array([[*box, *points, 1.0]], np.float32)
    pixels = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
    by_opencv = cv2.FaceRecognizerSF.create(str(recogniser), "").alignCrop(pixels, row)
    assert face.shape == by_opencv.shape == (112, 112, 3)
    difference = np.abs(face.astype(int) - by_opencv.astype(int))
    assert difference.mean() < 0.5
    assert face.std() > 10


def test_an_image_without_a_face_is_no_direction(recogniser: Path, finder: Path) -> None:
    found = FaceEncoder(str(recogniser), str(finder)).images([noise(5, (320, 320)), with_face(5)])
    assert found.norm(dim=1).tolist() == pytest.approx([0, 1])


# --- in a suite ---


def people(recogniser: Path, finder: Path | None, folder: Path, **references: list[Image.Image]) -> Suite:
    """The bear and the robot of the playground with other references, in two halves of an image."""
    quick, paths = read_suite("playground-quick"), dict[str, tuple[str, ...]]()
    for name, images in references.items():
        files = [folder / f"{name}-{number}.png" for number in range(len(images))]
        for image, path in zip(images, files, strict=True):
            image.save(path)
        paths[name] = tuple(map(str, files))
    concepts = tuple(quick.concept(name).model_copy(update={"references": paths[name]}) for name in ("bear", "robot"))
    scene = SuiteScene(
        name="pair", prompt="a xlo bear and a qrt robot", concepts=("bear", "robot"),
        regions={"bear": (0, 0, 320, 320), "robot": (320, 0, 640, 320)},
    )  # fmt: skip
    metric = f"arcface={recogniser}" + (f"+{finder}" if finder else "")
    changes = {"detector": None, "concepts": concepts, "scenes": (scene,), "metrics": chosen([metric])}
    return quick.model_copy(update=changes)


def test_each_subject_is_compared_by_its_face(recogniser: Path, finder: Path, tmp_path: Path) -> None:
    references = {"bear": [with_face(6), with_face(7, (12, 25)), noise(8)], "robot": [with_face(9)]}
    suite = people(recogniser, finder, tmp_path, **references)
    image = Image.new("RGB", (640, 320))
    halves = {"bear": with_face(10, (22, 18)), "robot": noise(11, (320, 320))}
    for at, half in zip((0, 320), halves.values(), strict=True):
        image.paste(half, (at, 0))
    score = open_scorer(suite).score(image, suite.scenes[0]).chosen["arcface"]

    encoder = FaceEncoder(str(recogniser), str(finder))

    def face(of: Image.Image) -> torch.Tensor:
        aligned = encoder.face(squared(of))
        assert aligned is not None
        return embedded(cv2.cvtColor(aligned, cv2.COLOR_BGR2RGB))

    shown = face(halves["bear"])
    by_hand = sum(float(shown @ face(of)) for of in references["bear"][:2]) / 2
    assert score.found == pytest.approx({"bear": by_hand, "robot": 0.0}, abs=1e-4)
    assert abs(by_hand) > 0.05


def test_what_has_no_face_in_its_references_is_left_out(recogniser: Path, finder: Path, tmp_path: Path) -> None:
    suite = people(recogniser, finder, tmp_path, bear=[with_face(6)], robot=[noise(8)])
    image = Image.new("RGB", (640, 320))
    image.paste(with_face(10), (320, 0))
    score = open_scorer(suite).score(image, suite.scenes[0]).chosen["arcface"]
    assert score.found == {"bear": 0.0}
    assert set(score.whole) == {"bear"}
    nothing = people(recogniser, finder, tmp_path, bear=[noise(6)], robot=[noise(8)])
    with pytest.raises(ValueError, match=r"finds no face in the references of any concept \(bear, robot\); leave"):
        open_scorer(nothing)


def test_without_a_network_that_finds_faces_what_was_found_is_one(
    recogniser: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suite = people(recogniser, None, tmp_path, bear=[noise(6)], robot=[noise(8)])
    image = Image.new("RGB", (640, 320))
    halves = noise(12, (320, 320)), noise(13, (320, 320))
    for at, half in zip((0, 320), halves, strict=True):
        image.paste(half, (at, 0))
    score = open_scorer(suite).score(image, suite.scenes[0]).chosen["arcface"]
    small = [
        np.asarray(it.resize((112, 112), Image.Resampling.BOX)) for it in halves
    ]  # a mean of areas, as OpenCV's up to rounding
    by_hand = [float(embedded(it) @ embedded(np.asarray(noise(seed)))) for it, seed in zip(small, (6, 8), strict=True)]
    assert [score.found["bear"], score.found["robot"]] == pytest.approx(by_hand, abs=0.02)
    assert "takes what was found of a subject for its face" in caplog.text


def test_both_networks_count_for_what_is_stored_and_move_with_the_suite(
    recogniser: Path, finder: Path, tmp_path: Path
) -> None:
    suite = people(recogniser, finder, tmp_path, bear=[with_face(6)], robot=[with_face(8)])
    keys = {plan_batches(it).batches[0].scores for it in (
        suite, suite.model_copy(update={"metrics": chosen([f"arcface={recogniser}"])}),
        suite.model_copy(update={"metrics": chosen([f"arcface={recogniser}+{recogniser}"])}),
    )}  # fmt: skip
    assert len(keys) == 3
    (moved,) = moved_suite(suite, lambda source: f"/there{source}").metrics
    assert (moved.model, moved.faces) == (f"/there{recogniser}", f"/there{finder}")
    assert Suite.model_validate_json(suite.model_dump_json()) == suite


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arcface", "arcface needs a network of yours that recognises faces: write arcface=FILE.onnx, or with one"),
        ({"name": "dino", "faces": "a.onnx"}, "dino finds no faces, only arcface does"),
        ({"name": "arcface", "model": "a.onnx", "threshold": 0.3}, "arcface reads no threshold"),
    ],
)
def test_settings_that_cannot_be_are_refused(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chosen.model_validate(text)


def test_what_is_no_network_of_faces_is_said(recogniser: Path, finder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(recogniser.read_bytes()[:300])
    square = write(tmp_path / "square.onnx", [], {}, [1, 3, 112, 112], {"input": [1, 3, 112, 112]})
    for files, message in (
        (["faces.onnx"], "there is no file 'faces.onnx' of a network that recognises faces; expected a file .onnx"),
        ([str(recogniser), "found.onnx"], "there is no file 'found.onnx' of a network that finds faces"),
        ([str(damaged)], "damaged.onnx' cannot be run on a face of 112 x 112 pixels: "),
        ([str(square)], "square.onnx' "),
        ([str(finder)], "finder.onnx' gives "),
        ([str(recogniser), str(recogniser)], "recogniser.onnx' finds no faces as YuNet does: "),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            FaceEncoder(*files)


def test_a_missing_network_is_said_before_anything_is_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = call("evaluate", "run", "playground-quick", "--out", out, "--metrics", "arcface=no.onnx", code=2)
    assert "there is no file 'no.onnx' of a network that recognises faces" in flat(found.output)
    assert not out.exists()
