"""Inspecting and merging LoRA files."""
