"""Workflows in ComfyUI's own front end, with images of the small world.

`COMFYUI_PATH=... PYTHONPATH=tests python -m comfy_screenshots docs/images [NAME ...]` writes comfyui.png and others.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from browsing import CHROMIUM, FLAGS
from comfy_server import TESTS, Ask, checkout, serving
from lora_compose.compose.comfyui.words import NO_LORA
from small_world import SIZE, words

PATIENCE = 300_000  # milliseconds
WIDTH = 1680
PICTURES = {
    "comfyui": "two-in-boxes",
    "comfyui-draft": "two-without-boxes",
    "comfyui-bystander": "beside-a-bystander",
    "comfyui-style": "two-and-a-style",
    "comfyui-three": "three-in-boxes",
    "comfyui-refined": "refined",
}
"""The example that each picture shows."""
LORAS = {"cat": "cat", "dog": "dog", "bird": "owl", "style": "ink"}
"""What stands for the LoRAs of the examples."""
TEXTS = {
    "beside-a-bystander": "a sks cat and a dog on grass",
    "two-and-a-style": "a sks cat and a zwx dog on grass in wfy style",
    "three-in-boxes": "a sks cat, a zwx dog and a klm owl on grass",
}
TEXT = "a sks cat and a zwx dog on grass"
"""Text of the other examples, in words that the small world knows."""
BOXES = {
    "two-in-boxes": "0,0.12,0.48,0.88\n0.52,0.12,1,0.88",
    "three-in-boxes": "0,0.1,0.32,0.9\n0.34,0.1,0.66,0.9\n0.68,0.1,1,0.9",
}
WIDTHS = {"three-in-boxes": 3 * SIZE // 2}
"""Width of images in pixels; SIZE of others."""
SEEDS = {"three-in-boxes": 1}
"""Seeds; 0 of others."""
GUIDANCE, STYLE = {"two-and-a-style": 4.0}, 0.5
"""Guidance, 5 of others; and the weight of the style: the small model is harsh where much acts in one place."""
SHOW = """width => {
    const canvas = window.app.canvas, nodes = window.app.graph.nodes
    const left = Math.min(...nodes.map(one => one.pos[0])), top = Math.min(...nodes.map(one => one.pos[1]))
    const right = Math.max(...nodes.map(one => one.pos[0] + one.size[0]))
    const bottom = Math.max(...nodes.map(one => one.pos[1] + one.size[1]))
    canvas.ds.scale = (width - 120) / (right - left)
    canvas.ds.offset = [90 / canvas.ds.scale - left, 120 / canvas.ds.scale - top]
    canvas.setDirty(true, true)
    return Math.ceil((bottom - top) * canvas.ds.scale)
}"""


def small_world(example: str) -> dict[str, Any]:
    """An example with the small world's model and LoRAs."""
    graph = json.loads((TESTS.parent / f"docs/comfyui/{example}.json").read_text(encoding="utf-8"))
    text = TEXTS.get(example, TEXT)
    sampled = [SEEDS.get(example, 0), "fixed", 25, GUIDANCE.get(example, 5.0), "euler", "sgm_uniform"]
    changes: Mapping[str, list[Any]] = {
        "CheckpointLoaderSimple": [], "CLIPTextEncode": [""], "KSampler": [*sampled, 1.0],
        "LoraComposeDraftPreview": sampled,
    }  # fmt: skip
    for node in graph["nodes"]:
        kind = node["type"]
        values = node["widgets_values"] = [*(changes[kind] if kind in changes else node["widgets_values"])]
        if node["type"] == "LoraComposeConcept" and values[0] != NO_LORA:
            name = LORAS[Path(values[0]).stem]
            values[0] = f"world/{name}.safetensors"
            if values[2]:
                values[1:3] = words(name)
            else:  # a style, whose words are in the text alone
                values[3] = STYLE
        if node["type"] == "LoraComposeBoxes":
            values[0] = BOXES[example]
        if node["type"] == "LoraComposeCompose":
            values[0], values[2] = text, "shared"
        if node["type"] == "LoraComposeRefine":
            values[:8] = [text, SIZE, *sampled]
        if node["type"] == "EmptyLatentImage":
            values[:] = [WIDTHS.get(example, SIZE), SIZE, 1]
        if node["type"] == "CheckpointLoaderSimple":
            node |= {"type": "SmallWorld", "properties": {"Node name for S&R": "SmallWorld"}}
        if node["type"] == "SaveImage":
            node["size"] = [400, 440]
    return graph


def shoot(page: Page, ask: Ask, example: str, out: Path) -> None:
    """Opens a workflow, runs it, and saves a screenshot of it."""
    before = len(ask("history"))
    page.set_viewport_size({"width": WIDTH, "height": 700})
    page.evaluate("graph => window.app.loadGraphData(graph)", small_world(example))
    page.evaluate("() => window.app.queuePrompt(0)")
    while len(history := ask("history")) == before:
        page.wait_for_timeout(1_000)
    last = [*history.values()][-1]
    assert last["status"]["status_str"] == "success", last["status"]
    page.set_viewport_size({"width": WIDTH, "height": max(700, 220 + page.evaluate(SHOW, WIDTH))})
    page.evaluate(SHOW, WIDTH)
    page.wait_for_timeout(10_000)  # until it no longer tells that the job is done
    shown = Image.open(BytesIO(page.screenshot())).convert("RGB")
    shown.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(out, optimize=True)


def main(out: Path, *names: str) -> None:
    """Writes the pictures of some names, or all."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(checkout(Path(folder))) as (address, ask),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": WIDTH, "height": 700}).new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_function("window.app && window.app.graph && window.app.canvas")
        page.wait_for_timeout(10_000)  # it opens a workflow of its own first, and shows its templates
        page.keyboard.press("Escape")
        for name in names or PICTURES:
            shoot(page, ask, PICTURES[name], out / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
