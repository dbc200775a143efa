"""Concepts inside ComfyUI: LoRAs that act where they should, in its own models and samplers, in one pass.

What people give becomes a composition: `files` reads LoRAs by ComfyUI's names of layers, `weights` and `tokens` find
words as its tokenizers do, and `concepts` makes a `composition` of both by a method. `hooks` puts that into a model
while ComfyUI samples with it; `families` knows the model's layers, `steering` acts on its attention, and `memory` lets
ComfyUI move the factors. `composing` does all this for the nodes.

`refining` repaints subjects, `merging` merges files, and `showing` makes images and text of results. `nodes` and
`file_nodes` are what people connect, with the words of `words`; `entry` gives them to ComfyUI if that has what is
`needed`, and `installing` writes the folder in custom_nodes that imports it. `hooks`, `composing` and nodes import
ComfyUI, and run inside it alone.
"""
