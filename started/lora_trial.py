"""lora_trial.py MODEL OUT NAME key=value..."""

import sys, time, torch
from pathlib import Path
from lora_compose.compose.training import TaraTraining, Training, train
from recipe.loras import WORDS

model, out, name, *kv = sys.argv[1:]
given = {}
for e in kv:
    k, v = e.split("=")
    try:
        v = int(v)
    except ValueError:
        try:
            v = float(v)
        except ValueError:
            pass
    given[k] = v
prior = given.pop("prior", 1)
if given.pop("tara", 0):
    given["tara"] = TaraTraining()
t, c = WORDS[name]
s = Training.preset(
    "playground",
    images=Path("references") / name,
    class_images=Path("prior") / c if prior and name != "ink" else None,
    class_count=0,
    trigger=t,
    class_word=c,
    model=model,
    out=Path(out),
    threads=1,
    **given,
)
ls = []
st = time.process_time()


def on(step, loss):
    ls.append(loss)
    if step % 50 == 0:
        print(step, f"{sum(ls) / len(ls):.4f} {time.process_time() - st:.0f}s", flush=True)
        ls.clear()


print(s, flush=True)
train(s, on_step=on, overwrite=True)
