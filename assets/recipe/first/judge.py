"""The judge: a small CLIP that distinguishes the classes and coats of the emoji world.

    python -m recipe.first.judge train sprites.npz OUT   (an hour on two cores; resumes)
    python -m recipe.first.judge check OUT sprites.npz

It is trained with the contrastive loss of CLIP (Radford et al. 2021), in which every caption that is right about a
image counts as a match; with the same loss over all names that a crop can have ("a cat", "a part of a cat",
"nothing"), by which windows are named later; and with a supervised contrastive loss (Khosla et al. 2020) between
images of one identity: the same drawing in the same coat. Batches show classes in the same coats, so that neither
class nor coat alone will do. The coats of the playground's concepts never occur.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.evaluation.scoring import reference_crop
from lora_compose.compose.playground.assets import (
    PLAYGROUND_FLUX,
    playground_loras,
    playground_model,
    playground_references,
)
from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import echo
from recipe.first.judge_data import SIDE, Artist, Batch, Batches, names
from recipe.first.world import BASE_CLASSES, CONCEPTS, VENDORS, article
from recipe.loop import keep

WIDTH, LAYERS, HEADS = 160, 6, 5
TEXT_LAYERS = 3
IMAGE_TEMPERATURE = 0.1
EMA = 0.998

app = typer.Typer(help="Train and check the judge of the playground.", no_args_is_help=True)


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained judge."""
    tokens: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
    }
    text = {
        **shared, **tokens, "num_hidden_layers": TEXT_LAYERS, "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
    }  # fmt: skip
    vision = {**shared, "num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The processor of images and words."""
    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=half, image_std=half)
    return CLIPProcessor(images, tokenizer)


class Losses(NamedTuple):
    """Contrastive losses: images with captions, images with the name of what they show, images with images."""

    captions: Tensor
    names: Tensor
    pictures: Tensor


def losses_of(judge: CLIPModel, tokenizer: CLIPTokenizer, known: list[str], batch: Batch) -> Losses:
    """The losses of a batch; `known` are all names that an image can have."""
    ids = tokenizer([*batch.captions, *known], padding=True, truncation=True, return_tensors="pt")
    with cpu_autocast():
        output = judge(**ids, pixel_values=batch.pixels)
    images, texts = (F.normalize(side.float(), dim=-1) for side in (output.image_embeds, output.text_embeds))
    scale, number = judge.logit_scale.exp().clamp(max=50), len(batch.captions)
    logits = scale * images @ texts[:number].T
    captions = (_matches(logits, batch.truth) + _matches(logits.T, batch.truth.T)) / 2
    named = F.cross_entropy(scale * images @ texts[number:].T, batch.name, ignore_index=-1)
    labelled = batch.identity >= 0
    same = (batch.identity[labelled][:, None] == batch.identity[labelled][None]).float()
    itself = torch.eye(len(same), dtype=torch.bool)
    alike = (images[labelled] @ images[labelled].T / IMAGE_TEMPERATURE).masked_fill(itself, -1e4)
    return Losses(captions, named, _matches(alike, same.masked_fill(itself, 0)))


