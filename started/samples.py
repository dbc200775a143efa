"""Rows of a model's images: samples.py MODEL OUT SEEDS PROMPT..."""

import sys, torch
from PIL import Image
from lora_compose import ComposePipeline

torch.set_num_threads(1)
model, out, n, *prompts = sys.argv[1:]
pipe = ComposePipeline.from_pretrained(model, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
n = int(n)
W = Image.new("RGB", (n * 192, len(prompts) * 192))
for r, p in enumerate(prompts):
    im = pipe(
        p,
        num_inference_steps=25,
        guidance_scale=5.0,
        num_images_per_prompt=n,
        generator=[torch.Generator().manual_seed(s) for s in range(n)],
    ).images
    for c, i in enumerate(im):
        W.paste(i, (c * 192, r * 192))
W.save(out)
