"""The judge: a small CLIP that names the classes of the small world and tells its characters apart.

    PYTHONPATH=assets python -m recipe.judge train drawings.npz OUT --vae VAE --tokenizer TOKENIZER --minutes 60
    PYTHONPATH=assets python -m recipe.judge check OUT drawings.npz
    PYTHONPATH=assets python -m recipe.judge count OUT assets/playground/references

It is trained with the contrastive loss of CLIP (Radford et al. 2021), in which every caption that is right about an
image counts as a match; with the same loss over all names that a crop can have ("a cat", "a part of a cat",
"nothing"), by which windows are named later; and with a supervised contrastive loss (Khosla et al. 2020) between
images of one identity. It has seen the characters as their artists drew them, never an image of a denoiser.
"""

import time
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

from lora_compose.compose.evaluation.detectors import WindowDetector
from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import echo, handle_errors
from lora_compose.pipelines.scene.mask_images import open_image
from recipe.judge_data import NAMES, SIDE, Artist, JudgeBatch, JudgeBatches
from recipe.loop import keep, resume, share
from recipe.world import CHARACTERS, CLASSES, article

WIDTH, LAYERS, HEADS = 160, 6, 5
TEXT_LAYERS = 3
IMAGE_TEMPERATURE = 0.1
EMA = 0.998
EVERY = 50  # steps between two lines of progress, and two checkpoints
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)

app = typer.Typer(help="Train and check the judge of the small world.", no_args_is_help=True)


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained judge."""
    tokens: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    shared = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS, "projection_dim": WIDTH,
    }  # fmt: skip
    text = {
        **shared, **tokens, "num_hidden_layers": TEXT_LAYERS, "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
    }  # fmt: skip
    vision = {**shared, "num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The processor of images and words."""
    half, size = [0.5, 0.5, 0.5], {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=half, image_std=half)
    return CLIPProcessor(images, tokenizer)


class Losses(NamedTuple):
    """Contrastive losses: images with captions, images with the name of what they show, images with images."""

    captions: Tensor
    names: Tensor
    pictures: Tensor


def losses_of(judge: CLIPModel, tokenizer: CLIPTokenizer, batch: JudgeBatch) -> Losses:
    """The losses of a batch."""
    ids = tokenizer([*batch.captions, *NAMES], padding=True, truncation=True, return_tensors="pt")
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


