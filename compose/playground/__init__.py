"""The playground: a small model with concepts and a judge. `recipe` shows how it was made."""
