"""What LoRA files are."""
