"""The log of a server: why an image failed, and never more than its bounds."""

import logging
import time
from typing import Any

import pytest

from components import tiny_pipeline
from lora_compose.compose.serve.engine import Engine
from lora_compose.compose.serve.log import BoundedLog, bounded_log
from lora_compose.compose.serve.requests import ImageRequest


class Broken(Engine):
    """An engine that makes no image."""

    def make(self, requests: Any) -> Any:
        raise RuntimeError("the reason of it")


def test_the_log_says_why_an_image_failed(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Broken(tiny_pipeline(), wait=0.0)
    with bounded_log():
        engine.start()
        future = engine.submit(ImageRequest(prompt="a").resolved(64, 64, 25, 5.0))
        with pytest.raises(RuntimeError, match="the reason of it"):
            future.result(60)
        assert engine.stop(30)
    printed = capsys.readouterr().err
    assert "error: an image failed" in printed
    assert "Traceback" in printed
    assert "test_log.py" in printed
    assert "RuntimeError: the reason of it" in printed


def test_the_log_is_bounded_however_much_goes_wrong(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = logging.getLogger("uvicorn.error")
    caplog.set_level(logging.WARNING, bad.name)  # the server's; other tests may have set another
    monkeypatch.setattr(bad, "propagate", False)  # as where Streamlit was imported
    begun = time.monotonic()
    with bounded_log(BoundedLog(burst=400, rate=200.0)):
        for _ in range(1000):
            bad.warning("Invalid HTTP request received.")
        time.sleep(1.0)
        logging.getLogger("lora_compose.other").error("something else\x1b[31m")
    printed = capsys.readouterr().err
    lines = printed.splitlines()
    assert len(printed) < 500 + 210 * (time.monotonic() - begun)
    assert lines[0] == "warning: Invalid HTTP request received."
    assert lines[-2].endswith("records were left out; there were too many")
    assert lines[-1] == r"error: something else\x1b[31m"
    left_out = sum(int(line.split()[1]) for line in lines if "left out" in line)
    assert left_out + sum("Invalid" in line for line in lines) == 1000


def test_a_long_traceback_is_cut_in_its_middle(capsys: pytest.CaptureFixture[str]) -> None:
    with bounded_log():
        logging.getLogger("asyncio").error("begins" + "x" * 100_000 + "ends")
    printed = capsys.readouterr().err
    assert len(printed) < 9_000
    assert printed.startswith("error: begins")
    assert printed.endswith("ends\n")


def test_loggers_are_as_before_afterwards() -> None:
    loggers = [logging.getLogger(name) for name in ("lora_compose", "uvicorn", "diffusers")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    with bounded_log():
        assert [logger.propagate for logger in loggers] == [False] * 3
    assert [(logger.handlers, logger.propagate) for logger in loggers] == before
