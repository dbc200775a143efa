"""From prompts to the text of a forward pass, and to the tokens of each concept."""
