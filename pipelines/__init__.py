"""Everything that makes one image: scenes, tokens, LoRA files, methods, denoising loop and pipeline classes."""

import logging

# Without torchvision, transformers says that it falls back to Pillow for image processors, which only the safety
# checker uses. That warning would come before all messages of this package.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
