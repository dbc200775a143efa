"""Concepts and their LoRAs: files, weights, words of their own, and what a pipeline knows of them."""
