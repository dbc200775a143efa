"""One pipeline class per model family; importing this package makes them known to `ComposePipeline`."""

from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.families.flux import ComposeFluxPipeline
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline

__all__ = [
    "ComposeFluxPipeline",
    "ComposePipeline",
    "ComposeStableDiffusionPipeline",
    "ComposeStableDiffusionXLPipeline",
]
