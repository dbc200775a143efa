"""The page in a real browser: Debian's chromium, driven by playwright. Asked for with `-m browser`."""

import json
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from safetensors import safe_open
from safetensors.torch import save_file

from browsing import CHROMIUM, FLAGS, served, settled
from components import kohya_tensors, random_lora, tiny_xl_pipeline
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.playground.assets import playground_lora
from small_world import SIZE, STYLE, STYLE_WORDS

pytestmark = pytest.mark.browser

MINUTE = 60_000
expect.set_options(timeout=30_000)  # other tests may use the processor as well
MAKE = re.compile("^Generate 1 image")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def address(out: Path) -> Iterator[str]:
    with served(out) as (address, _):
        yield address


def visits_folders(out: Path) -> list[Path]:
    return [path for path in (out / "temporary").glob("lora-compose-page-*/*") if path.is_dir()]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:
    page = visited(chromium, address)
    yield page
    page.context.close()


@pytest.fixture
def other_page(chromium: Browser, address: str) -> Iterator[Page]:
    page = visited(chromium, address)
    yield page
    page.context.close()


def visited(chromium: Browser, address: str, **context: Any) -> Page:
    page = chromium.new_context(**{"viewport": {"width": 1400, "height": 1000}, **context}).new_page()
    page.set_default_timeout(MINUTE)
    page.goto(address)
    expect(page.get_by_role("button", name=MAKE)).to_be_enabled(timeout=2 * MINUTE)
    expect(page.get_by_role("group", name="Canvas")).to_be_visible(timeout=2 * MINUTE)
    return page


def make(page: Page, name: Any = MAKE) -> None:
    expect(page.get_by_role("button", name=name)).to_be_enabled()
    page.get_by_role("button", name=name).click()
    settled(page)
    expect(page.get_by_role("button", name="Stop")).to_have_count(0, timeout=2 * MINUTE)
    expect(page.get_by_role("button", name="Download")).to_be_visible(timeout=2 * MINUTE)


