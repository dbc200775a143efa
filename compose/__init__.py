"""lora-compose: several concept LoRAs in one image, every one with its own identity."""

from importlib.metadata import PackageNotFoundError, version

from pipelines.base import ComposePipeline
from pipelines.control import Control
from pipelines.loading import LoraError
from pipelines.methods import METHODS, Composite, Merge, Regional, Switch, Tara
from pipelines.output import ComposeOutput, Cost
from pipelines.scene import Concept, Run, Scene

try:
    __version__ = version("lora-compose")
except PackageNotFoundError:  # run from a clone that has not been installed
    __version__ = "0.0.0"

__all__ = [
    "METHODS",
    "ComposeOutput",
    "ComposePipeline",
    "Composite",
    "Concept",
    "Control",
    "Cost",
    "LoraError",
    "Merge",
    "Regional",
    "Run",
    "Scene",
    "Switch",
    "Tara",
    "__version__",
]
