"""Workflows in ComfyUI's own front end, with images of the small world.

`COMFYUI_PATH=... PYTHONPATH=tests python -m comfy_screenshots docs/images [NAME ...]` writes comfyui.png and others.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from browsing import CHROMIUM, FLAGS
from comfy_server import TESTS, Ask, checkout, serving
from small_world import SIZE

PATIENCE = 300_000  # milliseconds
WIDTH = 1680
PICTURES = {
    "comfyui": "two-in-boxes",
    "comfyui-style": "two-and-a-style",
    "comfyui-three": "three-in-boxes",
    "comfyui-refined": "refined",
}
"""The example that each picture shows."""
LORAS = {"cat": ("bear", "xlo"), "dog": ("robot", "qrt"), "bird": ("cat", "sks"), "style": ("rabbit", "")}
"""What stands for the LoRAs of the examples. The small world has no style; another subject at a low weight does."""
TEXTS = {
    2: "a xlo bear and a qrt robot on sand",
    3: "a xlo bear and a qrt robot and a sks cat on sand",
}
"""By the number of subjects."""
SAMPLED = [2, "fixed", 16, 4.0, "euler", "simple"]
CHANGES: Mapping[str, list[Any]] = {
    "CheckpointLoaderSimple": [],
    "CLIPTextEncode": [""],
    "EmptyLatentImage": [SIZE, SIZE, 1],
    "KSampler": [*SAMPLED, 1.0],
    "LoraComposeDraftPreview": SAMPLED,
}
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
    subjects = sum(bool(node["widgets_values"][1]) for node in graph["nodes"] if node["type"] == "LoraComposeConcept")
    for node in graph["nodes"]:
        values = node["widgets_values"] = [*CHANGES.get(node["type"], node["widgets_values"])]
        if node["type"] == "LoraComposeConcept":
            name, trigger = LORAS[Path(values[0]).stem]
            values[:4] = [f"world/{name}.safetensors", trigger, name if trigger else "", 1.0 if trigger else 0.3]
        if node["type"] == "LoraComposeBoxes" and subjects == 2:
            values[0] = "0,0.1,0.5,0.9\n0.5,0.1,1,0.9"
        if node["type"] == "LoraComposeCompose":
            values[0], values[2] = TEXTS[subjects], "shared"
        if node["type"] == "LoraComposeRefine":
            values[:8] = [TEXTS[subjects], SIZE, *SAMPLED]
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
    page.screenshot(path=out)


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
