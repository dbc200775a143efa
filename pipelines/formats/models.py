"""The models of a pipeline that LoRAs change, by component name."""

from collections.abc import Mapping

from torch import nn

from lora_compose.pipelines.formats.keys import PARTS, Part

MODEL_PARTS: tuple[Part, ...] = ("unet", "transformer")
TEXT_ENCODERS: tuple[Part, ...] = ("text_encoder", "text_encoder_2", "text_conditioner")
Models = Mapping[Part, nn.Module]


def models_by_part(pipe: object) -> Models:
    """The models of a pipeline, or of anything that has them as attributes of diffusers' names."""
    return {part: model for part in PARTS if isinstance(model := getattr(pipe, part, None), nn.Module)}


def models_of(pipe: object) -> list[nn.Module]:
    """The models of a pipeline that calls with concepts change."""
    return list(models_by_part(pipe).values())


def model_part(pipe: object) -> Part:
    """The component that a pipeline's model is: "unet" or "transformer"."""
    return "transformer" if "transformer" in models_by_part(pipe) else "unet"
