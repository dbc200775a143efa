"""The command: what it refuses, and how it ends."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest

from commands import call, flat, free_port
from lora_compose.compose.playground.assets import assets_dir
from served import answer, closed, connect

LORAS = assets_dir() / "playground" / "loras"


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    assert "--loras names a folder" in flat(call("serve", "playground", "--loras", tmp_path / "none", code=2).output)
    assert "has no safetensors files" in flat(call("serve", "playground", "--loras", tmp_path, code=2).output)
    assert "did you mean 'playground'" in call("serve", "plyground", "--loras", tmp_path, code=2).output


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "gpu.example.org"])
def test_addresses_that_others_reach_need_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_COMPOSE_TOKEN", raising=False)
    refused = flat(call("serve", "playground", "--loras", LORAS, "--host", host, code=2).output)
    assert f"{host!r} lets others in, so a token is needed: LORA_COMPOSE_TOKEN=" in refused
    monkeypatch.setenv("LORA_COMPOSE_TOKEN", "short")
    refused = flat(call("serve", "playground", "--loras", LORAS, "--host", host, code=2).output)
    assert "16 to 200 letters" in refused
    assert "short" not in refused


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_in_the_middle_of_a_call(tmp_path: Path, number: signal.Signals) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "lora_compose", "serve", "playground", "--loras", LORAS, "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen([str(one) for one in command], stdout=file, stderr=file, env=os.environ)
    try:
        _wait_for(port, process)
        body = b'{"prompt":"a xlo bear","width":512,"height":512,"steps":50}'
        head = (
            b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        asked = connect(port, head % len(body) + b"\r\n\r\n" + body)
        time.sleep(1.0)
        begun = time.monotonic()
        process.send_signal(number)
        process.wait(40)
        assert time.monotonic() - begun < 20
        assert closed(asked)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


STUCK = """
import sys, time
from types import SimpleNamespace
from lora_compose.compose.serve.app import make_app
from lora_compose.compose.serve.engine import Engine
from lora_compose.compose.serve.launch import Server, run_server

class Stuck(Engine):
    def make(self, requests):
        time.sleep(600)

engine = Stuck(SimpleNamespace(concepts={}), wait=0.0)
app = make_app(engine, (64, 64), steps=25, guidance_scale=5.0)
run_server(Server(app, engine, "127.0.0.1", int(sys.argv[1])), engine)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_in_the_middle_of_a_step_that_does_not_end(number: signal.Signals) -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(port)], env=os.environ)
    try:
        _wait_for(port, process)
        head = b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 14"
        asked = connect(port, head + b'\r\n\r\n{"prompt":"a"}')
        time.sleep(1.0)
        begun = time.monotonic()
        process.send_signal(number)
        process.wait(40)
        assert time.monotonic() - begun < 20
        assert closed(asked)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        try:
            answer(port, "/health")
        except urllib.error.URLError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("the server has ended")


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("command", ["run", "serve"])
def test_a_damaged_model_is_named_before_anything_is_opened(tmp_path: Path, command: str, kind: str) -> None:
    damaged = tmp_path / "model.safetensors" if kind == "file" else tmp_path / "model/model_index.json"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text("not what it should be", encoding="utf-8")
    model = damaged if kind == "file" else damaged.parent
    further = {"run": ("--prompt", "a cat"), "serve": ("--loras", LORAS)}[command]
    found = flat(call(command, model, *further, "--device", "cpu", code=2).output)
    assert f"error: the model '{model}' cannot be opened: " in found
