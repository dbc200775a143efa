"""LoRA files as such: without making an image."""
