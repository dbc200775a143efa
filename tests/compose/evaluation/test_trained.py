"""LoRAs that a published suite trains: when, on what, and what it says of their cost."""

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lora_compose.compose.evaluation.results import CLAIMS
from lora_compose.compose.evaluation.suite import Suite, read_suite
from lora_compose.compose.evaluation.trained import TRIED, Trained, tried_loras, with_loras
from lora_compose.compose.files.claims import Claims
from lora_compose.compose.playground.assets import playground_references
from lora_compose.compose.training import Training
from lora_compose.compose.training.loop import train as train_really
from trainings import SIDE, sd_pipeline

TINY = {"resolution": SIDE, "rank": 2}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Cat and bear of the playground on a tiny model; the cat's LoRA is trained."""
    sd_pipeline().save_pretrained(tmp_path / "model")
    quick = read_suite("playground-quick")
    concepts = [
        quick.concept("cat").model_copy(update={"lora": "cat lora"}),
        quick.concept("bear").model_copy(update={"lora": "/there/bear.safetensors"}),
    ]
    return quick.model_copy(update={"model": str(tmp_path / "model"), "concepts": tuple(concepts), "device": "cpu"})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in playground_references("cat")[:2]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def trained(images: Path, **changes: Any) -> dict[str, Trained]:
    return {"cat lora": Trained.model_validate({"images": str(images), "steps": 5, "settings": TINY} | changes)}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings are over at once."""
    monkeypatch.setattr(
        "lora_compose.compose.evaluation.trained.train", lambda settings, **_: settings.out.write_bytes(b"a LoRA")
    )


def test_a_lora_is_trained_once_with_the_words_of_its_concept(suite: Suite, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ready = with_loras(suite, trained(images), out)
    path = Path(str(ready.concept("cat").lora))
    assert path.is_file()
    assert path.parent == out / "loras"
    assert ready.concept("bear").lora == "/there/bear.safetensors"
    with safe_open(path, framework="pt") as file:
        told = str(file.metadata())
    assert suite.concept("cat").trigger in told
    assert suite.concept("cat").class_word in told
    before = path.stat().st_mtime_ns
    assert with_loras(suite, trained(images), out) == ready
    assert path.stat().st_mtime_ns == before, "it was trained again"


@pytest.mark.usefixtures("written")
def test_other_steps_settings_or_images_are_another_lora(suite: Suite, images: Path, tmp_path: Path) -> None:
    others = (trained(images), trained(images, steps=4), trained(images, settings=TINY | {"rank": 3}))
    files = {str(with_loras(suite, other, tmp_path / "out").concept("cat").lora) for other in others}
    (images / "more.png").write_bytes(playground_references("cat")[2].read_bytes())
    files.add(str(with_loras(suite, others[0], tmp_path / "out").concept("cat").lora))
    assert len(files) == len(list((tmp_path / "out/loras").iterdir())) == 4


def test_the_cost_is_said_before_a_training(
    suite: Suite, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tried = tried_loras(suite, trained(images, steps=3600), out)
    path = Path(str(tried.concept("cat").lora))
    assert path.parent == out / "smoke" / "loras"
    assert path.is_file()
    assert not (out / "loras").exists()
    told = " ".join(capsys.readouterr().out.split())
    assert "s for each of 3600 steps of its training" in told
    pace = float(told.partition("cat lora: ")[2].partition(" s for")[0])
    hours = float(told.partition("3600 steps in all: about ")[2].partition(" h at this pace")[0])
    assert hours == pytest.approx(pace, rel=0.1)  # 3600 steps of so many seconds
    done = with_loras(suite, trained(images), out)
    assert tried_loras(suite, trained(images), out) == done, "what is trained is not tried again"
    assert "steps in all" not in capsys.readouterr().out


def test_a_stopped_training_goes_on(
    suite: Suite, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []

    def train(settings: Training, *, on_step: Any, **options: Any) -> Path:
        def on(step: int, loss: float) -> None:
            on_step(step, loss)
            steps.append(step)
            if len(steps) == 2:
                os.kill(os.getpid(), 2)

        return train_really(settings, on_step=on, **options)

    monkeypatch.setattr("lora_compose.compose.evaluation.trained.train", train)
    with pytest.raises(KeyboardInterrupt):
        with_loras(suite, trained(images), tmp_path / "out")
    assert "stopped after step 2 of 5; run the same command to resume" in " ".join(capsys.readouterr().err.split())
    path = Path(str(with_loras(suite, trained(images), tmp_path / "out").concept("cat").lora))
    assert steps == [1, 2, 3, 4, 5]
    assert path.is_file()


@pytest.mark.usefixtures("written")
def test_a_lora_that_another_process_trains_is_waited_for(
    suite: Suite, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ready = with_loras(suite, trained(images), out)
    path = Path(str(ready.concept("cat").lora))
    data = path.read_bytes()
    path.unlink()
    waited: list[float] = []
    with Claims(out / CLAIMS).claim(path.name) as claim:
        assert claim is not None

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            path.write_bytes(data)  # the other one has finished

        monkeypatch.setattr("lora_compose.compose.evaluation.trained.sleep", sleep)  # of this module alone
        assert with_loras(suite, trained(images), out) == ready
    assert len(waited) == 1


def test_settings_that_no_training_has_are_refused(suite: Suite, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown setting 'stepps' of a training; there are prompt, "):
        trained(images, settings={"stepps": 3})
    with pytest.raises(ValueError, match="unknown setting 'trigger' of a training"):
        trained(images, settings={"trigger": "sks"})
    with pytest.raises(ValueError, match=f"greater than or equal to {TRIED}"):
        trained(images, steps=2)
    with pytest.raises(ValueError, match=r"training 'cat lora': .*rank"):
        with_loras(suite, trained(images, settings={"rank": 0}), tmp_path / "out")
    with pytest.raises(ValueError, match="there is no folder '/nowhere' with images"):
        with_loras(suite, trained(Path("/nowhere")), tmp_path / "out")
