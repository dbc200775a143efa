"""A checkpoint of the UNet that goes on after so many minutes."""
import sys, torch
from pathlib import Path
from diffusers import StableDiffusionPipeline
from recipe.unet import UNetTrainer
from recipe.clock import Clocked
from recipe.loop import keep
init, out, minutes = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
pipe = StableDiffusionPipeline.from_pretrained(init, dtype=torch.float32, safety_checker=None)
c = Clocked(UNetTrainer(pipe, 0.01, 1)); c.seconds = 60*minutes
keep(out, c.state_dict())
