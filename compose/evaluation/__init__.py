"""Batch evaluation: many scenes, seeds and methods, scored, with intervals and cost."""