def downloaded(page: Page, to: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    download.value.save_as(to)
    return to


def upload(page: Page, *files: Any) -> None:
    page.get_by_role("button", name="Upload LoRAs").click()
    page.locator('[data-testid="stFileUploaderDropzoneInput"][accept*="safetensors"]').set_input_files(list(files))


def view(page: Page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).click()
    settled(page)


def arrange(page: Page, name: str) -> None:
    page.get_by_role("button", name="Arrange").click()
    page.get_by_role("button", name=name).click()
    settled(page)
    page.keyboard.press("Escape")


def box(page: Page, name: str) -> list[int]:
    label = page.get_by_role("group", name="Boxes of the concepts").locator(f'[aria-label^="Box of {name}"]')
    return [int(number) for number in re.findall(r"\d+", (label.get_attribute("aria-label") or "").partition(":")[2])]


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drags on the canvas; places are shares of its sides."""
    stage = page.get_by_role("group", name="Boxes of the concepts")
    stage.scroll_into_view_if_needed()
    frame = stage.bounding_box()
    assert frame is not None
    points = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=8)
    page.mouse.up()
    settled(page)


def test_one_click_from_the_first_visit_to_an_image_that_carries_its_run(page: Page, tmp_path: Path) -> None:
    started = time.monotonic()
    make(page)
    assert time.monotonic() - started < 60
    record = read_record(downloaded(page, tmp_path / "result.png"))
    assert [concept.name for concept in record.run.scene.concepts] == ["bear", "robot"]
    assert record.run.method == "draft"


def test_six_presses_from_a_folder_of_two_loras_to_a_downloaded_image(
    chromium: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user's own SDXL, and two files as kohya's scripts write them: nothing is typed on the page."""
    pipe, loras = tiny_xl_pipeline(), tmp_path / "loras"
    pipe.save_pretrained(tmp_path / "model")
    loras.mkdir()
    for seed, words in enumerate(("sks cat", "zwx dog")):
        metadata = {"ss_tag_frequency": json.dumps({f"10_{words}": {words: 20}})}
        tensors = kohya_tensors(unet=random_lora(pipe.unet, seed, size=0.05))
        save_file(tensors, loras / f"{words[-3:]}.safetensors", metadata=metadata)
    presses = []
    with served(tmp_path / "out", str(tmp_path / "model"), "--loras", str(loras)) as (address, _):
        page = chromium.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.set_default_timeout(2 * MINUTE)

        def press(name: Any) -> None:
            button = page.get_by_role("button", name=name)
            expect(button).to_be_enabled(timeout=2 * MINUTE)
            button.click()
            presses.append(name)
            settled(page)

        started = time.monotonic()
        page.goto(address)
        press("Choose LoRAs")
        ready = time.monotonic()
        for name in ("Add these 2", "Insert “sks cat”", "Insert “zwx dog”", MAKE):
            press(name)
        expect(page.get_by_role("button", name="Download")).to_be_visible(timeout=3 * MINUTE)
        with page.expect_download() as download:
            press("Download")
        seconds = time.monotonic() - started
        download.value.save_as(tmp_path / "result.png")
        page.context.close()
    run = read_record(tmp_path / "result.png").run
    assert run.scene.prompt == "a sks cat and a zwx dog"
    assert [concept.name for concept in run.scene.concepts] == ["cat", "dog"]
    assert run.method == "draft"
    assert len(presses) <= 6
    with capsys.disabled():
        print(f"\n{len(presses)} presses, {seconds:.0f} s, {ready - started:.0f} s of them until the first press")


def test_two_loras_uploaded_named_from_their_metadata_and_composed(page: Page, tmp_path: Path) -> None:
    upload(page, playground_lora("cat"), playground_lora("dog"))
    expect(page.get_by_label("Name", exact=True)).to_have_count(4)
    for _ in range(2):
        page.get_by_role("button", name="Remove").first.click()
        settled(page)
    expect(page.get_by_label("Name", exact=True)).to_have_count(2)
    expect(page.get_by_label("Trigger", exact=True).first).to_have_value("sks")
    prompt = page.get_by_label("Prompt: name each concept by its trigger")
    prompt.fill("")
    prompt.press("Control+Enter")
    for phrase in ("sks cat", "zwx dog"):
        page.get_by_role("button", name=f"Insert “{phrase}”").click()
        settled(page)
    expect(prompt).to_have_value("a sks cat and a zwx dog")
    arrange(page, "Side by side")
    make(page)
    record = read_record(downloaded(page, tmp_path / "result.png"))
    assert record.run.scene.prompt == "a sks cat and a zwx dog"
    assert all("lora-compose-page-" in (concept.lora or "") for concept in record.run.scene.concepts)


def test_files_that_are_no_loras_are_refused_in_words_and_the_page_goes_on(page: Page, tmp_path: Path) -> None:
    pickle = {"name": "cat.safetensors", "mimeType": "application/octet-stream", "buffer": b"\x80\x04K\x01."}
    outside = {"name": "../../evil.safetensors", "mimeType": "application/octet-stream", "buffer": b"PK\x03\x04" * 9}
    upload(page, pickle, outside)
    expect(page.get_by_text("a pickle or an archive under another name").first).to_be_visible()
    expect(page.get_by_label("Name", exact=True)).to_have_count(2)
    page.keyboard.press("Escape")
    make(page)


def test_two_boxes_are_drawn_dragged_and_moved_by_keys(page: Page, tmp_path: Path) -> None:
    arrange(page, "Big and small")
    before = box(page, "robot")
    stage = page.get_by_role("group", name="Boxes of the concepts")
    stage.locator('[aria-label^="Box of robot"]').focus()
    page.keyboard.press("ArrowUp")
    page.wait_for_timeout(600)
    settled(page)
    assert box(page, "robot") == [before[0], before[1] - 4, before[2], before[3] - 4]
    drag(page, (0.98, 0.05), (0.7, 0.35))  # on free ground: the robot anew
    assert box(page, "robot") == pytest.approx([SIZE * each for each in (0.7, 0.05, 0.98, 0.35)], abs=5)
    stage.locator('[aria-label^="Box of bear"]').focus()
    drag(page, (0.3, 0.5), (0.35, 0.5))
    assert box(page, "bear")[0] > 2
    make(page)
    regions = [concept.region for concept in read_record(downloaded(page, tmp_path / "a.png")).run.scene.concepts]
    assert regions == [tuple(box(page, "bear")), tuple(box(page, "robot"))]


def test_methods_side_by_side_with_cost_and_likeness(page: Page) -> None:
    view(page, "Compare")
    expect(page.get_by_text("what it does")).to_be_visible()
    page.get_by_role("button", name="Generate all").click()
    expect(page.get_by_role("button", name="View image")).to_have_count(3, timeout=3 * MINUTE)
    expect(page.get_by_text(re.compile(r"bear: (\d\.\d\d|not found)")).first).to_be_visible()
    page.get_by_role("button", name="View image").first.click()
    settled(page)
    view(page, "Understand")
    expect(page.get_by_text("Where the model looked for bear")).to_be_visible()


def test_stop_in_the_middle_keeps_all_that_was_set(page: Page) -> None:
    page.get_by_label("Steps", exact=True).fill("200")
    page.get_by_label("Steps", exact=True).press("Enter")
    settled(page)
    page.get_by_role("button", name=MAKE).click()
    expect(page.get_by_text(re.compile(r"Step [1-9]\d* of 200, .* left"))).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped. Your settings are unchanged.")).to_be_visible(timeout=15_000)
    expect(page.get_by_label("Steps", exact=True)).to_have_value("200")
    expect(page.get_by_role("button", name=MAKE)).to_be_enabled()


def test_an_image_dropped_in_sets_everything_and_gives_the_same_pixels(page: Page, tmp_path: Path) -> None:
    page.get_by_label("Seeds", exact=True).fill("3")
    page.get_by_label("Seeds", exact=True).press("Enter")
    page.get_by_label("Steps", exact=True).fill("5")
    page.get_by_label("Steps", exact=True).press("Enter")
    settled(page)
    make(page)
    result = downloaded(page, tmp_path / "result.png")
    page.reload()
    expect(page.get_by_label("Seeds", exact=True)).to_have_value("3", timeout=2 * MINUTE)
    page.goto(page.url.partition("?")[0])  # a session of its own
    expect(page.get_by_label("Seeds", exact=True)).to_have_value("4", timeout=2 * MINUTE)
    page.get_by_text("Load settings from a PNG").click()
    page.locator('[data-testid="stFileUploaderDropzoneInput"][accept="application/streamlit,.png"]').set_input_files(
        result
    )
    expect(page.get_by_label("Seeds", exact=True)).to_have_value("3")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("5")
    settled(page)
    make(page)
    again = downloaded(page, tmp_path / "again.png")
    assert np.array_equal(np.asarray(read_pixels(result)), np.asarray(read_pixels(again)))


def test_two_visitors_see_nothing_of_each_other_and_both_finish(page: Page, other_page: Page, tmp_path: Path) -> None:
    upload(page, playground_lora("cat"))
    expect(page.get_by_label("Name", exact=True)).to_have_count(3)
    page.keyboard.press("Escape")
    page.get_by_label("Prompt: name each concept by its trigger").fill("a xlo bear, a sks cat and a qrt robot on grass")
    page.get_by_label("Prompt: name each concept by its trigger").press("Control+Enter")
    other_page.get_by_label("Seeds", exact=True).fill("1")
    other_page.get_by_label("Seeds", exact=True).press("Enter")
    for one in (page, other_page):
        settled(one)
        one.get_by_role("button", name=MAKE).click()
    expect(other_page.get_by_text("Waiting for the model: one call of another session ahead")).to_be_visible()
    for one in (page, other_page):
        expect(one.get_by_role("button", name="Download")).to_be_visible(timeout=2 * MINUTE)
    mine = read_record(downloaded(page, tmp_path / "mine.png"))
    theirs = read_record(downloaded(other_page, tmp_path / "theirs.png"))
    assert [concept.name for concept in mine.run.scene.concepts] == ["bear", "robot", "cat"]
    assert [concept.name for concept in theirs.run.scene.concepts] == ["bear", "robot"]
    expect(other_page.get_by_label("Name", exact=True)).to_have_count(2)
    view(other_page, "Gallery")
    expect(other_page.get_by_role("button", name="View image")).to_have_count(1)
    alone = make_alone(theirs)
    assert np.array_equal(np.asarray(alone), np.asarray(read_pixels(tmp_path / "theirs.png")))


def make_alone(record: Any) -> Image.Image:
    from lora_compose.compose.generate.machine import threads
    from lora_compose.compose.generate.making import make
    from lora_compose.compose.generate.models import open_model

    with threads(record.machine.threads):
        return make(open_model(record.run), record.run).image


def test_all_of_it_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.innerText").strip().endswith("Generate 1 image"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Download")).to_be_visible(timeout=2 * MINUTE)
    page.get_by_role("radio", name="Image", exact=True).focus()
    page.keyboard.press("ArrowRight")
    settled(page)
    if page.get_by_text("what it does").count() == 0:  # arrows move, Enter chooses
        page.keyboard.press("Enter")
    expect(page.get_by_text("what it does")).to_be_visible()


