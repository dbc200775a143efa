"""select.py MODEL OUT N PROMPT...: two rows for each prompt: base images of seeds 0.., and of the best of four orders of their noise"""

import sys, torch, re
from PIL import Image
from safetensors.torch import save_file
from lora_compose import ComposePipeline
from lora_compose.pipelines.methods.draft import Draft, draft_only, _reordered
from lora_compose.pipelines.scene.division import separation
from lora_compose.attention.masks import smooth

torch.set_num_threads(1)
model, out, n, *prompts = sys.argv[1:]
n = int(n)
pipe = ComposePipeline.from_pretrained(model, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
k = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
save_file(
    {k + ".lora_A.weight": torch.zeros(1, 96) + 0.01, k + ".lora_B.weight": torch.zeros(96, 1)},
    "/tmp/drafts/zero.safetensors",
)
TRIG = ["sks", "zwx", "ohwx"]
W = Image.new("RGB", (n * 192, len(prompts) * 2 * 192))
kept = {}
opt = dict(num_inference_steps=25, guidance_scale=5.0)
for r, p in enumerate(prompts):
    body = re.sub(r" (on|in|at|underwater)\b.*", "", p)
    place = p[len(body) :]
    words = [x.split()[-1] for x in re.split(r", | and ", body)]
    for w, t in zip(words, TRIG):
        pipe.load_concept("/tmp/drafts/zero.safetensors", name=f"c{r}{t}", trigger=t, class_word=w)
    named = [f"a {t} {w}" for w, t in zip(words, TRIG)]
    prompt = (", ".join(named[:-1]) + " and " + named[-1]) + place
    first = [torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(s)) for s in range(n)]
    best = []
    for s in range(n):
        orders = [_reordered(first[s], k) for k in range(4)]
        maps = [
            draft_only(
                pipe, Draft(), prompt=prompt, concepts=[f"c{r}{t}" for _, t in zip(words, TRIG)], latents=o, **opt
            ).maps
            for o in orders
        ]
        sc = [separation(smooth(m[0]), words, 0.3) for m in maps]
        kept[p, s] = (sc, [m.half() for m in maps])
        b = max(range(4), key=sc.__getitem__)
        best.append(orders[b])
        print(p, s, b, ["%.2f" % x for x in sc], flush=True)
    for q, lat in enumerate((first, best)):
        im = pipe(p, num_images_per_prompt=n, latents=torch.cat(lat), **opt).images
        for c, i in enumerate(im):
            W.paste(i, (c * 192, (2 * r + q) * 192))
    W.save(out + ".png")
    torch.save(kept, out + ".pt")
