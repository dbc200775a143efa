"""lora-compose: several concept LoRAs in one image, every one with its own identity.

Everything is imported under this one name, so that it gets along with projects that have a `pipelines` or `attention`
of their own. In a clone the three folders stand at its top, and this package links to them. Where git has made text
files of the links, as on Windows, or ComfyUI's registry empty folders, it looks for the folders at the top itself.

Names are imported when they are first used: torch, diffusers and transformers take seconds, and `lora-compose --help`
needs none of them.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "compose/__init__.py").is_file():
    __path__.append(str(Path(__file__).resolve().parents[1]))

from lora_compose.compose.support.version import __version__

if TYPE_CHECKING:
    from lora_compose.pipelines.calls.call_plan import CallPlan, PlannedConcept
    from lora_compose.pipelines.calls.refine import Detailer, Refined, refine, subject_masks
    from lora_compose.pipelines.concepts.loading import LoraError
    from lora_compose.pipelines.control.spec import Control
    from lora_compose.pipelines.families import ComposePipeline
    from lora_compose.pipelines.images.output import ComposeOutput, Cost
    from lora_compose.pipelines.methods import (
        METHODS,
        PRESETS,
        Clora,
        Composite,
        Draft,
        FreeFuse,
        LoraComposer,
        Merge,
        Regional,
        Switch,
        Tara,
        make_method,
    )
    from lora_compose.pipelines.scene.scene import Concept, Run, Scene

__all__ = [
    "METHODS",
    "PRESETS",
    "CallPlan",
    "Clora",
    "ComposeOutput",
    "ComposePipeline",
    "Composite",
    "Concept",
    "Control",
    "Cost",
    "Detailer",
    "Draft",
    "FreeFuse",
    "LoraComposer",
    "LoraError",
    "Merge",
    "PlannedConcept",
    "Refined",
    "Regional",
    "Run",
    "Scene",
    "Switch",
    "Tara",
    "__version__",
    "make_method",
    "refine",
    "subject_masks",
]

_MODULES = {
    "calls.call_plan": ("CallPlan", "PlannedConcept"),
    "concepts.loading": ("LoraError",),
    "control.spec": ("Control",),
    "families": ("ComposePipeline",),
    "methods": (
        "METHODS", "PRESETS", "Clora", "Composite", "Draft", "FreeFuse", "LoraComposer", "Merge", "Regional", "Switch",
        "Tara", "make_method",
    ),
    "images.output": ("ComposeOutput", "Cost"),
    "calls.refine": ("Detailer", "Refined", "refine", "subject_masks"),
    "scene.scene": ("Concept", "Run", "Scene"),
}  # fmt: skip
_HOME = {name: f"{__name__}.pipelines.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOME[name]), name)
    globals()[name] = found  # so that the next use comes here no more
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
