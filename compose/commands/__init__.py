"""What people type: one module per command, with its options and help, and everything that is checked at once.

Nothing here imports torch, diffusers or transformers when it is imported, so that help and mistakes take no time. What
needs them is imported by a command when it starts to work (`starting`).
"""
