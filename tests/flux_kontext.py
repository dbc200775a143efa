"""A small FLUX.1 Kontext pipeline of real components, which are those of FLUX.1."""

from dataclasses import replace
from functools import partial

from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline

from flux import FLUX, flux_pipeline
from lora_compose.pipelines.families.flux_kontext import ComposeFluxKontextPipeline

KONTEXT = replace(
    FLUX,
    pipeline=partial(flux_pipeline, ComposeFluxKontextPipeline),
    plain=FluxKontextPipeline,
    guided={**FLUX.guided, "max_area": 128 * 128},
    unguided={**FLUX.unguided, "max_area": 128 * 128},
    image_tasks={True: FluxKontextInpaintPipeline},
)
