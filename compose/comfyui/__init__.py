"""Concepts inside ComfyUI: LoRAs that act where they should, in its own models and samplers, in one pass.

`families` knows the layers of a model, `files` reads LoRAs by ComfyUI's names of layers, `tokens` finds words by its
tokenizers, `composition` makes gates of concepts and a method, `host` puts them into a model while ComfyUI samples with
it, `nodes` is what people connect, and `installing` writes the folder in custom_nodes that imports it. `host` and
`nodes` import ComfyUI, and run inside it alone.
"""
