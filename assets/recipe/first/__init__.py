"""How playground-flux was made. Only in a clone: nothing here is needed to use it, and the wheel leaves it out."""