def test_markup_is_shown_as_it_is(page: Page) -> None:
    evil = '<img src=x onerror="window.caught=1"> **bold** $x$ :smile: [a](javascript:alert(1))'
    page.get_by_label("Name", exact=True).first.fill(evil[:60])
    page.get_by_label("Name", exact=True).first.press("Enter")
    page.get_by_label("Prompt: name each concept by its trigger").fill(f"a xlo bear and a qrt robot {evil}")
    page.get_by_label("Prompt: name each concept by its trigger").press("Control+Enter")
    settled(page)
    expect(page.locator(".lc-prompt")).to_contain_text(evil)
    page.get_by_label("Trigger", exact=True).first.fill("<b>nowhere</b>")
    page.get_by_label("Trigger", exact=True).first.press("Enter")
    settled(page)
    expect(page.get_by_text("<b>nowhere</b>").first).to_be_visible()
    assert page.evaluate("window.caught") is None
    assert page.locator(".stMain strong", has_text="bold").count() == 0


def test_a_file_larger_than_the_limit_never_arrives(page: Page, tmp_path: Path, address: str) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)  # takes no room on the disk
    upload(page, path)
    expect(page.get_by_text(re.compile("must be 1.*GB or smaller|exceeds|too large", re.IGNORECASE))).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name=MAKE)).to_be_enabled()


