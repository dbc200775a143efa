"""Training of concept LoRAs: `train(Training.preset("playground", images=..., out=..., trigger=..., ...))`."""

from lora_compose.compose.training.loop import DivergedError, Stopped, train
from lora_compose.compose.training.settings import PRESETS, TaraTraining, Training

__all__ = ["PRESETS", "DivergedError", "Stopped", "TaraTraining", "Training", "train"]
