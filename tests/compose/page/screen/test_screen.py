"""The screen's logic by `streamlit.testing`: what is shown for what is set."""

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from streamlit.components.v2 import manifest_scanner
from streamlit.testing.v1 import AppTest

from all_transformers import EVERY
from flux import flux_pipeline
from flux2 import flux2_transformer, saved_klein
from ip_adapters import playground_guides
from layouts import layout, shapes_of
from lora_compose.compose.evaluation.suite import read_suite
from lora_compose.compose.figures.overlay import colour, division
from lora_compose.compose.files.images import Machine, Record, read_record, save_image
from lora_compose.compose.generate.making import Made
from lora_compose.compose.lora.file_inspection import RECORD
from lora_compose.compose.page.controls import sentence
from lora_compose.compose.page.form import example
from lora_compose.compose.page.labels import SHOWN_METHODS, full_name, methods
from lora_compose.compose.page.launch import SCREEN
from lora_compose.compose.page.open_models import ModelChoice, OpenModel
from lora_compose.compose.page.scores import SUITES
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import FILE_PATIENCE, JUDGE, MODELS, PageSession, Row, reading
from lora_compose.compose.page.screen.understand import decided_by
from lora_compose.compose.page.screen.uploads import remove
from lora_compose.compose.page.work import Result
from lora_compose.compose.playground.assets import PLAYGROUND, playground_lora, playground_loras, playground_model
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.concepts import finding
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.families import ComposeFluxKontextPipeline
from lora_compose.pipelines.methods import METHODS
from lora_compose.pipelines.scene.mask_images import as_uri
from lora_compose.pipelines.scene.scene import Concept, Run
from small_world import SIZE, STYLE, STYLE_WORDS
from transformer_families import PROMPT, as_file, random_lora_of_all, saved_with_loras

STEPS = 1
PATIENCE = 600
"""Seconds after which a run of the script, or a job, is taken to hang; other programs may use the processor as well."""