def metadata_of_a_stranger(kind: str) -> dict[str, str]:
    patterns = {f"{i}": 8 for i in range(400_000)} if kind == "many patterns" else {".?" * 40 + "!": 8}
    config: dict[str, Any] = {"unet.alpha_pattern": patterns, "unet.r": 4, "unet.lora_alpha": 4}
    return {"lora_adapter_metadata": json.dumps({"a": [0] * 2_600_000} if kind == "a long list" else config)}


@pytest.mark.parametrize("kind", ["many patterns", "an endless pattern", "a long list"])
def test_the_page_answers_all_sessions_while_an_untrusted_file_is_read(
    page: Page, other_page: Page, address: str, tmp_path: Path, kind: str
) -> None:
    with safe_open(playground_lora("cat"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if not key.endswith(".alpha")}  # noqa: SIM118
    save_file(tensors, tmp_path / "cat.safetensors", metadata_of_a_stranger(kind))
    took: list[float] = []
    read = threading.Event()

    def ask() -> None:
        while not read.is_set():
            started = time.monotonic()
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=60).read()
            took.append(time.monotonic() - started)
            time.sleep(0.02)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        upload(page, tmp_path / "cat.safetensors")
        other_page.get_by_label("Prompt: name each concept by its trigger").fill("a xlo bear and a qrt robot in snow")
        other_page.get_by_label("Prompt: name each concept by its trigger").press("Control+Enter")
        expect(other_page.locator(".lc-prompt")).to_contain_text("in snow", timeout=10_000)
        expect(page.get_by_label("Name", exact=True)).to_have_count(3)
        settled(other_page)
        # The file is looked at now, if the other visitor had the model before.
        page.get_by_label("Steps", exact=True).fill("3")
        page.get_by_label("Steps", exact=True).press("Enter")
        settled(page)
    finally:
        read.set()
    asking.join(10)
    assert max(took) < 1


