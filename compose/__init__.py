"""What people use: command line, files, benchmark, evaluation, training, page, and the playground.

Imports go one way, from a folder to those before it:
support, playground, files, figures, generate, batch, serve, benchmark, lora, check, evaluation, training, page,
comfyui, commands, then `cli`.
"""
