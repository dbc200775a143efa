"""Reading and writing LoRA files: their keys, the layers they name, and the change of each layer.

    files.py      a file on disk -> checked tensors with their metadata
    keys.py       one key -> part of the pipeline, layer as spelled, and what the tensor is
    names.py      a model -> every name that files use for its layers
    kinds/        one file for each kind of LoRA: the tensors of one layer -> the change that they are
    change.py     a change as low-rank factors, exactly or with a known error
    layers.py     the keys of a file grouped by layer
    alphas.py     alpha / rank of each layer
    recognise.py  all keys of a file -> the tool that wrote it, and the model family it is for
    lora_writer.py         factors -> keys and tensors of an ordinary LoRA file
    safetensors_writer.py  tensors -> a file, one at a time

`pipelines/concepts/loading.py` matches a file with a model.
"""
