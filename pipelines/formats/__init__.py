"""LoRA files as trainers write them: what their keys say, which layers they mean, which change they make.

    files.py      a file on disk -> checked tensors with their metadata
    keys.py       one key -> part of the pipeline, layer as spelled, and what the tensor is
    names.py      a model -> every spelling under which files know its layers
    deltas.py     the tensors of one layer -> low-rank factors, exactly or with a known error
    layers.py     the keys of a file gathered by layer
    alphas.py     how strongly a layer's factors act
    recognise.py  all keys of a file -> who writes such files, and for which family of models
    lora_writer.py         factors -> keys and tensors of an ordinary LoRA file
    safetensors_writer.py  tensors -> a file, one at a time

`pipelines.loading` brings a file and a model together.
"""
