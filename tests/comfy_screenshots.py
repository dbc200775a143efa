"""A workflow in ComfyUI's own front end, with an image of the small world.

`COMFYUI_PATH=... PYTHONPATH=tests python -m comfy_screenshots docs/images` writes comfyui.png.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from browsing import CHROMIUM, FLAGS
from comfy_server import TESTS, checkout, serving

PATIENCE = 300_000  # milliseconds
CHANGES: dict[str, list[Any]] = {
    "CheckpointLoaderSimple": [],
    "LoraComposeBoxes": ["0,0.1,0.5,0.9\n0.5,0.1,1,0.9"],
    "LoraComposeCompose": ["a xlo bear and a qrt robot on sand", "regional", "shared"],
    "CLIPTextEncode": [""],
    "EmptyLatentImage": [128, 128, 1],
    "KSampler": [2, "fixed", 16, 4.0, "euler", "simple", 1.0],
}
SHOW = """graph => {
    const canvas = window.app.canvas, nodes = window.app.graph.nodes
    const left = Math.min(...nodes.map(one => one.pos[0])), top = Math.min(...nodes.map(one => one.pos[1]))
    const right = Math.max(...nodes.map(one => one.pos[0] + one.size[0]))
    canvas.ds.scale = 1560 / (right - left)
    canvas.ds.offset = [90 / canvas.ds.scale - left, 120 / canvas.ds.scale - top]
    canvas.setDirty(true, true)
}"""


def small_world() -> dict[str, Any]:
    """The example with boxes, with the small world's model and LoRAs."""
    graph = json.loads((TESTS.parent / "docs/comfyui/two-in-boxes.json").read_text(encoding="utf-8"))
    concepts = iter([("bear", "xlo"), ("robot", "qrt")])
    for node in graph["nodes"]:
        node["widgets_values"] = CHANGES.get(node["type"], node["widgets_values"])
        if node["type"] == "LoraComposeConcept":
            name, trigger = next(concepts)
            node["widgets_values"] = [f"world/{name}.safetensors", trigger, name, 1.0, "", ""]
        if node["type"] == "CheckpointLoaderSimple":
            node |= {"type": "SmallWorld", "properties": {"Node name for S&R": "SmallWorld"}}
        if node["type"] == "SaveImage":
            node["size"] = [400, 440]
    return graph


def main(out: Path) -> None:
    """Opens the workflow, runs it, and writes what is to be seen."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(checkout(Path(folder))) as (address, ask),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": 1680, "height": 700}).new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_function("window.app && window.app.graph && window.app.canvas")
        page.wait_for_timeout(10_000)  # it opens a workflow of its own first, and shows its templates
        page.keyboard.press("Escape")
        page.evaluate("graph => window.app.loadGraphData(graph)", small_world())
        page.evaluate("() => window.app.queuePrompt(0)")
        while not (history := ask("history")):
            page.wait_for_timeout(1_000)
        (run,) = history.values()
        assert run["status"]["status_str"] == "success", run["status"]
        page.evaluate(SHOW)
        page.wait_for_timeout(5_000)
        page.screenshot(path=out / "comfyui.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
