"""One pipeline class per model family; importing this package makes them known to `ComposePipeline`."""

from lora_compose.pipelines.families.anima import ComposeAnimaPipeline
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.call_help import describe_call
from lora_compose.pipelines.families.chroma import ComposeChromaPipeline
from lora_compose.pipelines.families.flux import ComposeFluxPipeline
from lora_compose.pipelines.families.flux2 import ComposeFlux2KleinPipeline
from lora_compose.pipelines.families.flux2_dev import ComposeFlux2Pipeline
from lora_compose.pipelines.families.flux3 import ComposeFlux3DistilledPipeline, ComposeFlux3Pipeline
from lora_compose.pipelines.families.flux_kontext import ComposeFluxKontextPipeline
from lora_compose.pipelines.families.ideogram4 import ComposeIdeogram4Pipeline
from lora_compose.pipelines.families.krea2 import ComposeKrea2Pipeline
from lora_compose.pipelines.families.qwen_image import ComposeQwenImagePipeline
from lora_compose.pipelines.families.qwen_image_edit import ComposeQwenImageEditPlusPipeline
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline
from lora_compose.pipelines.families.z_image import ComposeZImagePipeline

ComposePipeline.families += [
    ComposeAnimaPipeline, ComposeChromaPipeline, ComposeFluxPipeline, ComposeFlux2KleinPipeline, ComposeFlux2Pipeline,
    ComposeFlux3Pipeline, ComposeFlux3DistilledPipeline, ComposeFluxKontextPipeline, ComposeIdeogram4Pipeline,
    ComposeKrea2Pipeline, ComposeQwenImagePipeline, ComposeQwenImageEditPlusPipeline, ComposeStableDiffusionPipeline,
    ComposeStableDiffusionXLPipeline, ComposeZImagePipeline,
]  # fmt: skip

for _family in ComposePipeline.families:
    describe_call(_family)
