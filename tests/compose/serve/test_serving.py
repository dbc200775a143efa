"""The server: the images of the Python call, batches of requests, back-pressure, and answers to what is wrong."""

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import call
from flux import flux_pipeline
from lora_compose.compose.files.images import read_record
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import assets_dir
from lora_compose.compose.serve.choosing import chosen
from lora_compose.compose.serve.engine import Busy, Engine, call_pipe
from lora_compose.compose.serve.requests import ImageRequest, Limits
from lora_compose.pipelines.families import ComposeFluxKontextPipeline
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from lora_compose.pipelines.support.regular import sha256_of
from served import answer, server
from z_image import z_image_pipeline

LORAS = assets_dir() / "playground" / "loras"
SIZE = {"width": 64, "height": 64, "steps": 1, "guidance_scale": 4}
BEAR = {**SIZE, "prompt": "a xlo bear on grass", "concepts": ["bear"], "seed": 1}
ROBOT = {**SIZE, "prompt": "a qrt robot", "concepts": [{"name": "robot", "weight": 0.8}], "seed": 2}
BOXED = {**SIZE, "prompt": "a xlo bear", "concepts": [{"name": "bear", "region": [0, 0, 32, 64]}]}
pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = open_model(Run(scene=Scene(prompt="-"), model="playground", device="cpu"))
    pipe.add_concepts(LORAS)
    return pipe


def asked(given: dict[str, Any]) -> ImageRequest:
    return ImageRequest.model_validate(given).resolved(128, 128, 25, 5.0)


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


class Held(Engine):
    """An engine whose calls wait until they are let go."""

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self.go, self.made = threading.Event(), []

    def make(self, requests: Any) -> Any:
        self.go.wait(60)
        self.made.append([request.seed for request in requests])
        return super().make(requests)


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB")))


# --- the queue ---


def test_requests_of_one_shape_go_through_the_model_together_and_give_the_images_of_the_python_call(pipe: Any) -> None:
    engine = Held(pipe, most=3, wait=0.0)
    with running(engine):
        first = engine.submit(asked({**BEAR, "seed": 9}))
        time.sleep(0.05)
        others = [engine.submit(asked(one)) for one in (BEAR, {**BOXED, "seed": 5}, ROBOT, {**ROBOT, "steps": 2})]
        engine.go.set()
        served = [future.result(60) for future in (first, *others)]
    assert engine.made == [[9], [1, 2], [5], [2]], "the oldest first, and only those of its shape with it"
    assert [one.together for one in served] == [1, 2, 1, 2, 1]
    expected = pipe(
        [BEAR["prompt"], ROBOT["prompt"]],
        negative_prompt=["", ""],
        concepts=[["bear"], [Concept(name="robot", weight=0.8)]],
        method="merge",
        width=64,
        height=64,
        num_inference_steps=1,
        guidance_scale=4,
        generator=generators(1, 2),
    ).images
    assert same(served[1].image, expected[0])
    assert same(served[3].image, expected[1])
    assert same(served[2].image, call_pipe(pipe, [asked({**BOXED, "seed": 5})])[0])


def test_whoever_was_just_taken_from_the_queue_is_answered_at_the_end_as_well(pipe: Any) -> None:
    engine = Engine(pipe)
    future = engine.submit(asked(BEAR))
    batch = engine._next()
    assert batch is not None
    engine.end()
    engine._answer(batch)
    assert future.cancelled()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.slow
def test_a_request_waits_a_moment_for_others_and_no_longer(pipe: Any) -> None:
    engine = Held(pipe, most=2, wait=3600.0)
    engine.go.set()
    with running(engine):
        futures = [engine.submit(asked(one)) for one in (BEAR, ROBOT)]
        assert [future.result(600).together for future in futures] == [2, 2], "a full batch does not wait"
    engine = Held(pipe, most=2, wait=0.1)
    engine.go.set()
    with running(engine):
        assert engine.submit(asked(BEAR)).result(60).together == 1


@pytest.mark.slow
def test_a_full_queue_refuses_and_says_when_to_come_again(pipe: Any) -> None:
    engine = Held(pipe, most=1, wait=0.0, queue=2)
    with running(engine):
        futures = [engine.submit(asked(BEAR))]
        while engine.facts.waiting:
            time.sleep(0.01)
        futures += [engine.submit(asked({**BEAR, "seed": seed})) for seed in (3, 4)]
        with pytest.raises(Busy, match="try again in") as refused:
            engine.submit(asked(BEAR))
        assert refused.value.seconds >= 1
        assert futures[2].cancel(), "a request that waits can be given up"
        engine.go.set()
        futures[1].result(60)
    assert engine.made == [[1], [3]]
    assert (engine.facts.alive, engine.facts.images, engine.facts.calls) == (False, 2, 2)


