"""Checks a run without denoising."""