def start_long_work(page: Page) -> None:
    """Uploads a LoRA, and asks for more results than can be made while a test lasts."""
    for label, value in (("Steps", "200"), ("Seeds", "1-16")):
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Enter")
        settled(page)
    upload(page, playground_lora("cat"))
    expect(page.get_by_label("Name", exact=True)).to_have_count(3)
    page.keyboard.press("Escape")
    page.get_by_label("Prompt: name each concept by its trigger").fill("a xlo bear, a sks cat and a qrt robot on grass")
    page.get_by_label("Prompt: name each concept by its trigger").press("Control+Enter")
    settled(page)
    page.get_by_role("button", name="Generate 16 images").click()
    expect(page.get_by_text(re.compile("step [1-9]"))).to_be_visible()


def test_files_are_deleted_and_work_ends_when_the_browser_has_gone(chromium: Browser, tmp_path: Path) -> None:
    with served(tmp_path) as (address, _):
        page = visited(chromium, address)
        start_long_work(page)
        (folder,) = visits_folders(tmp_path)
        assert len(list(folder.iterdir())) == 1
        page.context.close()
        gone = time.monotonic()
        while folder.exists():
            assert time.monotonic() - gone < 45
            time.sleep(0.2)
        next_one = visited(chromium, address)
        settled(next_one)
        # and not that the model is at work for somebody else
        expect(next_one.get_by_text(re.compile(r"^Takes (about )?\d"))).to_be_visible()
        next_one.context.close()


