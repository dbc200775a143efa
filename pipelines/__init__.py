"""What one image needs: scenes, tokens, LoRA files, methods, the denoising loop and the pipeline classes."""

import logging

# Without torchvision, transformers says that it falls back to Pillow for image processors, which only the safety
# checker uses. It would stand above everything that we say.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
