"""The models of a pipeline that a call claims."""

from typing import Any

from torch import nn

from lora_compose.pipelines.concepts.loading import TEXT_ENCODERS


def models_of(pipe: Any) -> list[nn.Module]:
    """The models of a pipeline that calls with concepts change."""
    every = [pipe.model, *(getattr(pipe, name, None) for name in TEXT_ENCODERS)]
    return [model for model in every if isinstance(model, nn.Module)]
