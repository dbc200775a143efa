"""Every family of transformers, from a folder as a person has it, by command line, page and server."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from all_transformers import EVERY
from commands import call, flat
from lora_compose import Run, Scene
from lora_compose.compose.check.report import check
from lora_compose.compose.files.images import record_in
from lora_compose.compose.generate.making import size_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.page.form import Form
from lora_compose.compose.page.open_models import ModelChoice, OpenModels
from lora_compose.compose.page.store import in_folder, named
from lora_compose.compose.page.work import Job
from lora_compose.compose.serve.app import make_app
from lora_compose.compose.serve.engine import Engine
from pairs import slow_but
from served import answer, server
from transformer_families import PROMPT, saved_with_loras

SIDE = 64
WITHOUT_UNCONDITIONAL_ROWS = ("flux", "kontext", "flux2-dev", "flux3-distilled")
"""Families whose guidance is distilled into the model."""
READ_REFERENCES_ONLY = ("qwen-image-edit", "qwen-image-edit-2511")
USUAL = ("flux", "anima", "qwen-image-edit")
"""One family of each kind: sequences, guidance, references, modular pipelines."""


@pytest.fixture(scope="module", params=slow_but(USUAL, EVERY))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with_loras(EVERY[name], tmp_path_factory.mktemp(name))


@pytest.fixture
def references(name: str, tmp_path: Path) -> tuple[str, ...]:
    """The images that a call reads at least."""
    if name not in READ_REFERENCES_ONLY:
        return ()
    Image.new("RGB", (SIDE, SIDE), "navy").save(tmp_path / "room.png")
    return (str(tmp_path / "room.png"),)


def test_check_names_method_and_price(name, folder, references):
    loras = [word for path in sorted((folder / "loras").iterdir()) for word in ("--lora", path)]
    sides, reads = ("--width", SIDE, "--height", SIDE), [word for path in references for word in ("--reference", path)]
    asked = (*loras, *sides, *reads, "--steps", 2, "--guidance", 2, "--device", "cpu")
    found = flat(call("check", folder / "model", "--prompt", PROMPT, *asked).stdout)
    assert "method draft, because the prompt names every concept by trigger and class word" in found
    rows, guidance = (2, ", no rows for guidance") if name in WITHOUT_UNCONDITIONAL_ROWS else (4, " with guidance")
    assert f"cost {rows} + 1 stopped rows, each a latent through the model once (2 steps{guidance})" in found
    assert found.endswith("no problems")


def test_the_page_makes_an_image_with_two_concepts(folder, references):
    model = OpenModels().open(ModelChoice(str(folder / "model"), device="cpu"))
    concepts = [named(str(path)).concept(path.stem) for path in in_folder(folder / "loras")]
    assert [model.read(concept).unmatched for concept in concepts] == [(), ()]
    form = Form(model.choice, PROMPT, (SIDE, SIDE), concepts=tuple(concepts), steps=1, references=references)
    with model.turn(form.concepts, wait=False) as pipe:
        report = check(form.runs()[0], pipe, known_costs=model.costs)
    assert report.problems == ()
    job = Job(model, form.runs(), record_attention=True).start()
    job.join(60)
    assert (job.state, job.error) == ("done", "")
    (result,) = job.results
    assert result.made.image.size == (SIDE, SIDE)
    assert result.run.method == "draft"
    assert result.attention is not None


def test_the_server_answers_a_request_or_refuses_a_model_that_needs_more_than_text(name, folder):
    if name in READ_REFERENCES_ONLY:
        found = flat(call("serve", folder / "model", "--loras", folder / "loras", "--device", "cpu", code=2).output)
        assert "Qwen-Image-Edit-Plus needs a reference image, and a request to the server carries none" in found
        return
    run = Run(scene=Scene(prompt="-"), model=str(folder / "model"), device="cpu")
    pipe = open_model(run)
    pipe.add_concepts(folder / "loras")
    engine = Engine(pipe, run=run)
    asked = {"prompt": PROMPT, "concepts": ["cat", "dog"], "width": SIDE, "height": SIDE}
    with server(make_app(engine, size_of(pipe, run.scene), steps=1, guidance_scale=5.0), engine) as port:
        status, body, headers = answer(port, "/images", asked)
    assert status == 200, body
    assert headers["x-method"] == "draft"
    assert Image.open(BytesIO(body)).size == (SIDE, SIDE)
    concepts = record_in(BytesIO(body), "answer").run.scene.concepts
    assert [concept.lora for concept in concepts] == ["cat.safetensors", "dog.safetensors"]
