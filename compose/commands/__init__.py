"""The commands: one module each, with its options, its help and the checks that need no torch.

Importing a module does not import torch, diffusers or transformers, so help and mistakes are shown at once. A command
imports what it needs when it starts to work (`starting`).
"""
