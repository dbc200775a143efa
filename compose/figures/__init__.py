"""Figures drawn from images: attention over them, and sheets of them."""
