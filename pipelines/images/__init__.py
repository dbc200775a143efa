"""The images that a call starts from and those it returns."""