@pytest.fixture(autouse=True)
def _started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_COMPOSE_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("LORA_COMPOSE_LOCAL", "yes")
    monkeypatch.delenv("LORA_COMPOSE_LORAS", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _components_are_looked_for_once() -> Iterator[None]:
    """Streamlit reads the metadata of every installed package for every `AppTest`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(manifest_scanner, "scan_component_manifests", cache(manifest_scanner.scan_component_manifests))
        yield


@pytest.fixture(autouse=True, scope="module")
def _two_characters_are_judged() -> Iterator[None]:
    """The judge embeds the references of the example's characters alone."""
    suite = read_suite(SUITES[PLAYGROUND])
    few = suite.model_copy(update={"concepts": tuple(suite.concept(name) for name in ("bear", "robot"))})
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(JUDGE._suites, PLAYGROUND, few)
        yield


@pytest.fixture
def at(costs_do_not_matter: None) -> AppTest:
    return opened()


def opened() -> AppTest:
    at = AppTest.from_file(str(SCREEN), default_timeout=PATIENCE).run()
    assert not at.exception
    at.number_input(key=fields.STEPS).set_value(STEPS)  # from the next run on
    return at


def small(at: AppTest) -> AppTest:
    """A canvas of a ninth of the model's own, from the next run on, for tests that look at no pixel."""
    for side in (fields.WIDTH, fields.HEIGHT):
        at.number_input(key=side).set_value(64)
    return at


def session(at: AppTest) -> PageSession:
    return at.session_state["session"]


def made(at: AppTest) -> AppTest:
    at.button(key="do.make").click().run()
    return after(at)


def after(at: AppTest) -> AppTest:
    """The screen once the work in hand is done."""
    job = session(at).job
    assert job is not None
    job.join(PATIENCE)
    at.run()
    assert not at.exception
    return at


def choose(at: AppTest, method: str) -> AppTest:
    """Chooses a method as a person does: of the three that are shown, or of those under "Advanced"."""
    shown = at.segmented_control(key=fields.METHOD)
    if method not in (fields.AUTOMATIC, *SHOWN_METHODS):
        return at.radio(key="do.method.advanced").set_value(method).run()
    return shown.set_value(method).run()


def said(at: AppTest) -> str:
    """All messages, without the marks that keep Markdown from being read as such."""
    kinds = (at.error, at.warning, at.info, at.caption)
    return "\n".join(message.value.replace("\\", "") for kind in kinds for message in kind)


def row_key(at: AppTest, index: int, field: str) -> str:
    return fields.of_row(session(at).rows[index], field)


def test_a_new_session_has_everything_filled_in_and_its_image_is_priced_made_shown_kept_and_explained(
    tmp_path: Path,
) -> None:
    MODELS.open(example().choice).seconds_per_flop = None  # of other tests, whose costs are none
    at = opened()
    assert at.text_area(key=fields.PROMPT).value == example().prompt
    assert not at.button(key="do.make").disabled
    assert re.search(r"Takes 1\.\d times a plain image; how many seconds is known after the first one", said(at))
    (cost,) = (caption for caption in at.caption if re.match(r"Takes \d", caption.value))
    assert "50 latent rows in 25 steps" in cost.help
    made(at)
    assert re.search(r"Takes about \d+(\.\d)? s, 1\.\d times a plain image", said(at))
    (result,) = session(at).results
    assert session(at).shown == result.key
    assert "By subjects · seed 4 · 1 step" in said(at)
    at.button(key=f"do.keep.{result.key}").click().run()
    kept = tmp_path / "out" / "page" / "4.png"
    assert read_record(kept) == result.made.record
    at.session_state["set.view"] = "Gallery"
    at.run()
    assert "4.png: By subjects, seed 4" in said(at)
    at.session_state["set.view"] = "Understand"
    at.run()
    assert "Your boxes decided where each LoRA acts" in said(at).replace("*", "")
    assert "Where the model looked for bear" in said(at)
    assert "The areas follow from it" not in said(at)


@pytest.mark.parametrize(
    ("method", "boxed", "decides"),
    [
        ("draft", True, "boxes"),
        ("draft", False, "found areas"),
        ("clora", True, "found areas"),
        ("regional", True, "boxes"),
        ("merge", True, "nothing"),
        ("tara", True, "words"),
    ],
)
def test_what_decided_where_a_lora_acts_is_known(method: str, boxed: bool, decides: str) -> None:
    (run,) = replace(example(), method=method, boxed=boxed).runs()
    assert decided_by(Result(Made(Image.new("RGB", (8, 8)), record_of(run)), None, None, seconds=1.0)) == decides


def test_several_seeds_give_several_images_of_which_two_are_chosen_for_wiping(at: AppTest) -> None:
    small(at).session_state[fields.METHOD] = "merge"
    at.text_input(key=fields.SEEDS).set_value("1-2").run()
    assert at.button(key="do.make").label == "Generate 2 images"
    made(at)
    assert [result.run.seed for result in session(at).results] == [2, 1]
    at.session_state["set.view"] = "Gallery"
    at.run()
    assert [at.selectbox(key=f"do.wipe.{side}").value for side in ("left", "right")] == [
        result.key for result in session(at).results[1::-1]
    ]
    at.selectbox(key="do.wipe.left").set_value(session(at).results[0].key).run()
    assert not at.exception


def test_words_that_are_missing_are_flagged_and_inserted(at: AppTest) -> None:
    at.text_area(key=fields.PROMPT).set_value("a xlo bear on grass").run()
    assert "robot is missing in the prompt" in said(at)
    assert at.button(key="do.make").disabled
    at.button(key="do.insert.1").click().run()
    assert at.text_area(key=fields.PROMPT).value == "a xlo bear and a qrt robot on grass"
    assert not at.button(key="do.make").disabled


def test_the_needs_of_a_method_are_shown_before(at: AppTest) -> None:
    choose(at, "regional")
    at.session_state[fields.BOXED] = fields.ANYWHERE
    at.run()
    assert "“In boxes” needs boxes: choose “Boxes” above the image, or another method" in said(at)
    assert at.button(key="do.make").disabled
    at.segmented_control(key=fields.BOXED).set_value(fields.BOXES).run()
    at.segmented_control(key=fields.BOXED).set_value(fields.ANYWHERE).run()
    assert at.session_state[fields.METHOD] == fields.AUTOMATIC
    assert "Takes “By subjects” (draft), because the prompt names every concept by trigger and class word" in said(at)
    assert not at.button(key="do.make").disabled
    choose(at, "regional")
    assert fields.BOXED in at.session_state
    assert at.session_state[fields.BOXED] == fields.BOXES, "what needs boxes switches them on"
    assert not at.button(key="do.make").disabled
    choose(at, fields.AUTOMATIC)
    assert "Takes “By subjects” (draft), because every concept has a region" in said(at)


def upload(at: AppTest, name: str, content: bytes) -> None:
    uploader = at.file_uploader(key=f"do.upload.{session(at).uploads}")
    uploader.set_value([(name, content, "")]).run()
    assert not at.exception


def test_a_lora_for_another_model_is_reported_by_its_own_name_with_advice(at: AppTest, tmp_path: Path) -> None:
    known = layout("kohya-sdxl")
    path = tmp_path / "dragon.safetensors"
    save_file({key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes_of(known).items()
               if "up_blocks" in key or "output_blocks_3" in key or "input_blocks_4" in key}, path)  # fmt: skip
    upload(at, "dragon.safetensors", path.read_bytes())
    assert (
        "dragon.safetensors was made for SDXL, but the model playground is open. Open such a model with “Model” at the "
        "top, or remove this concept." in said(at)
    )
    assert "".join(error.value for error in at.error).replace("\\", "").count("dragon.safetensors") == 1
    assert Path(session(at).store.uploads[0].source).name not in said(at)
    assert at.button(key="do.make").disabled


def test_three_methods_are_shown_and_the_others_are_under_advanced_with_a_sentence_each(at: AppTest) -> None:
    assert at.segmented_control(key=fields.METHOD).options == ["Automatic", "In boxes", "Added up"]
    advanced = at.radio(key="do.method.advanced")
    assert set(advanced.options) == {full_name(method) for method in METHODS if method not in SHOWN_METHODS}
    assert list(advanced.proto.captions) == [
        sentence(name) for name in methods() if full_name(name) in advanced.options
    ]
    for method in ("composite", "clora", "regional"):  # with controls of every kind
        choose(at, method)
        assert not at.exception
        assert not at.error
        assert at.session_state[fields.METHOD] == method
    assert at.radio(key="do.method.advanced").value is None


def test_the_prompt_comes_first_then_concepts_then_method_and_button_and_the_result_beside_them(at: AppTest) -> None:
    order = [element.key for element in at.main if getattr(element, "key", None)]  # depth first
    wanted = [fields.PROMPT, row_key(at, 0, "name"), fields.METHOD, fields.SEEDS, "do.make", "set.view"]
    assert [order.index(key) for key in wanted] == sorted(order.index(key) for key in wanted)
    assert not any(field.key == "do.merge.loras" for field in at.multiselect), "merging has a view of its own"


def test_settings_are_used_kept_when_another_method_is_looked_at_and_wrong_ones_said(at: AppTest) -> None:
    choose(at, "switch")
    key = fields.of_setting("switch", "interval")
    at.number_input(key=key).set_value(0).run()
    assert said(at).count("“Steps of a turn” must be a whole number of steps") == 1
    assert at.button(key="do.make").disabled
    at.number_input(key=key).set_value(1).run()
    choose(at, "merge")
    choose(at, "switch")
    assert at.number_input(key=key).value == 1
    assert fields_of(at).settings == {"interval": 1}


def fields_of(at: AppTest) -> Run:
    """The run that the button starts with what is set; it is stopped before an image is made."""
    with session(at).model.turn(()):
        at.button(key="do.make").click().run()
        job = session(at).job
        assert job is not None
        job.stop()
    after(at)
    assert job.state == "stopped"
    (run,) = job.runs
    return run


def test_errors_keep_all_input(at: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    at.text_input(key=row_key(at, 0, "name")).set_value("Bruno")
    monkeypatch.setattr("lora_compose.compose.page.work.make_batch", fails)
    made(at)
    assert "Out of memory" in said(at)
    assert at.text_input(key=row_key(at, 0, "name")).value == "Bruno"
    assert not at.button(key="do.make").disabled


def test_concepts_are_chosen_from_a_folder_and_problems_are_shown_at_the_file(at: AppTest, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(playground_lora("cat"), folder / "mine.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\x80\x04K\x01.")
    at.text_input(key="set.folder").set_value(str(folder)).run()
    (folder / "styles").mkdir()
    shutil.copy(playground_lora(STYLE), folder / "styles" / "fog.safetensors")
    at.run()
    assert "broken.safetensors is not a readable safetensors file" in said(at)
    assert "mine.safetensors**  \nsks cat" in said(at)
    at.text_input(key="do.pick.search").set_value("sks mine").run()
    assert not any(button.key == "do.add.playground:cat" for button in at.button), "only what has all words"
    at.button(key=f"do.add.{folder / 'mine.safetensors'}").click().run()
    at.text_input(key="do.pick.search").set_value("")
    at.selectbox(key="do.pick.inside").set_value("styles").run()
    assert f"fog.safetensors**  \n{STYLE_WORDS}" in said(at)
    assert [row.lora.shown for row in session(at).rows if row.lora] == ["bear", "robot", "mine.safetensors"]
    assert at.text_input(key=row_key(at, 2, "trigger")).value == "sks"
    assert at.text_input(key=row_key(at, 2, "name")).value == "mine", "as on the command line"
    at.button(key=f"do.remove.{session(at).rows[2].number}").click().run()
    assert len(session(at).rows) == 2


def test_more_concepts_than_can_be_are_left_out_and_a_bystander_is_one_which_waits_for_no_lora(at: AppTest) -> None:
    assert f"12 of {len(playground_loras())} are shown: search for others" in said(at)
    assert at.button(key="do.add.shown").label == "Add these 12"
    at.button(key="do.bystander").click().run()
    upload(at, "cat.safetensors", playground_lora("cat").read_bytes())
    assert [row.bystander for row in session(at).rows] == [False, False, True, False]
    at.button(key="do.add.shown").click().run()
    assert len(session(at).rows) == 12
    assert "12 concepts are the maximum" in said(at)
    assert at.button(key="do.bystander").disabled


def test_names_twice_are_reported(at: AppTest) -> None:
    at.text_input(key=row_key(at, 1, "name")).set_value("bear").run()
    assert "'bear' stands twice" in said(at)
    at.text_input(key=row_key(at, 1, "name")).set_value(" ").run()
    assert "A concept has no name" in said(at)


def test_a_canvas_that_is_too_large_is_refused(at: AppTest) -> None:
    at.number_input(key=fields.WIDTH).set_value(2048).run()
    assert f"far too many for a model made for {SIZE} x {SIZE}" in said(at)
    assert at.button(key="do.make").disabled


def test_templates_fill_the_boxes(at: AppTest) -> None:
    at.button(key="do.template.Big and small").click().run()
    big, small = (fields_box(at, i) for i in range(2))
    assert big[2] - big[0] > small[2] - small[0]


def fields_box(at: AppTest, index: int) -> list[int]:
    return [int(at.number_input(key=row_key(at, index, edge)).value or 0) for edge in fields.EDGES]


def test_a_second_press_of_remove_removes_nothing() -> None:
    """A page that lags still shows the button."""
    rows = [Row(number, None) for number in (1, 2)]
    for row in (rows[0], rows[0]):
        remove(rows, row)
    assert [row.number for row in rows] == [2]


def test_a_plain_image_without_concepts(at: AppTest) -> None:
    session(small(at)).rows.clear()
    at.text_area(key=fields.PROMPT).set_value("a cat on grass").run()
    made(at)
    assert session(at).results[0].run.method is None


def test_a_weight_that_cannot_be_read_is_explained(at: AppTest) -> None:
    at.text_input(key=row_key(at, 0, "schedule")).set_value("1...4..").run()
    assert not at.exception
    assert "bear: Weight: expected a valid number" in said(at)
    assert at.button(key="do.make").disabled
    at.text_input(key=row_key(at, 0, "schedule")).set_value("12").run()
    assert "The weight reaches 12" in said(at)
    assert "“Any weight” under “More” allows it" in said(at)
    at.checkbox(key=row_key(at, 0, "any_weight")).check().run()
    assert not at.button(key="do.make").disabled
    at.text_input(key=row_key(at, 0, "schedule")).set_value("1..0.4").run()
    assert not at.button(key="do.make").disabled


def test_the_slider_sets_the_weight_and_other_weights_are_text(at: AppTest, tmp_path: Path) -> None:
    at.slider(key=row_key(at, 0, "weight")).set_value(0.65).run()
    assert fields_of(at).scene.concepts[0].weight == 0.65
    shown = {1.35: (1.35, ""), -0.5: (1.0, "-0.5"), 0.123: (1.0, "0.123"), 3.0: (1.0, "3")}
    for weights in ((1.35, -0.5), (0.123, 3.0)):
        pairs = zip(example().concepts, weights, strict=True)
        concepts = tuple(concept.model_copy(update={"weight": weight}) for concept, weight in pairs)
        drop(at, tmp_path, {"concepts": concepts})
        assert not at.warning
        for row, weight in enumerate(weights):
            slider, text = shown[weight]
            assert at.slider(key=row_key(at, row, "weight")).value == slider
            assert at.slider(key=row_key(at, row, "weight")).disabled == bool(text)
            assert at.text_input(key=row_key(at, row, "schedule")).value == text


def test_the_shape_of_the_image_is_chosen_at_the_top(at: AppTest) -> None:
    at.button(key="do.shape.Landscape").click().run()
    width, height = fields_size(at)
    assert width == SIZE > height
    assert abs(height / width - 2 / 3) < 0.05
    assert height % 8 == 0


def test_a_dropped_image_lists_missing_loras_and_an_upload_fills_the_gap(at: AppTest, tmp_path: Path) -> None:
    cat = Concept(name="cat", lora="/elsewhere/cat.safetensors", trigger="sks", class_word="cat", weight=0.7)
    drop(at, tmp_path, {"concepts": (cat,), "prompt": "a sks cat <b>"})
    assert "LoRAs are missing: cat" in said(at)
    assert at.button(key="do.make").disabled
    uploader = at.file_uploader(key=f"do.upload.{session(at).uploads}")
    uploader.set_value([("cat.safetensors", playground_lora("cat").read_bytes(), "")]).run()
    assert [row.lora and row.lora.shown for row in session(at).rows] == ["cat.safetensors"]
    assert at.slider(key=row_key(at, 0, "weight")).value == 0.7
    assert not at.button(key="do.make").disabled


def test_an_untrusted_image_opens_no_model_and_no_connection_until_the_user_asks_for_it(
    at: AppTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def network(*args: Any, **kwargs: Any) -> Any:
        asked.append(str(args))
        raise ConnectionError("nothing may be asked here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, network)
    monkeypatch.setattr(socket, "getaddrinfo", network)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(finding, "reachable", lambda source, *names, **hub: hub)
    monkeypatch.setattr("lora_compose.pipelines.concepts.finding.list_repo_files", network)
    monkeypatch.setattr("lora_compose.pipelines.concepts.finding.hf_hub_download", network)
    cat = Concept(name="cat", lora="stranger/cat-lora", trigger="sks", class_word="cat")
    drop(at, tmp_path, {"concepts": (cat,), "prompt": "a sks cat"}, model="stranger/model", sha256={"cat": "0" * 64})
    assert session(at).model.choice.model == "playground"
    assert at.text_input(key="set.model.name").value == "stranger/model"
    assert "open it there if you trust it" in said(at)
    at.session_state["set.view"] = "Compare"
    at.run()
    assert asked == []
    assert "in repositories on the hub: cat (stranger/cat-lora). Nothing is downloaded until you press" in said(at)
    assert at.button(key="do.make").disabled

    at.button(key=f"do.hub.{session(at).rows[0].number}").click().run()
    assert len(asked) == 1
    assert "nothing may be asked here" in said(at)
    monkeypatch.setattr(finding, "list_repo_files", lambda *args, **kwargs: ["cat.safetensors"])
    monkeypatch.setattr(
        "lora_compose.pipelines.concepts.finding.hf_hub_download", lambda *args, **kwargs: str(playground_lora("cat"))
    )
    at.button(key=f"do.hub.{session(at).rows[0].number}").click().run()
    (row,) = session(at).rows
    assert row.lora is not None
    assert row.lora.source == "stranger/cat-lora"
    assert "is not the file that the image was made with" in said(at)
    assert not at.button(key="do.make").disabled


def test_the_open_model_is_not_opened_again_in_another_precision_by_an_image(
    at: AppTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The open one may be a repository, for which the hub would be asked."""
    open_session = session(at)
    open_session.model = OpenModel(ModelChoice("stranger/model"), open_session.model._pipe, open_session.model.defaults)
    at.run()
    monkeypatch.setattr("lora_compose.compose.page.open_models.open_model", lambda *args: pytest.fail("it is opened"))
    drop(at, tmp_path, {}, model="stranger/model", dtype="bfloat16")
    assert "It was made with the model stranger/model in bfloat16, which is not open" in said(at)
    drop(at, tmp_path, {}, model="stranger/model")
    assert "It was made with the model" not in said(at)


def test_what_the_page_does_not_know_is_refused_and_nothing_changes(at: AppTest, tmp_path: Path) -> None:
    at.run()
    before = {str(key): at.session_state[key] for key in at.session_state if str(key).startswith("set.")}
    drop(at, tmp_path, {"prompt": "a xlo bear"}, scheduler="TomorrowScheduler")
    assert "unknown scheduler 'TomorrowScheduler'" in said(at)
    assert {key: at.session_state[key] for key in before} == before


def test_changed_fields_are_reported(at: AppTest, tmp_path: Path) -> None:
    bear, robot = example().concepts
    thin = bear.model_copy(update={"region": (0, 0, 3, 64), "alpha": 3.0})
    drop(at, tmp_path, {"concepts": (thin, robot.model_copy(update={"trigger": "qrt "}))})
    assert "region of bear was (0, 0, 3, 64) and is (0, 0, 8, 64) here" in said(at)
    assert "trigger of robot was “qrt ” and is “qrt” here" in said(at)
    assert "the file has its own alpha; leave alpha out" in said(at), "it is used"
    drop(at, tmp_path, {"concepts": (bear.model_copy(update={"region": None}), robot)})
    assert f"region of bear was not given and is (0, 0, {SIZE}, {SIZE}) here" in said(at)


def test_an_ordinary_image_comes_back_without_a_word(at: AppTest, tmp_path: Path) -> None:
    settings = {"ce_weight": 3, "rows": "all"}  # a whole number where others may stand
    bear, robot = example().concepts
    bear = bear.model_copy(update={"weight": "1..0.4", "blocks": {"up.1": 0.5}, "prompt": "a xlo bear"})
    run = {"method": "lora-composer", "settings": settings, "scheduler": "DDIMScheduler", "guidance_scale": 1 / 3,
           "seed": 2**63 - 1, "steps": STEPS}  # fmt: skip
    drop(at, tmp_path, {"concepts": (bear, robot), "negative_prompt": "snow"}, **run)
    assert not at.warning
    remade = fields_of(at)
    assert remade.scene.concepts[0] == bear.model_copy(update={"class_word": "bear"})
    assert {name: getattr(remade, name) for name in run} == run


def test_others_are_not_kept_waiting_by_a_file_that_takes_long(at: AppTest) -> None:
    with reading(0):  # it is being read for somebody else
        started = time.monotonic()
        at.text_area(key=fields.PROMPT).set_value("a xlo bear and a qrt robot in snow").run()
        assert time.monotonic() - started < FILE_PATIENCE
        assert not at.exception
        assert "busy with another session" not in said(at), "a check waits for no file"
        assert not at.button(key="do.make").disabled


def test_a_lora_that_does_not_fit_is_looked_at_once(at: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def fails(self: Any, concept: Any) -> Any:
        looked.append(concept.lora)
        raise RuntimeError("whatever a file sets off")

    monkeypatch.setattr("lora_compose.compose.page.open_models.OpenModel.read", fails)
    at.run()
    looked.clear()
    session(at).rows[0].fit = None
    at.run()
    at.run()
    assert len(looked) == 1
    assert "cannot be used (RuntimeError)" in said(at)
    assert "This LoRA does not fit the open model" in said(at)
    assert at.button(key="do.make").disabled


def test_an_upload_stays_nowhere_if_it_is_refused(at: AppTest) -> None:
    for content in (b"no LoRA", b""):
        uploader = at.file_uploader(key=f"do.upload.{session(at).uploads}")
        uploader.set_value([("cat.safetensors", content, "")]).run()
        assert "cat.safetensors" in said(at)
        assert list(session(at).store.folder.iterdir()) == []
        assert session(at).store.uploads == []


def test_a_browser_that_was_away_for_too_long_begins_a_new_session(at: AppTest) -> None:
    before = session(at)
    folder = before.store.folder
    assert before.close(), "nothing is left of it"
    assert not folder.exists()
    at.run()
    assert not at.exception
    assert session(at) is not before
    assert session(at).store.folder.is_dir()
    assert "Your session ended" in at.toast[0].value
    before.begin(list(example().runs()), [None], comparing=False, record_attention=False)  # a click that came too late
    until(before.close)
    assert before.job is None


def drop(
    at: AppTest, folder: Path, change: dict[str, Any], sha256: dict[str, str] | None = None, **changes: Any
) -> None:
    """Drops a result of the example in which a scene is changed."""
    (run,) = replace(example(), method="merge", boxed=False).runs()
    run = run.model_copy(update={"scene": run.scene.model_copy(update=change), **changes})
    path = save_image(Image.new("RGB", (8, 8)), folder / "dropped.png", record_of(run, sha256))
    key = f"do.restore.{session(at).uploads}"
    at.file_uploader(key=key).set_value(("dropped.png", path.read_bytes(), "image/png")).run()
    assert not at.exception


def test_masks_that_an_image_names_are_not_opened_for_others_even_where_it_cannot_be_reused(
    at: AppTest, tmp_path: Path
) -> None:
    session(at).options = replace(session(at).options, local=False)
    cat, dog = (concept.model_copy(update={"region": str(tmp_path / "mask.png")}) for concept in example().concepts)
    drop(at, tmp_path, {"concepts": (cat, dog.model_copy(update={"name": " "}))})
    assert [row.mask for row in session(at).rows] == [None, None]
    drop(at, tmp_path, {"concepts": (cat, dog)})
    assert "It has mask files, which cannot be opened from here; boxes replace them." in said(at)


def record_of(run: Run, sha256: dict[str, str] | None = None) -> Record:
    return Record(run=run, versions={}, sha256=sha256 or {}, machine=Machine(device="cpu", name="x", threads=1))


# --- subjects without a LoRA ---


def with_bystander(at: AppTest, class_word: str = "bear") -> AppTest:
    """The example with a bystander, which the prompt names."""
    at.button(key="do.bystander").click().run()
    at.text_input(key=row_key(at, 2, "class_word")).set_value(class_word).run()
    at.button(key="do.insert.2").click().run()
    assert not at.exception
    return at


def keys_of_card(at: AppTest, index: int) -> set[str]:
    """What can be set on a card, without its box."""
    prefix = fields.of_row(session(at).rows[index], "")
    kinds = (at.text_input, at.text_area, at.checkbox, at.slider, at.selectbox)
    return {
        str(field.key).removeprefix(prefix) for kind in kinds for field in kind if str(field.key).startswith(prefix)
    }


def test_a_card_of_a_subject_without_a_lora_asks_for_its_words_alone(at: AppTest) -> None:
    assert at.button(key="do.bystander").label == "Without a LoRA"
    at.button(key="do.bystander").click().run()
    assert not at.exception
    assert keys_of_card(at, 2) == {"name", "class_word", "prompt", "negative_prompt"}
    assert {"trigger", "weight", "schedule", "style"} < keys_of_card(at, 0)
    assert at.text_input(key=row_key(at, 2, "name")).value == "other"
    assert "A bystander: it has no LoRA, and those of others keep off." in said(at)
    assert "other has no class word. Type the noun that names it in the prompt." in said(at)
    assert at.button(key="do.make").disabled
    boxes = [fields_box(at, i) for i in range(3)]
    assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for a, b in combinations(boxes, 2))
    at.text_input(key=row_key(at, 2, "class_word")).set_value("bear").run()
    assert "other is missing in the prompt: write “bear” where it follows no trigger." in said(at)
    assert "needs a trigger word" not in said(at)
    at.button(key="do.insert.2").click().run()
    assert at.text_area(key=fields.PROMPT).value == "a xlo bear and a qrt robot and a bear on grass"
    assert not at.warning
    assert not at.button(key="do.make").disabled
    at.button(key="do.bystander").click().run()
    assert at.text_input(key=row_key(at, 3, "name")).value == "other 2"


def test_an_image_with_a_bystander_and_a_style_is_made_explained_exported_and_comes_back(at: AppTest) -> None:
    with_bystander(at)
    at.text_input(key=row_key(at, 0, "schedule")).set_value("1..0.5")
    at.text_input(key=row_key(at, 0, "blocks")).set_value("down:0.5,up.1:0")
    at.checkbox(key=row_key(at, 1, "style")).check()
    at.text_area(key=row_key(at, 2, "negative_prompt")).set_value("snow")
    at.segmented_control(key=fields.BOXED).set_value(fields.BOXES).run()
    edges = {field.key for field in at.number_input}
    assert [row_key(at, index, "left") in edges for index in range(3)] == [True, False, True], "a style has no box"
    box = fields_box(at, 2)
    made(at)
    (result,) = session(at).results
    bear, style, bystander = result.run.scene.concepts
    assert (bear.weight, bear.blocks) == ("1..0.5", {"down": 0.5, "up.1": 0.0})
    assert (style.role, style.region) == ("style", None)
    assert bystander == Concept(
        name="other",
        role="bystander",
        class_word="bear",
        region=(box[0], box[1], box[2], box[3]),
        negative_prompt="snow",
    )
    (python,) = (code.value for code in at.code if code.language == "python")
    assert python.count("pipe.load_concept(") == 2
    assert 'role="bystander"' in python
    at.session_state["set.view"] = "Understand"
    at.run()
    assert "Where the model looked for other, “bear”" in said(at)
    png = session(at).png(result)
    del session(at).rows[1:]
    at.file_uploader(key=f"do.restore.{session(at).uploads}").set_value([("2.png", png, "image/png")]).run()
    assert not at.exception
    assert not at.warning
    assert [row.bystander for row in session(at).rows] == [False, False, True]
    assert keys_of_card(at, 2) == {"name", "class_word", "prompt", "negative_prompt"}
    assert fields_of(at) == result.run.model_copy(update={"device": None})


@pytest.mark.slow
def test_variations_of_an_image_with_a_bystander_are_told_apart_by_the_weight_of_a_lora(
    at: AppTest, tmp_path: Path
) -> None:
    bear, _ = example().concepts
    bear = bear.model_copy(update={"region": None})
    other = Concept(name="passer-by", role="bystander", class_word="bear")
    small = {"concepts": (other, bear), "prompt": "a bear and a xlo bear", "width": 64, "height": 64}
    drop(at, tmp_path, small, steps=STEPS)
    assert not at.warning
    made(at)
    at.button(key=f"do.vary.{session(at).results[0].key}").click().run()
    after(at)
    assert at.segmented_control(key="do.together").options == ["Weight 0.7", "Weight 0.85", "Weight 1.15", "Weight 1.3"]


def test_a_method_without_places_says_that_it_does_not_keep_off_a_bystander(at: AppTest) -> None:
    with_bystander(at)
    words = "“Added up” knows no places: it does not keep LoRAs off other."
    choose(at, "merge")
    assert words in said(at)
    assert not at.button(key="do.make").disabled
    choose(at, "regional")
    assert "knows no places" not in said(at)
    at.segmented_control(key=fields.BOXED).set_value(fields.ANYWHERE)
    at.text_area(key=fields.PROMPT).set_value(example().prompt).run()
    assert "Takes “Added up” (merge), because the prompt does not name the bystander other" in said(at)
    assert words in said(at)
    del session(at).rows[1]
    at.text_area(key=fields.PROMPT).set_value("a xlo bear and a bear").run()
    assert "Takes “By subjects” (draft)" in said(at)
    assert "knows no places" not in said(at)
    assert any(button.key == "do.noises" for button in at.button), "drafts look for it, beside one LoRA"


def test_another_model_is_opened_from_a_folder(at: AppTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    at.text_input(key="do.model.folder.name").set_value(str(tmp_path))
    at.button(key="do.model.folder").click().run()
    assert "has no models: expected folders as diffusers saves them" in said(at)
    at.text_input(key="do.model.folder.name").set_value(str(playground_model().parent))
    at.button(key="do.model.folder").click().run()
    offered = at.selectbox(key="set.model.kind").options
    assert [words.partition(" ·")[0] for words in offered[:3]] == ["playground", "playground-flux", "model"]
    assert offered[2] == "model · Stable Diffusion 1.x and 2.x · in playground"
    at.selectbox(key="set.model.kind").set_value(str(playground_model())).run()
    at.multiselect(key="set.memory").set_value([Saver.TILING]).run()
    next(button for button in at.button if button.label == "Open this model").click().run()
    assert session(at).model.choice.memory == (Saver.TILING,)
    assert session(at).model.choice.model == str(playground_model())
    assert len(session(at).rows) == 2, "they fit this one as well"
    assert not at.button(key="do.make").disabled


def test_the_page_begins_with_the_model_that_it_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_COMPOSE_MODEL", "playground-flux")
    at = opened()
    assert session(at).model.choice.model == "playground-flux"
    assert at.selectbox(key="set.model.kind").value == "playground-flux"
    assert (session(at).rows, at.text_area(key=fields.PROMPT).value) == ([], "")
    assert at.number_input(key=fields.GUIDANCE).value == Run.model_fields["guidance_scale"].default


def test_another_model_brings_its_size_precision_steps_and_guidance_which_stay_as_they_are_changed(
    at: AppTest, tmp_path: Path
) -> None:
    assert at.selectbox(key="set.dtype").value == "float32"
    upload(at, "mine.safetensors", playground_lora("cat").read_bytes())
    at.session_state["set.model.kind"] = "A folder or a hub repository"
    at.run()
    at.text_input(key="set.model.name").set_value(str(saved_klein(tmp_path / "klein", distilled=True))).run()
    assert at.selectbox(key="set.dtype").value == fields.AUTOMATIC, "that of the other model is not taken over"
    next(button for button in at.button if button.label == "Open this model").click().run()
    assert [row.lora.shown for row in session(at).rows if row.lora is not None] == ["mine.safetensors"]
    assert [error.value.partition(" was made for")[0] for error in at.error if "was made for" in error.value] == [
        "mine\\.safetensors"
    ]
    assert at.text_area(key=fields.PROMPT).value == "", "the example is cleared, what the user has added is not"
    at.button(key=f"do.remove.{session(at).rows[0].number}").click().run()
    assert [error.value for error in at.error] == ["Write a prompt\\."]
    assert fields_size(at) == session(at).model.size != (SIZE, SIZE)
    assert (at.number_input(key=fields.STEPS).value, at.number_input(key=fields.GUIDANCE).value) == (4, 1.0)
    own = r"The model's own: float32, 4 steps, guidance 1: .*it is distilled to few steps \(is_distilled"
    assert re.search(own, said(at))
    at.number_input(key=fields.STEPS).set_value(STEPS).run()
    at.multiselect(key="set.memory").set_value([Saver.TILING]).run()
    next(button for button in at.button if button.label == "Open this model").click().run()
    assert session(at).model.choice.memory == (Saver.TILING,)
    assert (at.number_input(key=fields.STEPS).value, at.number_input(key=fields.GUIDANCE).value) == (STEPS, 1.0)


@pytest.mark.slow
def test_the_playgrounds_transformer_composes_with_loras_of_its_own(at: AppTest) -> None:
    at.selectbox(key="set.model.kind").set_value("playground-flux").run()
    next(button for button in at.button if button.label == "Open this model").click().run()
    assert session(at).rows == [], "the example is of the other model"
    assert at.text_area(key=fields.PROMPT).value == ""
    assert at.session_state[fields.METHOD] == fields.AUTOMATIC
    assert [error.value for error in at.error] == ["Write a prompt\\."]
    assert sum(str(button.key).startswith("do.add.playground-flux:") for button in at.button) == len(
        playground_loras("playground-flux")
    )
    for name in ("cat", "dog"):
        at.button(key=f"do.add.playground-flux:{name}").click().run()
    at.text_area(key=fields.PROMPT).set_value("a sks cat and a zwx dog on grass").run()
    assert at.segmented_control(key=fields.METHOD).options == ["Automatic", "In boxes", "Added up"]
    made(at)
    (result,) = session(at).results
    assert [concept.lora for concept in result.run.scene.concepts] == ["playground-flux:cat", "playground-flux:dog"]
    assert result.made.record.run.method == "regional"
    for view in ("Understand", "Compare", "Export"):
        at.session_state["set.view"] = view
        assert not at.run().exception


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anima", "z-image"])
def test_a_transformer_in_a_folder_is_opened_and_makes_an_image_with_two_concepts(
    at: AppTest, tmp_path: Path, name: str
) -> None:
    folder = saved_with_loras(EVERY[name], tmp_path)
    at.session_state["set.model.kind"] = "A folder or a hub repository"
    at.run()
    at.text_input(key="set.model.name").set_value(str(folder / "model")).run()
    next(button for button in at.button if button.label == "Open this model").click().run()
    assert not at.exception
    for concept in ("cat", "dog"):
        upload(at, f"{concept}.safetensors", (folder / "loras" / f"{concept}.safetensors").read_bytes())
    at.number_input(key=fields.WIDTH).set_value(64)
    at.number_input(key=fields.HEIGHT).set_value(64)
    at.segmented_control(key=fields.BOXED).set_value(fields.ANYWHERE)
    at.text_area(key=fields.PROMPT).set_value(PROMPT).run()
    assert at.segmented_control(key=fields.METHOD).options == ["Automatic", "In boxes", "Added up"]
    assert "Takes “By subjects” (draft), because the prompt names every concept by trigger and class word" in said(at)
    made(at)
    (result,) = session(at).results
    assert (result.run.method, result.made.image.size) == ("draft", (64, 64))


def test_trouble_with_a_model_keeps_the_old_one(at: AppTest) -> None:
    at.session_state["set.model.kind"] = "A folder or a hub repository"
    at.run()
    open_it = next(button for button in at.button if button.label == "Open this model")
    at.text_input(key="set.model.name").set_value("/nowhere").run()
    open_it.click().run()
    assert "there is no model '/nowhere'" in said(at)
    assert session(at).model.choice.model == "playground"
    assert not at.button(key="do.make").disabled


@pytest.mark.usefixtures("costs_do_not_matter")
def test_a_page_that_others_reach_opens_no_files_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_COMPOSE_LOCAL", "no")
    at = opened()
    assert not any(field.key in ("set.folder", "do.model.folder.name") for field in at.text_input)
    offered = at.selectbox(key="set.model.kind").options
    assert not any("in the hub's cache" in words for words in offered), "what is on this machine is not told"
    at.session_state["set.model.kind"] = "A folder or a hub repository"
    at.run()
    at.text_input(key="set.model.name").set_value("/etc").run()
    next(button for button in at.button if button.label == "Open this model").click().run()
    assert "open to other machines" in said(at)


def test_a_reloaded_page_has_its_fields_uploads_bystander_and_images_and_the_running_work_goes_on(
    at: AppTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(at).session_state[fields.METHOD] = "merge"
    made(at)
    (first,) = session(at).results
    del session(at).rows[0]
    upload(at, "mine.safetensors", playground_lora("bear").read_bytes())
    with_bystander(at)
    start_from(at, encoded_as(Image.new("RGB", (64, 64), "gray"), "JPEG"))
    at.slider(key=fields.STRENGTH).set_value(1.0)
    at.text_input(key=fields.SEEDS).set_value("9").run()
    at.button(key="do.make").click().run()
    job = session(at).job
    assert job is not None
    monkeypatch.setattr("lora_compose.compose.page.screen.session._SESSIONS._is_there", lambda session_id: False)
    again = AppTest.from_file(str(SCREEN), default_timeout=PATIENCE)
    again.query_params["session"] = at.query_params["session"]
    again.run()
    assert not again.exception
    assert session(again) is session(at)
    assert again.text_input(key=row_key(again, 2, "class_word")).value == "bear"
    shown = {image.proto.imgs[0].alt for image in again.get("image")}
    assert "The image to start from" in shown
    after(again)
    second, known = session(again).results
    assert (second.run.seed, known) == (9, first)
    assert any(button.key == f"do.keep.{second.key}" for button in again.button), "it is shown"
    again.session_state["set.view"] = "Gallery"
    assert any(button.key == f"do.look.{first.key}" for button in again.run().button)
    again.session_state["set.view"] = "Image"
    again.run()
    uploaded = session(again).rows[1].lora
    assert uploaded is not None
    assert uploaded.shown == "mine.safetensors"
    run = fields_of(again)
    assert (run,) == job.runs
    assert run.scene.concepts[2].is_bystander


def test_the_methods_are_compared(at: AppTest) -> None:
    small(at).run()
    at.session_state["set.view"] = "Compare"
    at.run()
    table = next(markdown.value for markdown in at.markdown if "what it does" in markdown.value)
    assert all(f"| **{name}** |" in table.replace("\\", "") for name in ("Added up", "By subjects", "In boxes"))
    assert re.search(r"Takes .*1\.\d times a plain image", table.replace("\\", ""))
    at.multiselect(key="set.compared").set_value(["merge", "regional"]).run()
    at.button(key="do.compare").click().run()
    after(at)
    assert {result.run.method for result in session(at).compared} == {"merge", "regional"}
    cells = [caption for caption in at.caption if caption.value.startswith("**") and "latent rows" in caption.help]
    assert len(cells) == 2
    assert all(re.match(r"2 (\+ .*)?latent rows\. ", cell.help) for cell in cells)  # one step
    assert all(f"{name}: " in cell.value for cell in cells for name in ("bear", "robot")), "their likeness"


def test_stop_and_waiting_are_shown(at: AppTest) -> None:
    with session(at).model.turn(()):
        at.button(key="do.make").click().run()
        until(lambda: bool(session(at).job and session(at).job.ahead))  # pyright: ignore[reportOptionalMemberAccess]
        at.run()
        assert any("one call of another session ahead" in str(found.proto) for found in at.get("progress"))
        at.button(key="do.stop").click().run()
    after(at)
    assert "Your settings are unchanged" in said(at)


@pytest.mark.slow
def test_variations_share_the_seed_and_differ_in_weight(at: AppTest) -> None:
    choose(at, "merge")
    at.slider(key=row_key(at, 1, "weight")).set_value(0.5).run()
    made(at)
    (first,) = session(at).results
    at.button(key=f"do.vary.{first.key}").click().run()
    after(at)
    runs = [result.run for result in session(at).results[:4]]
    assert {run.seed for run in runs} == {2}
    assert [[concept.weight for concept in run.scene.concepts] for run in runs] == [
        [1.3, 0.65], [1.15, 0.575], [0.85, 0.425], [0.7, 0.35],
    ]  # fmt: skip
    assert len({result.made.image.tobytes() for result in session(at).results}) == 5


def test_the_drafts_of_four_noises_are_shown_and_one_is_made(at: AppTest) -> None:
    assert not any(button.key == "do.noises" for button in at.button), "boxes leave nothing to find"
    small(at).session_state[fields.BOXED] = fields.ANYWHERE
    choose(at, fields.AUTOMATIC)
    at.button(key="do.noises").click().run()
    after(at)
    assert [one.run.seed for one in session(at).divisions] == [4, 5, 6, 7]
    assert session(at).results == []
    shown = [image.proto.imgs[0].alt for image in at.get("image")]
    assert shown[-4:] == [f"The parts of bear, robot with seed {seed}" for seed in (4, 5, 6, 7)]
    of_names = f'--concept:{colour(0)}">bear</span> <span class="lc-trigger" style="--concept:{colour(1)}">robot</span>'
    assert any(of_names in text.proto.body for text in at.get("html")), "in the colours of their parts"
    assert at.button(key="do.noises").label == "Try four more noises"
    at.text_area(key=fields.PROMPT).set_value("a xlo bear and a qrt robot in snow").run()
    assert not any(str(button.key).startswith("do.noise.") for button in at.button), "they are of another prompt"
    at.text_area(key=fields.PROMPT).set_value(example().prompt).run()
    at.button(key="do.noise.6").click().run()
    after(at)
    (result,) = session(at).results
    assert (result.run.seed, result.run.method) == (6, "draft")
    assert at.text_input(key=fields.SEEDS).value == "6"
    assert result.attention is not None
    assert result.attention.draft is not None
    shown = session(at).divisions[2].image
    assert shown.tobytes() == division((64, 64), result.attention.draft, result.attention.masks[0], [0, 1]).tobytes(), (
        "the image is divided as its draft was"
    )
    at.session_state["set.view"] = "Understand"
    at.run()
    assert "Areas that the method found decided" in said(at).replace("*", "")
    assert "The areas follow from it" in said(at)


def test_pressing_again_queues_images_which_a_failure_does_not_end_and_the_queue_can_be_cleared(
    at: AppTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("the first one fails")

    small(at).session_state[fields.METHOD] = "merge"
    with monkeypatch.context() as failing:
        failing.setattr("lora_compose.compose.page.work.make_batch", fails)
        with session(at).model.turn(()):
            for _ in range(2):
                at.button(key="do.make").click().run()
            at.button(key="do.clear").click().run()
            assert session(at).waiting == []
            for seeds in ("7", "8"):
                at.text_input(key=fields.SEEDS).set_value(seeds).run()
                at.button(key="do.make").click().run()
            assert "2 more images wait." in said(at)
            assert not at.exception
        session(at).job.join(PATIENCE)  # pyright: ignore[reportOptionalMemberAccess]
    at.run()
    for _ in range(2):
        after(at)
    assert "The first one fails" in said(at)
    assert [result.run.seed for result in session(at).results] == [8, 7]
    assert not session(at).working
    at.button(key="do.make").click().run()
    session(at).job.join(PATIENCE)  # pyright: ignore[reportOptionalMemberAccess]
    made(at)  # before the page has looked at the image
    assert [result.run.seed for result in session(at).results] == [8, 8, 8, 7]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- images to start from ---


def start_from(at: AppTest, content: bytes) -> None:
    at.file_uploader(key=f"do.start.{session(at).uploads}").set_value([("room.jpg", content, "image/jpeg")]).run()
    assert not at.exception


def test_a_part_of_an_image_is_repainted_and_the_rest_stays(at: AppTest) -> None:
    given = Image.linear_gradient("L").resize((300, 280)).convert("RGB")
    start_from(at, encoded_as(given, "JPEG"))
    start = session(at).start
    assert start is not None
    width, height = SIZE * 3 // 2, SIZE * 3 // 2 * 280 // 300 // 8 * 8
    assert start.size == fields_size(at) == (width, height)  # as large as the model takes, in whole cells
    at.button(key="do.unstart").click().run()
    width, height = 72, 64
    start_from(at, encoded_as(given.resize((width, height)), "JPEG"))
    start = session(at).start
    assert start is not None
    assert start.size == fields_size(at) == (width, height)
    at.session_state[fields.METHOD] = "merge"
    at.number_input(key=fields.STEPS).set_value(2)  # of which at least one is left after the start
    at.segmented_control(key=fields.PAINTED).set_value(fields.PART).run()
    assert "Paint over the part that is to change" in said(at)
    assert at.button(key="do.make").disabled
    mask, below = Image.new("L", (width // 2, height // 2)), height // 3
    mask.paste(255, (0, 0, width // 2, below))
    session(at).start = session(at).store.add_mask(start, as_uri(mask))
    at.run()
    assert not at.button(key="do.make").disabled
    made(at)
    (result,) = session(at).results
    before, after = (np.asarray(image).astype(int) for image in (Image.open(start.path), result.made.image))
    assert not (before - after)[2 * below + 4 :].any()
    assert (before - after)[: 2 * below - 4].any()
    assert result.run.scene.strength == 0.7
    assert 'mask_image="mask.png"' in "".join(code.value for code in at.code)
    assert 'image="room.png"' in "".join(code.value for code in at.code)
    at.button(key=f"do.reuse.{result.key}").click().run()
    assert session(at).start is not None
    at.button(key="do.unstart").click().run()
    assert session(at).start is None


def test_an_image_gets_a_size_at_which_the_model_works_on_it(at: AppTest, tmp_path: Path) -> None:
    flux_pipeline(ComposeFluxKontextPipeline).save_pretrained(tmp_path / "kontext")
    session(at).model = MODELS.open(ModelChoice(str(tmp_path / "kontext")))
    session(at).rows.clear()
    start_from(at, encoded_as(Image.new("RGB", (160, 112)), "JPEG"))
    start = session(at).start
    assert start is not None
    assert start.size == fields_size(at) == Image.open(start.path).size == (1248, 832)


def test_what_is_no_image_to_start_from_is_refused(at: AppTest) -> None:
    start_from(at, b"no image")
    assert "room.jpg cannot be read as an image; expected PNG, JPEG, WEBP, BMP" in said(at)
    assert session(at).start is None
    assert not list(session(at).store.folder.iterdir())


# --- images that are read, and images that guide ---


def test_reference_images_are_offered_where_the_model_reads_them(at: AppTest, tmp_path: Path) -> None:
    assert not [field for field in at.file_uploader if (field.key or "").startswith("do.reference")]
    session(at).model = MODELS.open(ModelChoice(str(saved_klein(tmp_path / "klein"))))
    session(at).rows.clear()
    at.run()
    for name, paint in (("room.jpg", "navy"), ("chair.jpg", "orange"), ("no.jpg", None)):
        content = b"no image" if paint is None else encoded_as(Image.new("RGB", (70, 96), paint), "JPEG")
        key = f"do.reference.{session(at).uploads}"
        at.file_uploader(key=key).set_value([(name, content, "image/jpeg")]).run()
        assert not at.exception
    assert "no.jpg cannot be read as an image" in said(at)
    save_file(dict(as_file(random_lora_of_all(flux2_transformer(), 0))), tmp_path / "bear.safetensors")
    upload(at, "bear.safetensors", (tmp_path / "bear.safetensors").read_bytes())
    at.text_input(key=row_key(at, 0, "trigger")).set_value("xlo")
    at.selectbox(key=row_key(at, 0, "references")).set_value("Yes").run()
    choose(at, "merge")
    both = list(session(at).references)
    assert [session(at).store.images[path] for path in both] == ["room.png", "chair.png"]
    assert Image.open(both[0]).size == (70, 96), "as large as it was given"
    made(at)  # with a preview, of latents that diffusers packs
    (result,) = session(at).results
    assert list(result.run.scene.references) == both
    assert result.run.scene.concepts[0].references
    assert result.made.record.images.keys() == {"references.0", "references.1"}
    assert 'image=["room.png", "chair.png"]' in "".join(code.value for code in at.code)
    at.selectbox(key=row_key(at, 0, "references")).set_value("No")
    at.button(key="do.unreference.0").click().run()
    assert session(at).references == both[1:]
    Image.new("RGB", (70, 96), "red").save(both[1])
    at.button(key=f"do.reuse.{result.key}").click().run()
    assert session(at).references == both[:1], "the other one has changed"
    assert at.selectbox(key=row_key(at, 0, "references")).value == "Yes"
    assert "Reference images are not here, or are others now" in said(at)


@pytest.mark.slow
def test_a_control_image_and_an_ip_adapter_guide_the_image(at: AppTest, tmp_path: Path) -> None:
    folder = playground_guides(tmp_path)
    choose(at, "merge")
    for kind, model, weights in (("ControlNet or T2I-Adapter", "pose", ""), ("IP-Adapter", "faces", "adapter.bin"),
                                 ("IP-Adapter", "faces", "adapter.safetensors")):  # fmt: skip
        at.selectbox(key="new.guide.kind").set_value(kind).run()
        at.text_input(key="new.guide.model").set_value(str(folder / model))
        if weights:
            at.text_input(key="new.guide.weights").set_value(weights)
        content = (folder / "face.png").read_bytes()
        at.file_uploader(key=f"do.guide.{session(at).uploads}").set_value([("face.png", content, "image/png")]).run()
        assert not at.exception
        assert ("weight_name" in said(at)) == weights.endswith(".bin")
    assert len(session(at).guides) == 2
    made(at)
    (result,) = session(at).results
    assert result.made.record.images.keys() == {"controls.0.image", "ip_adapters.0.image"}
    code = "".join(code.value for code in at.code)
    assert 'image="face.png"' in code
    assert "fit_ip_adapters(pipe, [IPAdapterFile(" in code
    at.button(key="do.unguide.0").click().run()
    assert [type(guide).__name__ for guide in session(at).guides] == ["IPAdapterFile"]
    at.button(key=f"do.reuse.{result.key}").click().run()
    assert len(session(at).guides) == 2


def fields_size(at: AppTest) -> tuple[int, int]:
    return at.session_state[fields.WIDTH], at.session_state[fields.HEIGHT]


def encoded_as(image: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_loras_are_merged_and_used_as_one_concept(at: AppTest) -> None:
    at.session_state["set.view"] = "Merge"
    at.run()
    labels = at.multiselect(key="do.merge.loras").options
    bear, style = (next(label for label in labels if label.startswith(name)) for name in ("bear (", f"{STYLE} ("))
    assert at.button(key="do.merge").disabled
    at.multiselect(key="do.merge.loras").set_value([bear, style]).run()
    at.number_input(key=f"do.merge.weight.{style}").set_value(0.5)
    at.selectbox(key="do.merge.method").set_value("np").run()
    at.button(key="do.merge").click().run()
    assert not at.exception
    assert any(f"bear+{STYLE}-np.safetensors" in shown.value.replace("\\", "") for shown in at.success)
    at.button(key="do.merged.use").click().run()
    row = session(at).rows[-1]
    assert at.text_input(key=fields.of_row(row, "trigger")).value == "xlo"
    assert row.lora is not None
    file = read_lora(Path(row.lora.source))
    merged = json.loads(file.metadata[RECORD])
    assert (merged["method"], [one["weight"] for one in merged["files"]]) == ("np", [1.0, 0.5])
    fit = session(at).fit(row)
    assert fit is not None
    assert fit[-1] == "", "it fits the model"


def test_a_card_without_a_trigger_offers_those_of_the_captions(at: AppTest, tmp_path: Path) -> None:
    tags = {"10_images": {"1girl": 40, "mikudress": 40}}
    path = tmp_path / "miku.safetensors"
    tensors = load_file(playground_lora("cat"))
    save_file(tensors, path, metadata={"ss_tag_frequency": json.dumps(tags)})
    upload(at, "miku.safetensors", path.read_bytes())
    row = session(at).rows[-1]
    first = at.button(key=f"do.trigger.{row.number}.0")
    assert first.label == "Trigger “mikudress”, in 40 captions"
    first.click().run()
    assert at.text_input(key=fields.of_row(row, "trigger")).value == "mikudress"
    at.button(key=f"do.class_word.{row.number}.0").click().run()
    assert at.text_input(key=fields.of_row(row, "class_word")).value == "1girl"
    assert not [button for button in at.button if str(button.key).startswith("do.class_word")]
    assert not at.exception


def test_what_cannot_be_merged_is_said(at: AppTest) -> None:
    at.session_state["set.view"] = "Merge"
    at.run()
    labels = at.multiselect(key="do.merge.loras").options
    at.multiselect(key="do.merge.loras").set_value([*labels[:3]]).run()
    at.selectbox(key="do.merge.method").set_value("k-lora").run()
    at.button(key="do.merge").click().run()
    assert "takes two files, a subject and then a style; 3 were given" in said(at)
    for label in labels[:3]:
        at.number_input(key=f"do.merge.weight.{label}").set_value(0.0)
    at.selectbox(key="do.merge.method").set_value("cat").run()
    at.button(key="do.merge").click().run()
    assert "every weight is 0" in said(at).lower()
    at.number_input(key=f"do.merge.weight.{labels[0]}").set_value(1.0)
    with session(at).model.turn(()):
        at.button(key="do.merge").click().run()
        assert "The model is at work" in said(at)
    assert session(at).store.uploads == []
    assert list(session(at).store.folder.glob("*.safetensors")) == []
