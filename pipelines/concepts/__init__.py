"""Concepts and their LoRAs: finding and loading files, weights, bundled words, and a pipeline's library."""
