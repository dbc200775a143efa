"""Costs of methods relative to the plain pipeline: computed, and measured."""
