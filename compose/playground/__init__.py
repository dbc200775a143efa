"""How the playground was made: its world of emoji, and the models trained on it."""