@pytest.mark.slow
def test_a_bad_request_spoils_no_other_of_its_batch(pipe: Any) -> None:
    engine = Held(pipe, most=2, wait=1.0)
    engine.go.set()
    odd = {**SIZE, "prompt": "a xlo bear", "concepts": ["bear"], "method": "clora"}
    with running(engine), pytest.raises(ValueError, match="there is no LoRA of this name"):
        engine.submit(asked({**BEAR, "concepts": ["fox"]}))
    engine = Held(pipe, most=2, wait=1.0)
    engine.go.set()
    with running(engine):
        good = engine.submit(asked({**odd, "prompt": "a xlo bear and a qrt robot", "concepts": ["bear", "robot"]}))
        bad = engine.submit(asked({**odd, "prompt": "nothing of that kind"}))
        assert good.result(120).together == 1
        with pytest.raises(ValueError, match=r"trigger|prompt"):
            bad.result(120)
        assert engine.facts.alive


def test_a_file_that_goes_while_its_image_is_made_takes_neither_image_nor_server_with_it(
    pipe: Any, tmp_path: Path
) -> None:
    file = tmp_path / "gone.safetensors"

    class Removing(Engine):
        def make(self, requests: Any) -> Any:
            made = super().make(requests)
            file.unlink(missing_ok=True)
            return made

    shutil.copy(LORAS / "bear.safetensors", file)
    pipe.add_concepts(tmp_path)
    gone = {**BEAR, "concepts": ["gone"]}
    try:
        with running(Removing(pipe, wait=0.0, run=Run(scene=Scene(prompt="-"), model="playground"))) as engine:
            record = engine.submit(asked(gone)).result(60).record
            assert record is not None
            assert record.sha256 == {"gone": sha256_of(LORAS / "bear.safetensors")}
            with pytest.raises(FileNotFoundError):
                engine.submit(asked(gone)).result(60)
            assert engine.submit(asked(BEAR)).result(60).record is not None
            assert engine.facts.alive
    finally:
        pipe.unload_concept("gone")


