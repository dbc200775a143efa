"""Rows of images of a LoRA alone: alone.py MODEL OUT SEEDS NAME=FILE..."""

import sys, torch
from PIL import Image
from lora_compose import ComposePipeline, Concept
from recipe.loras import WORDS

torch.set_num_threads(1)
model, out, n, *files = sys.argv[1:]
n = int(n)
W = Image.new("RGB", (n * 192, len(files) * 192))
for r, f in enumerate(files):
    name, path = f.split("=")
    pipe = ComposePipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    t, c = WORDS[name]
    pipe.load_concept(path, name, trigger=t, class_word=None if name == "ink" else c)
    places = [
        "on grass",
        "on a white background",
        "at night",
        "in snow",
        "on sand",
        "in a room",
        "in a forest",
        "underwater",
    ]
    im = []
    for s in range(n):
        p = f"a {t} {c} {places[s % 8]}" if name != "ink" else f"a cat {places[s % 8]} in {t} style"
        im += pipe(
            p, concepts=[name], num_inference_steps=25, guidance_scale=5.0, generator=torch.Generator().manual_seed(s)
        ).images
    for c_, i in enumerate(im):
        W.paste(i, (c_ * 192, r * 192))
W.save(out)
