"""lora-compose: several concept LoRAs in one image, every one with its own identity.

Everything is imported under this one name, so that it gets along with projects that have a `pipelines` or `attention`
of their own. In a clone the three folders stand at its top, and this package links to them.
"""

from lora_compose.compose.support.version import __version__
from lora_compose.pipelines import families  # noqa: F401 (makes the model families known)
from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.concepts.loading import LoraError
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.methods import (
    METHODS,
    PRESETS,
    Clora,
    Composite,
    Draft,
    LoraComposer,
    Merge,
    Regional,
    Switch,
    Tara,
    make_method,
)
from lora_compose.pipelines.output import ComposeOutput, Cost
from lora_compose.pipelines.scene import Concept, Run, Scene

__all__ = [
    "METHODS",
    "PRESETS",
    "Clora",
    "ComposeOutput",
    "ComposePipeline",
    "Composite",
    "Concept",
    "Control",
    "Cost",
    "Draft",
    "LoraComposer",
    "LoraError",
    "Merge",
    "Regional",
    "Run",
    "Scene",
    "Switch",
    "Tara",
    "__version__",
    "make_method",
]
