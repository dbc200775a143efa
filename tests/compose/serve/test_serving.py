"""The server: the images of the Python call, batches of requests, back-pressure, and answers to what is wrong."""

import json
import threading
import time
import urllib.error
import urllib.request
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
from pydantic import ValidationError

from commands import call, flat, free_port
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import assets_dir
from lora_compose.compose.serve.engine import Busy, Engine, call_pipe
from lora_compose.compose.serve.requests import ImageRequest
from lora_compose.pipelines.scene import Concept, Run, Scene

LORAS = assets_dir() / "playground" / "loras"
SIZE = {"width": 64, "height": 64, "steps": 1, "guidance_scale": 4}
BEAR = {**SIZE, "prompt": "a xlo bear on grass", "concepts": ["bear"], "seed": 1}
ROBOT = {**SIZE, "prompt": "a qrt robot", "concepts": [{"name": "robot", "weight": 0.8}], "seed": 2}
BOXED = {**SIZE, "prompt": "a xlo bear", "concepts": [{"name": "bear", "region": [0, 0, 32, 64]}]}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = open_model(Run(scene=Scene(prompt="-"), model="playground", device="cpu"))
    pipe.add_concepts(LORAS)
    return pipe


def asked(given: dict[str, Any]) -> ImageRequest:
    return ImageRequest.model_validate(given).resolved(128, 128)


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


# --- requests ---


def test_what_is_left_open_is_resolved_from_the_request_alone() -> None:
    assert asked({"prompt": "a"}).shape == (128, 128, 25, 5.0, None)
    assert asked(BEAR).method == "merge"
    assert asked(BOXED).method == "regional"
    assert asked({**BOXED, "method": "tara"}).method == "tara"
    style = {"name": "faded", "role": "style"}
    assert asked({**BOXED, "concepts": [*BOXED["concepts"], style]}).method == "regional"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 3000}, "2000"),
        ({"concepts": ["bear"] * 2}, "stands twice"),
        ({"concepts": [f"{i}" for i in range(9)]}, "at most 8"),
        ({"concepts": [{"name": "bear", "lora": "/etc/passwd"}]}, "lora"),
        ({"concepts": [{"name": "bear", "region": [0, 0, 99, 9]}]}, "leaves the canvas"),
        ({"method": "mrge"}, "unknown method"),
        ({"concepts": []}, None),
        ({"concepts": [], "method": "merge"}, "needs concepts"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance"),
    ],
)
def test_requests_are_bounded(change: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        asked({**BEAR, **change})
        return
    with pytest.raises(ValidationError, match=expected):
        asked({**BEAR, **change})


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
    with running(engine), pytest.raises(ValueError, match="no LoRA 'fox'"):
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


# --- over HTTP ---


@pytest.fixture(scope="module")
def server(pipe: Any) -> Iterator[str]:
    pytest.importorskip("fastapi", reason="the server needs fastapi: the extra serve")
    uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn: the extra serve")
    from lora_compose.compose.serve.app import make_app
    from lora_compose.compose.serve.requests import Limits

    app = make_app(Engine(pipe, most=2, wait=0.0, queue=8), (128, 128), Limits(pixels=128 * 128, steps=4))
    port = free_port()
    web = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    web.should_exit = True
    thread.join()


def answer(url: str, body: Any = None) -> tuple[int, bytes, dict[str, str]]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_the_image_over_http_is_that_of_the_python_call(server: str, pipe: Any) -> None:
    code, data, headers = answer(f"{server}/images", BEAR)
    assert (code, headers["content-type"], headers["x-images-together"]) == (200, "image/png", "1")
    expected = pipe(
        [BEAR["prompt"]], concepts=[["bear"]], method="merge", width=64, height=64, num_inference_steps=1,
        guidance_scale=4, negative_prompt=[""], generator=generators(1),
    ).images[0]  # fmt: skip
    assert same(Image.open(BytesIO(data)), expected)


def test_loras_and_health(server: str) -> None:
    loras = json.loads(answer(f"{server}/loras")[1])
    assert set(loras) == {path.stem for path in LORAS.glob("*.safetensors")}
    assert loras["bear"] == {"trigger": "xlo", "class_word": "bear"}
    code, data, _ = answer(f"{server}/health")
    told = json.loads(data)
    assert (code, told["alive"], told["waiting"]) == (200, True, 0)
    assert told["memory_bytes"] > 2**20


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"concepts": ["fox"]}, "there is no LoRA"),
        ({"steps": 5}, "at most 4"),
        ({"width": 512}, "too large"),
        ({"width": 65}, "65"),
        ({"prmpt": "a"}, "prmpt"),
    ],
)
def test_what_cannot_be_made_is_answered_with_the_reason(server: str, change: dict[str, Any], expected: str) -> None:
    code, data, _ = answer(f"{server}/images", {**BEAR, **change})
    assert code == 422
    assert expected in data.decode()


@pytest.mark.slow
def test_a_full_queue_is_answered_by_retry_after(server: str) -> None:
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda seed: answer(f"{server}/images", {**BEAR, "seed": seed}), range(24)))
    codes = [code for code, *_ in answers]
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 8
    assert all(int(headers["retry-after"]) >= 1 for code, _, headers in answers if code == 503)


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    assert "--loras names a folder" in flat(call("serve", "playground", "--loras", tmp_path / "none", code=2).output)
    assert "did you mean 'playground'" in call("serve", "plyground", "--loras", tmp_path, code=2).output
