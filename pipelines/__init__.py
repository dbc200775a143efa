"""What one image needs: scenes, tokens, LoRA files, methods, the denoising loop and the pipeline classes."""

import importlib

from transformers.utils import logging as _logging

# Without torchvision, transformers tells at this import that it falls back to Pillow for image processors, which only
# the safety checker uses. It would stand above everything that we say.
_verbosity = _logging.get_verbosity()
_logging.set_verbosity_error()
importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
_logging.set_verbosity(_verbosity)