def test_the_method_is_chosen_by_the_file_as_it_is_now(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "new.safetensors"
    shutil.copy(LORAS / "bear.safetensors", file)
    pipe.add_concepts(tmp_path)
    try:
        request = asked({**BEAR, "concepts": ["new"]})
        assert chosen(pipe, request)[0].method == "merge"
        shutil.copy(LORAS / "bear-tara.safetensors", file)
        assert chosen(pipe, request)[0].method == "tara"
    finally:
        pipe.unload_concept("new")


# --- over HTTP ---


@pytest.fixture(scope="module")
def port(pipe: Any) -> Iterator[int]:
    pytest.importorskip("fastapi", reason="the server needs fastapi: the extra serve")
    from lora_compose.compose.serve.app import make_app

    engine = Engine(pipe, most=2, wait=0.0, queue=8, run=Run(scene=Scene(prompt="-"), model="playground", device="cpu"))
    limits = Limits(pixels=128 * 128, steps=4)
    with server(make_app(engine, (128, 128), limits, steps=25, guidance_scale=5.0), engine) as port:
        yield port


def test_the_image_over_http_is_that_of_the_python_call(port: int, pipe: Any) -> None:
    code, data, headers = answer(port, "/images", BEAR)
    assert (code, headers["content-type"], headers["x-images-together"]) == (200, "image/png", "1")
    expected = pipe(
        [BEAR["prompt"]], concepts=[["bear"]], method="merge", width=64, height=64, num_inference_steps=1,
        guidance_scale=4, negative_prompt=[""], generator=generators(1),
    ).images[0]  # fmt: skip
    assert same(Image.open(BytesIO(data)), expected)


def test_the_request_of_the_docs_is_answered_with_an_image(port: int) -> None:
    """The body that the page sends by `curl`, as small as the other requests here."""
    text = (Path(__file__).parents[3] / "docs/serve.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"curl localhost:8500/images -o both\.png [^{]* -d '(\{.*?\})'\n", text, re.DOTALL)
    code, data, headers = answer(port, "/images", {**json.loads(body), **SIZE})
    assert (code, headers["x-method"]) == (200, "draft")
    assert Image.open(BytesIO(data)).size == (64, 64)


@pytest.mark.parametrize(
    ("change", "method", "reason"),
    [
        ({"method": "switch"}, "switch", "it was asked for"),
        ({"method": None}, "merge", "there is one subject"),
        ({"method": None, "concepts": "auto"}, "merge", "there is one subject"),
        ({"method": None, "concepts": {"bear": [0, 0, 32, 64]}}, "regional",
         "every concept has a region, and there is one subject"),
        ({"method": None, "prompt": "a xlo bear and a qrt robot", "concepts": ["bear", "robot"]}, "draft",
         "the prompt names every concept by trigger and class word"),
        ({"method": None, "concepts": []}, None, None),
    ],
)  # fmt: skip
def test_headers_name_the_method_and_the_reason(
    port: int, change: dict[str, Any], method: str | None, reason: str | None
) -> None:
    code, _, headers = answer(port, "/images", {**BEAR, **change})
    assert (code, headers.get("x-method"), headers.get("x-method-reason")) == (200, method, reason)


@pytest.mark.parametrize(
    ("prompt", "concepts"),
    [
        ("a xlo bear and a qrt robot", "auto"),
        ("a xlo bear and a robot", {"bear": 1.0, "robot": {"role": "bystander"}}),
        pytest.param(
            "a xlo bear and a bear",
            {"bear": 1.0, "other": {"role": "bystander", "class_word": "bear"}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_served_image_stores_how_it_was_made_without_paths_and_can_be_replayed(
    port: int, tmp_path: Path, prompt: str, concepts: Any
) -> None:
    asked = {**SIZE, "prompt": prompt, "concepts": concepts, "seed": 3}
    code, data, _ = answer(port, "/images", asked)
    assert code == 200, data
    (tmp_path / "it.png").write_bytes(data)
    with Image.open(BytesIO(data)) as image:
        text = image.info["lora-compose"]
    assert "/" not in json.dumps(json.loads(text)["run"])
    record = read_record(tmp_path / "it.png")
    assert (record.run.method, record.run.steps, record.together) == ("draft", 1, 1)
    assert "every concept by trigger" in (record.method_reason or "")
    told = call("replay", tmp_path / "it.png", "--loras", LORAS).output
    assert "identical: every pixel is the same" in told


def test_a_negative_prompt_is_read_where_a_guidance_scale_of_1_is_guidance() -> None:
    given = {**SIZE, "prompt": "a cat", "guidance_scale": 1}
    one, other = (
        call_pipe(z_image_pipeline(), [asked({**given, "negative_prompt": text})])[0] for text in ("", "the photo")
    )
    assert not same(one, other)


def test_pipelines_that_take_their_size_and_prompt_otherwise_are_served() -> None:
    kontext: Any = flux_pipeline(ComposeFluxKontextPipeline)
    request = ImageRequest(prompt="a cat", steps=1).resolved(128, 64, 25, 5.0)
    (image,) = call_pipe(kontext, [request])
    assert image.size == (128, 64)


def test_loras_and_health(port: int) -> None:
    loras = json.loads(answer(port, "/loras")[1])
    assert set(loras) == {path.stem for path in LORAS.glob("*.safetensors")}
    assert loras["bear"] == {"trigger": "xlo", "class_word": "bear"}
    code, data, _ = answer(port, "/health")
    told = json.loads(data)
    assert (code, told["alive"], told["waiting"]) == (200, True, 0)
    assert told["memory_bytes"] > 2**20


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"concepts": ["fox"]}, "there is no LoRA"),
        ({"steps": 5}, "at most 4"),
        ({"width": 512}, "too large"),
        ({"width": 65}, "must be multiples of 8"),
        ({"prmpt": "a"}, "did you mean 'prompt'"),
        ({"prompt": "a xlo bear <lora:fox:1>", "concepts": []}, "there is no LoRA"),
    ],
)
def test_what_cannot_be_made_is_answered_with_the_reason(port: int, change: dict[str, Any], expected: str) -> None:
    code, data, _ = answer(port, "/images", {**BEAR, **change})
    assert code == 422
    assert expected in data.decode()


@pytest.mark.slow
def test_a_full_queue_is_answered_by_retry_after(port: int) -> None:
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda seed: answer(port, "/images", {**BEAR, "seed": seed}), range(24)))
    codes = [code for code, *_ in answers]
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 8
    assert all(int(headers["retry-after"]) >= 1 for code, _, headers in answers if code == 503)
