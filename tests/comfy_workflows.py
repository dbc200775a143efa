"""The example workflows of the nodes, and what the nodes of ComfyUI in them are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (
    "two-in-boxes", "two-without-boxes", "texts-of-regions", "beside-a-bystander", "two-and-a-style", "three-in-boxes",
    "refined",
)  # fmt: skip
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def _node(outputs: tuple[str, ...], **inputs: str) -> dict[str, Any]:
    options = {name: {"control_after_generate": True} if name == "seed" else {} for name in inputs}
    required = {name: [kind, options[name]] for name, kind in inputs.items()}
    return {
        "input": {"required": required}, "input_order": {"required": [*inputs]},
        "output": [*outputs], "output_name": [*outputs],
    }  # fmt: skip


CORE_NODES: Mapping[str, Any] = {
    "CheckpointLoaderSimple": _node(("MODEL", "CLIP", "VAE"), ckpt_name="COMBO"),
    "CLIPTextEncode": _node(("CONDITIONING",), text="STRING", clip="CLIP"),
    "EmptyLatentImage": _node(("LATENT",), width="INT", height="INT", batch_size="INT"),
    "KSampler": _node(
        ("LATENT",), model="MODEL", seed="INT", steps="INT", cfg="FLOAT", sampler_name="COMBO", scheduler="COMBO",
        positive="CONDITIONING", negative="CONDITIONING", latent_image="LATENT", denoise="FLOAT",
    ),
    "VAEDecode": _node(("IMAGE",), samples="LATENT", vae="VAE"),
    "SaveImage": _node((), images="IMAGE", filename_prefix="STRING"),
}  # fmt: skip
"""Nodes of ComfyUI in the examples, as its server tells them."""


def example(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"docs/comfyui/{name}.json").read_text(encoding="utf-8"))


def as_asked(drawn: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A workflow as it is drawn, as the server is asked for it; checked against what the nodes say of themselves."""
    links = {link[0]: link for link in drawn["links"]}
    types = {node["id"]: node["type"] for node in drawn["nodes"]}
    asked = {}
    for node in drawn["nodes"]:
        about, values, inputs = known[node["type"]], iter(node["widgets_values"]), {}
        slots = iter(enumerate(node["inputs"]))
        for side in ("required", "optional"):
            for name in about["input_order"].get(side, ()):
                kind, *more = about["input"][side][name]
                options = more[0] if more else {}
                if isinstance(kind, list) or kind in WIDGETS:
                    inputs[name] = value = next(values)
                    choices = kind if isinstance(kind, list) else options.get("options")
                    assert choices is None or value in choices, (node["type"], name)
                    assert (
                        options.get("min", -1e99) <= value <= options.get("max", 1e99) if kind in WIDGETS[:2] else True
                    )
                    if options.get("control_after_generate"):
                        assert next(values) in ("fixed", "randomize", "increment", "decrement")
                    continue
                slot, found = next(slots)
                assert (found["name"], found["type"]) == (name, kind), node["type"]
                if found["link"] is None:
                    assert side == "optional", (node["type"], name)
                    continue
                _, start, output, end, at, of = links.pop(found["link"])
                assert (end, at, of) == (node["id"], slot, kind)
                assert known[types[start]]["output"][output] == kind
                (sender,) = (one for one in drawn["nodes"] if one["id"] == start)
                assert found["link"] in sender["outputs"][output]["links"]
                inputs[name] = [start, output]
        assert not [*values], node["type"]
        assert not [*slots], node["type"]
        shown = [(output["name"], output["type"]) for output in node["outputs"]]
        named = [*zip(about["output_name"], about["output"], strict=True)]
        assert shown == named[: len(shown)], "newer versions may have further outputs"
        asked[node["id"]] = {"class_type": node["type"], "inputs": inputs}
    assert not links
    return asked
