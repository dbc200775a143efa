"""How the playground is made. In a clone only: nothing here is needed to use it, and the wheel leaves it out."""
