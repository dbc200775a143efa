"""diffusers opens a model with lora-compose through this file.

    DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="assets/custom_pipeline", trust_remote_code=True)

A hub repository with this file works as `custom_pipeline="OWNER/NAME"`. lora-compose has to be installed.
"""

from lora_compose.pipelines.families.custom import CustomComposePipeline

__all__ = ["CustomComposePipeline"]
