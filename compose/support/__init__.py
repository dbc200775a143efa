"""Helpers that all other folders share."""
