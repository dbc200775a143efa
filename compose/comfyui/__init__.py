"""Concepts inside ComfyUI: LoRAs that act where they should, in its own models and samplers, in one pass.

`families` knows the layers of a model, `files` reads LoRAs by ComfyUI's names of layers, `tokens` finds words by its
tokenizers, `composition` makes gates of concepts and a method, `host` puts them into a model while ComfyUI samples with
it, `refining` repaints subjects, `merging` merges files, `nodes` and `file_nodes` are what people connect, and
`installing` writes the folder in custom_nodes that imports it. `host`, `composing` and nodes import ComfyUI, and run
inside it alone.
"""