def test_a_page_that_is_ended_leaves_nothing(chromium: Browser, tmp_path: Path) -> None:
    with served(tmp_path) as (address, server):
        page = visited(chromium, address)
        start_long_work(page)
        server.terminate()
        assert server.wait(30) == 0
        assert list((tmp_path / "temporary").glob("lora-compose-*")) == []
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_is_cut_off_at_the_side(chromium: Browser, address: str, scheme: Any, width: int) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    expect(page.get_by_role("button", name=MAKE)).to_be_enabled(timeout=2 * MINUTE)
    assert page.evaluate("document.querySelector('.stMain').scrollWidth") <= width
    ground = Image.open(BytesIO(page.screenshot())).convert("L").resize((1, 1)).getpixel((0, 0))
    assert isinstance(ground, int)
    assert (ground > 128) == (scheme == "light")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_all_users_can_use_it(chromium: Browser, address: str, scheme: Any, size: tuple[int, int]) -> None:
    """No view breaks a rule of axe: contrast, names of fields, roles, headings."""
    page = visited(chromium, address, viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    for _ in range(2):
        make(page)
    for name in ("Image", "Compare", "Understand", "Gallery", "Merge"):
        view(page, name)
        for group in page.get_by_text("Compare two images by wiping").all():
            group.click()
        check_with_axe(page, name)
    view(page, "Image")
    for name in ("More", "Arrange", "Upload LoRAs", "Choose LoRAs", "Model:", "Size:"):
        page.get_by_role("button", name=name).first.click()
        page.wait_for_timeout(500)
        check_with_axe(page, name)
        page.keyboard.press("Escape")
    page.get_by_text("Advanced: other methods").click()
    page.wait_for_timeout(500)
    check_with_axe(page, "Advanced")
    page.context.close()


def check_with_axe(page: Page, name: str) -> None:
    # The exception is minor, and in the area on which Streamlit's own field has files dropped.
    rules = {"presentation-role-conflict": {"enabled": False}}
    found = Axe().run(page, options={"resultTypes": ["violations"], "rules": rules})
    assert found.violations_count == 0, f"{name}: {found.generate_report()}"


def test_the_browser_asks_no_other_host(chromium: Browser, address: str) -> None:
    context, asked = chromium.new_context(), []
    context.on("request", lambda request: asked.append(urlsplit(request.url).hostname))
    page = context.new_page()
    page.goto(address)
    expect(page.get_by_role("button", name=MAKE)).to_be_enabled(timeout=2 * MINUTE)
    settled(page)
    assert page.locator('link[rel="shortcut icon"]').get_attribute("href")
    assert set(asked) <= {urlsplit(address).hostname, None}
    context.close()


def test_all_for_a_first_image_is_in_sight(chromium: Browser, address: str) -> None:
    page = visited(chromium, address, viewport={"width": 1280, "height": 800})
    for role, name in (("button", "Model:"), ("button", "Size:"), ("button", MAKE), ("textbox", "Prompt"),
                       ("radio", "Automatic"), ("textbox", "Seeds"), ("group", "Canvas")):  # fmt: skip
        place = page.get_by_role(role, name=name).first.bounding_box()  # pyright: ignore[reportArgumentType]
        assert place is not None
        assert place["y"] + place["height"] <= 800
    for card in page.locator('[class*="st-key-card_"]').all():
        place = card.bounding_box()
        assert place is not None
        assert place["y"] + place["height"] <= 800
    page.context.close()


def place_of(element: Locator) -> tuple[float, float, float, float]:
    """The left, upper, right and lower edge of an element."""
    place = element.bounding_box()
    assert place is not None
    return place["x"], place["y"], place["x"] + place["width"], place["y"] + place["height"]


def test_on_a_narrow_screen_the_image_is_right_under_the_button(chromium: Browser, address: str) -> None:
    size: Any = {"width": 390, "height": 844}
    page = visited(chromium, address, viewport=size)
    _, button, _, _ = place_of(page.get_by_role("button", name=MAKE))
    _, top, _, bottom = place_of(page.get_by_role("group", name="Canvas"))
    assert button < top
    assert bottom - button <= size["height"]  # in sight together
    assert bottom < place_of(page.get_by_text("Advanced: other methods"))[1]
    upload, choose = (place_of(page.get_by_role("button", name=f"{verb} LoRAs")) for verb in ("Upload", "Choose"))
    assert upload[1] == choose[1], "in one line"
    for card in page.locator('[class*="st-key-card_"]').all():
        field = place_of(card.get_by_label("Name", exact=True))
        assert place_of(card.get_by_test_id("stSliderThumbValue"))[1] >= field[3], "the weight is below the name"
    page.context.close()


def test_labels_of_boxes_are_not_over_each_other_and_the_image_is_under_them(page: Page) -> None:
    make(page)
    page.get_by_role("button", name="Arrange").click()
    left, _, right, _ = box(page, "robot")
    for label, value in (("Left", left), ("Right", right)):
        page.get_by_label(label, exact=True).first.fill(str(value))
        page.get_by_label(label, exact=True).first.press("Enter")
        settled(page)
    page.keyboard.press("Escape")
    assert box(page, "bear") == box(page, "robot")
    bear, robot = (page.locator(".label", has_text=name).bounding_box() for name in ("bear", "robot"))
    assert bear is not None
    assert robot is not None
    assert bear["y"] + bear["height"] <= robot["y"]
    image, stage = (page.locator(name).bounding_box() for name in (".stage img", ".stage"))
    assert image is not None
    assert stage is not None
    assert image["width"] == pytest.approx(stage["width"], abs=4)


def test_two_images_are_compared_by_wiping(page: Page) -> None:
    for seed in ("1", "2"):
        page.get_by_label("Seeds", exact=True).fill(seed)
        page.get_by_label("Seeds", exact=True).press("Enter")
        settled(page)
        make(page)
    view(page, "Gallery")
    page.get_by_text("Compare two images by wiping").click()
    divider = page.get_by_label("Divider between the two images")
    divider.focus()
    settled(page)
    frame = page.locator(".wipe")
    half = frame.screenshot()
    for _ in range(3):
        page.keyboard.press("PageDown")
    assert frame.evaluate("frame => frame.style.getPropertyValue('--at')") == "20%"
    assert frame.screenshot() != half


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a second loopback address without asking for it")
def test_other_addresses_are_refused(address: str) -> None:
    port = int(address.rpartition(":")[2])
    socket.create_connection(("localhost", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


# --- images to start from ---


def test_an_image_is_dropped_painted_over_and_repainted_there_alone(page: Page, tmp_path: Path) -> None:
    given = Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB")
    given.save(tmp_path / "room.png")
    page.get_by_text("Start from an image").click()
    dropzones = page.locator('[data-testid="stFileUploaderDropzoneInput"][accept*=".webp"]')
    dropzones.first.set_input_files(str(tmp_path / "room.png"))
    settled(page)
    page.get_by_role("radio", name="What you paint").click()
    settled(page)
    expect(page.get_by_text("Paint over the part that is to change")).to_be_visible()
    layer = page.get_by_role("img", name="What you paint changes")
    expect(layer).to_be_visible()
    for y in (0.1, 0.2, 0.3, 0.4, 0.5):
        drag(page, (0.05, y), (0.95, y))
    expect(page.get_by_text("Paint over the part that is to change")).to_have_count(0)
    make(page)
    record = read_record(downloaded(page, tmp_path / "made.png"))
    assert record.run.scene.mask_image is not None
    before, after = (np.asarray(image).astype(int) for image in (given, read_pixels(tmp_path / "made.png")))
    assert (before - after)[: SIZE * 15 // 32].any()
    assert not (before - after)[SIZE * 45 // 64 :].any()


def unfolded(page: Page, field: Locator) -> None:
    """Unfolds the list of a field; the page's first rerun may fold it again."""
    for _ in range(5):
        field.click()
        page.wait_for_timeout(1000)
        if page.get_by_role("option").count():
            return
        page.keyboard.press("Escape")
    raise AssertionError("the list stays folded")


def test_loras_are_merged_into_a_file_that_is_a_concept_as_well(page: Page, tmp_path: Path) -> None:
    view(page, "Merge")
    chooser = page.get_by_role("combobox", name="LoRAs to merge")
    for name in ("cat (sks cat)", f"{STYLE} ({STYLE_WORDS})"):
        unfolded(page, chooser)
        page.get_by_role("option", name=name, exact=True).click()
        settled(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Merge", exact=True).click()
    expect(page.get_by_text(f"cat+{STYLE}-cat.safetensors holds")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the LoRA").click()
    assert download.value.suggested_filename == f"cat+{STYLE}-cat.safetensors"
    download.value.save_as(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_compose.merge"])["method"] == "cat"
    page.get_by_role("button", name="Use as a concept").click()
    settled(page)
    expect(page.get_by_role("textbox", name="Trigger").last).to_have_value("sks")
