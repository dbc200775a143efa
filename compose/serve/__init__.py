"""A server of images: one model, many LoRA files, and requests of different concepts in one forward pass."""