def _matches(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy to a target that is shared by all matches of a row; rows without any are left out."""
    some = truth.sum(1) > 0
    target = truth[some] / truth[some].sum(1, keepdim=True)
    return -(target * logits[some].log_softmax(1)).sum(1).mean()


def optimizers_of(judge: CLIPModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices of the layers, AdamW for the rest."""
    inner = [p for name, p in judge.named_parameters() if p.ndim == 2 and "embedding" not in name]
    chosen = {id(p) for p in inner}
    rest = [p for p in judge.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


@app.command()
def train(
    sprites: Path,
    out: Path,
    steps: Annotated[int, typer.Option(min=1)] = 1800,
    lr: float = 3e-3,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Trains the judge; a checkpoint next to OUT is written every 100 steps, and resumed."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = CLIPTokenizer.from_pretrained(playground_model(PLAYGROUND_FLUX) / "tokenizer")
    judge = new_judge(tokenizer)
    optimizers = optimizers_of(judge, lr)
    average = [p.detach().clone() for p in judge.parameters()]
    state, first = out.with_suffix(".state.pt"), 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        judge.load_state_dict(kept["judge"])
        for optimizer, known in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(known)
        first, average = kept["step"], kept["average"]
    vae = AutoencoderKL.from_pretrained(playground_model(PLAYGROUND_FLUX) / "vae", dtype=torch.float32).requires_grad_(
        False
    )
    artwork = dict(np.load(sprites))
    known_names = names(sorted({key.partition("/")[0] for key in artwork}))
    data = Batches(artwork, seed + first, vae)
    batches = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
    start, judge = time.perf_counter(), judge.train()
    for step in range(first, steps):
        rate = lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
        losses = losses_of(judge, tokenizer, known_names, next(batches))
        torch.stack(losses).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(judge.parameters()), 1 - min(EMA, (step + 1) / (step + 10)))
        if step % 50 == 0 or step == steps - 1:
            shown = " ".join(f"{name} {loss.item():.3f}" for name, loss in losses._asdict().items())
            echo(f"{step} {shown} {time.perf_counter() - start:.0f} s")
        if step % 100 == 99 or step == steps - 1:
            kept = {"judge": judge.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            keep(state, {**kept, "average": average, "step": step + 1})
    save(judge, average, tokenizer, out)


def save(judge: CLIPModel, average: list[Tensor], tokenizer: CLIPTokenizer, out: Path) -> None:
    """Writes the averaged weights in fp16, with tokenizer and image processor."""
    with torch.no_grad():
        for parameter, mean in zip(judge.parameters(), average, strict=True):
            parameter.copy_(mean)
    judge.half().save_pretrained(out)
    processor(tokenizer).save_pretrained(out)


@app.command()
def check(judge: Path, sprites: Path, pictures: Annotated[int, typer.Option(min=1)] = 2000) -> None:
    """Prints how well a judge recognises crops that it has never seen."""
    encoder, artist = load_encoder(str(judge)), Artist(dict(np.load(sprites)), seed=10**6)
    shown = [
        (name, path)
        for name in playground_loras(PLAYGROUND_FLUX)
        for path in playground_references(name, PLAYGROUND_FLUX)
    ]
    concepts = [name for name, _ in shown]
    crops = encoder.images([reference_crop(path) for _, path in shown])
    right = nearest(crops, concepts)
    echo(f"reference crops nearest to their own concept: {sum(right)} of {len(right)}")
    labels = [label for _ in range(pictures // 36 + 1) for label in artist.identities()][:pictures]
    fresh = encoder.images([Image.fromarray(artist.view(label)[0]) for label in labels])
    for what, classes in (("the base model's", list(BASE_CLASSES)), ("all", artist.names)):
        words = encoder.texts([article(name) for name in classes])
        named = [classes[i] for i in (crops @ words.T).argmax(1)]
        hits = sum(CONCEPTS[concept].class_word == name for concept, name in zip(concepts, named, strict=True))
        echo(f"reference crops named right among {what} {len(classes)} classes: {hits} of {len(named)}")
        for vendor in VENDORS:
            mine = [i for i, label in enumerate(labels) if label.vendor == vendor and label.name in classes]
            named = [classes[i] for i in (fresh[mine] @ words.T).argmax(1)]
            share = np.mean([labels[i].name == name for i, name in zip(mine, named, strict=True)])
            echo(f"fresh crops of {vendor} named right among them: {100 * share:.1f} % of {len(mine)}")


def nearest(images: Tensor, concepts: Sequence[str]) -> list[bool]:
    """Whether each image is closer, on average, to the others of its concept than to those of any other concept."""
    similarity = images @ images.T
    groups = {name: torch.tensor([concept == name for concept in concepts]) for name in dict.fromkeys(concepts)}
    right = []
    for i, concept in enumerate(concepts):
        others = torch.arange(len(concepts)) != i
        means = {name: similarity[i][mask & others].mean().item() for name, mask in groups.items()}
        right.append(max(means, key=lambda name: means[name]) == concept)
    return right


if __name__ == "__main__":
    app()
