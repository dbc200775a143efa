"""How the small models of `assets/` are made, from artwork to LoRAs; README.md here has the commands."""