class JudgeTrainer:
    """A judge with its optimizers, and the running average of its weights.

    Args:
        judge: Trained in place.
        tokenizer: Its words.
        lr: Peak learning rate of both optimizers.
    """

    def __init__(self, judge: CLIPModel, tokenizer: CLIPTokenizer, lr: float) -> None:
        self.judge, self.tokenizer, self.lr = judge.train(), tokenizer, lr
        inner = [p for name, p in judge.named_parameters() if p.ndim == 2 and "embedding" not in name]
        chosen = {id(p) for p in inner}
        rest = [p for p in judge.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(inner, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self.average = [p.detach().clone() for p in judge.parameters()]
        self.step, self.seconds = 0, 0.0

    def learn(self, batch: JudgeBatch, share: float) -> float:
        """One step with a share of the learning rate; returns the sum of the losses."""
        loss = torch.stack(losses_of(self.judge, self.tokenizer, batch)).sum()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.lr * share
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        kept = min(EMA, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.judge.parameters()], 1 - kept)
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume."""
        own = {"step": self.step, "seconds": self.seconds, "average": self.average}
        return own | {"judge": self.judge.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes."""
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        self.judge.load_state_dict(state["judge"])
        for optimizer, known in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(known)

    @torch.no_grad()
    def save(self, out: Path) -> None:
        """Writes the averaged weights in fp16, with tokenizer and image processor; training is over."""
        for parameter, mean in zip(self.judge.parameters(), self.average, strict=True):
            parameter.copy_(mean)
        self.judge.half().save_pretrained(out)
        processor(self.tokenizer).save_pretrained(out)


@app.command()
@handle_errors()
def train(
    artwork: Path,
    out: Path,
    vae: Annotated[Path, typer.Option(help="For its artefacts.")],
    tokenizer: Annotated[Path, typer.Option(help="Its words.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Of computing, in all.")] = 60,
    lr: float = 3e-3,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Trains the judge; a checkpoint next to OUT is resumed."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    trainer, checkpoint = JudgeTrainer(new_judge(words), words, lr), out.with_suffix(".state.pt")
    resume(trainer, checkpoint)
    coder: Any = AutoencoderKL.from_pretrained(vae, dtype=torch.float32)
    batches = JudgeBatches(dict(np.load(artwork)), seed + trainer.step, coder.requires_grad_(False))
    losses: list[float] = []
    for batch in DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4):
        start, done = time.process_time(), trainer.seconds / (60 * minutes)
        if done >= 1:
            break
        losses.append(trainer.learn(batch, share(trainer.step, done)))
        trainer.seconds += time.process_time() - start
        if trainer.step % EVERY == 0:
            echo(f"{trainer.step} loss {np.mean(losses[-EVERY:]):.3f} {trainer.seconds:.0f} s")
            keep(checkpoint, trainer.state_dict())
    trainer.save(out)


@app.command()
@handle_errors()
def check(judge: Path, artwork: Path, views: Annotated[int, typer.Option(min=2)] = 20) -> None:
    """Prints how well a judge names fresh crops, and how often a near miss looks more like a character than itself."""
    encoder, artist = load_encoder(str(judge)), Artist(dict(np.load(artwork)), seed=10**6)
    words = encoder.texts([article(name) for name in CLASSES])
    things = [thing for _ in range(views) for thing in artist.things() if thing.name]
    crops = encoder.images([Image.fromarray(artist.view(thing)) for thing in things])
    named = [CLASSES[i] == thing.name for i, thing in zip((crops @ words.T).argmax(1), things, strict=True)]
    echo(f"fresh crops named right: {100 * np.mean(named):.1f} % of {len(named)}")
    for name in CHARACTERS:
        mine = encoder.images([Image.fromarray(artist.view(artist.character(name))) for _ in range(views)])
        centre = F.normalize(mine[::2].mean(0), dim=0)
        near = [i for i, thing in enumerate(things) if thing.identity != name]
        least, others = (mine[1::2] @ centre).quantile(0.1), crops[near] @ centre
        over = 100 * (others > least).float().mean()
        echo(f"{name}: nine in ten of its views are over {least:.2f}, and {over:.1f} % of others")


@app.command()
@handle_errors()
def count(judge: Path, references: Path) -> None:
    """Prints how often the detector counts drawings wrong: one in each reference, and two side by side.

    The evaluation's detector keeps windows above a threshold (`WindowsConfig`): a low one counts one object twice.
    """
    detector = WindowDetector(load_encoder(str(judge)), CLASSES, threshold=min(THRESHOLDS))
    scores: dict[int, list[list[float]]] = {1: [], 2: []}
    for name, known in CHARACTERS.items():
        drawn = [open_image(path, "reference") for path in sorted((references / name).glob("*.png"))]
        pairs = [_side_by_side(*pair) for pair in zip(drawn[::2], drawn[1::2], strict=False)]
        for number, images in ((1, drawn), (2, pairs)):
            scores[number] += [[it.score for it in detector.detect(each, [known.class_word])] for each in images]
    for threshold in THRESHOLDS:
        for number, rows in scores.items():
            seen = np.array([sum(score >= threshold for score in row) for row in rows])
            more, fewer = (seen > number).sum(), (seen < number).sum()
            echo(f"threshold {threshold}, {number} in each of {len(seen)} images: more in {more}, fewer in {fewer}")


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


if __name__ == "__main__":
    app()
