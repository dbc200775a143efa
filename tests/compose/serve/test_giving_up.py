"""Requests that nobody waits for any more: their calls end after a step, and the server ends with them."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import assets_dir
from lora_compose.compose.serve.engine import Busy, Engine, call_pipe
from lora_compose.compose.serve.requests import ImageRequest
from lora_compose.pipelines.scene.scene import Run, Scene
from served import answer, closed, connect, server

LONG = {"prompt": "a xlo bear", "width": 64, "height": 64, "steps": 50, "guidance_scale": 1}
PLAIN, COMPOSED = LONG, {**LONG, "concepts": ["bear"]}
SHORT = {**COMPOSED, "steps": 1, "seed": 3}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = open_model(Run(scene=Scene(prompt="-"), model="playground", device="cpu"))
    pipe.add_concepts(assets_dir() / "playground" / "loras")
    return pipe


class Stepping(Engine):
    """An engine that stands still after the first step of its first call, until it is let go."""

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, wait=0.0, **options)
        self.standing, self.go, self.steps = threading.Event(), threading.Event(), 0

    def after_step(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        self.steps += 1
        self.standing.set()
        assert self.go.wait(60)
        return super().after_step(pipe, step, timestep, tensors)


@pytest.fixture
def engine(pipe: Any) -> Iterator[Stepping]:
    engine = Stepping(pipe, most=2)
    yield engine
    engine.go.set()
    assert engine.stop(30)


def asked(given: dict[str, Any]) -> ImageRequest:
    return ImageRequest.model_validate(given).resolved(128, 128, 25, 5.0)


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("given", [PLAIN, COMPOSED], ids=["plain", "composed"])
def test_a_call_that_is_given_up_ends_after_its_step_and_leaves_nothing(
    engine: Stepping, pipe: Any, given: dict[str, Any]
) -> None:
    engine.start()
    left = engine.submit(asked(given))
    assert engine.standing.wait(60)
    next_one = engine.submit(asked(SHORT))
    assert left.cancel()
    engine.go.set()
    image = next_one.result(60).image
    assert engine.steps == 2, "one of fifty, and the one of the next call"
    assert np.array_equal(np.asarray(image), np.asarray(call_pipe(pipe, [asked(SHORT)])[0]))


def test_a_call_goes_on_for_those_who_still_wait(engine: Stepping) -> None:
    first, second = (engine.submit(asked({**COMPOSED, "steps": 2, "seed": seed})) for seed in (1, 2))
    engine.start()
    assert engine.standing.wait(60)
    assert first.cancel()
    engine.go.set()
    assert second.result(60).together == 2
    assert (engine.steps, first.cancelled()) == (2, True)


def test_the_end_gives_up_everything_at_once(engine: Stepping) -> None:
    engine.start()
    running = engine.submit(asked(COMPOSED))
    assert engine.standing.wait(60)
    waiting = engine.submit(asked(SHORT))
    begun = time.monotonic()
    assert not engine.stop(0.1), "its thread is in a step"
    assert time.monotonic() - begun < 10
    assert running.cancelled()
    assert waiting.cancelled()
    with pytest.raises(Busy, match="ending"):
        engine.submit(asked(SHORT))
    engine.go.set()
    assert engine.stop(30)
    assert engine.steps == 1


def test_what_would_wait_too_long_is_refused(pipe: Any) -> None:
    engine = Stepping(pipe, most=1, timeout=0.5)
    slow = {**COMPOSED, "steps": 1}
    engine.start()
    first = engine.submit(asked(slow))
    assert engine.standing.wait(60)
    time.sleep(1.0)  # so long does one of its kind take
    engine.go.set()
    first.result(60)
    engine.go.clear()
    engine.standing.clear()
    running = engine.submit(asked({**SHORT, "steps": 2}))  # of another kind: nothing is known of it
    assert engine.standing.wait(60)
    waiting = engine.submit(asked(slow))
    with pytest.raises(Busy, match=r"about \d seconds long; at most 0; try again in"):
        engine.submit(asked(slow))
    assert waiting.cancel()
    again = engine.submit(asked(slow))
    engine.go.set()
    assert [one.result(60).together for one in (running, again)] == [1, 1]
    assert engine.stop(30)


# --- over HTTP ---


def request(given: dict[str, Any]) -> bytes:
    body = json.dumps(given).encode()
    head = f"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def app_of(engine: Engine) -> Any:
    pytest.importorskip("fastapi", reason="the server needs fastapi: the extra serve")
    from lora_compose.compose.serve.app import make_app

    return make_app(engine, (64, 64), steps=25, guidance_scale=5.0)


def test_clients_that_leave_keep_nobody_waiting(engine: Stepping) -> None:
    with server(app_of(engine), engine) as port:
        clients = [connect(port, request(COMPOSED))]
        assert engine.standing.wait(60)
        clients += [connect(port, request({**COMPOSED, "seed": seed})) for seed in range(5)]
        until(lambda: (engine.facts.running, engine.facts.waiting) == (1, 5))
        for client in clients:
            client.close()
        until(lambda: engine.facts.waiting + engine.facts.running == 0)
        engine.go.set()
        assert answer(port, "/images", SHORT)[0] == 200
    assert engine.steps == 2


def test_after_the_timeout_there_is_an_answer_whatever_runs(pipe: Any) -> None:
    engine = Stepping(pipe, most=1, timeout=0.5)
    with server(app_of(engine), engine) as port:
        with ThreadPoolExecutor(2) as clients:
            answers = list(clients.map(lambda seed: answer(port, "/images", {**COMPOSED, "seed": seed}), (1, 2)))
        for code, data, headers in answers:
            assert (code, headers["retry-after"]) == (503, "1")
            assert "no image after 0.5 seconds" in data.decode()
        until(lambda: engine.facts.waiting + engine.facts.running == 0)
        engine.go.set()
    assert engine.steps == 1


def test_a_server_that_ends_answers_and_waits_for_no_call(engine: Stepping, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="the server needs fastapi: the extra serve")
    monkeypatch.setattr("lora_compose.compose.serve.app._STOPPING", 0.5)
    with ThreadPoolExecutor(1) as clients:
        with server(app_of(engine), engine) as port:
            idle = connect(port)
            asking = clients.submit(answer, port, "/images", COMPOSED)
            assert engine.standing.wait(60)
            begun = time.monotonic()
        assert time.monotonic() - begun < 15, "bounds of half a second and of 5 seconds; the step does not end"
        code, data, _ = asking.result(10)
        assert (code, json.loads(data)["detail"]) == (503, "the server is ending")
        assert closed(idle)
    assert engine.steps == 1
