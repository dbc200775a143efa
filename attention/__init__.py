"""How LoRAs and attention are steered inside one UNet call.

This package knows torch and diffusers' attention, and nothing of prompts, methods or pipelines.
"""

from attention.gates import Gates
from attention.install import Installation, check_free, install, installed_layers
from attention.layers import AttentionLayer, attention_layers, grid_at, map_level, places
from attention.lora_bank import Lora, LoraFactors
from attention.recorder import Recorder

__all__ = [
    "AttentionLayer",
    "Gates",
    "Installation",
    "Lora",
    "LoraFactors",
    "Recorder",
    "attention_layers",
    "check_free",
    "grid_at",
    "install",
    "installed_layers",
    "map_level",
    "places",
]
