"""The playground's transformer: a FLUX.1 of width 256 on the latents of its world, trained on one core.

    python -m recipe.first.transformer POOL/close CLOSE --batch 64 --minutes 22
    python -m recipe.first.transformer POOL/scenes MODEL --init CLOSE --batch 48 \
        --minutes 50 --seed 1

`transformer_data` makes the pools. VAE, CLIP and its words are the playground's and stay as they are; the transformer
and a small T5 learn together. Close-ups come first. Flow matching with logit-normal times (Esser et al. 2024), Muon for
the matrices of the blocks, an average of the last weights; classifier-free guidance by dropped captions.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lora_compose.attention.backbones.joint import image_positions, packed
from lora_compose.compose.playground.assets import PLAYGROUND_FLUX, playground_model
from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.averaged import NO_CAPTION, AveragedTrainer
from recipe.first.scenes import Batch
from recipe.first.tokenizer import insisted
from recipe.first.transformer_data import Pool
from recipe.first.transformer_text import MAX_TOKENS, known_words, new_encoder, new_tokenizer
from recipe.loop import keep, resume, share

EVERY = 50  # steps between two lines of progress
SHIFT = 1.0  # of the timesteps, when images are made


def new_transformer(double: int = 2, single: int = 6) -> FluxTransformer2DModel:
    """An untrained transformer whose blocks do nothing yet."""
    model = FluxTransformer2DModel(
        in_channels=32, num_layers=double, num_single_layers=single, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=192, pooled_projection_dim=192, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    for name, module in model.named_modules():
        if name == "proj_out" or (isinstance(module, nn.Linear) and "norm" in name):
            nn.init.zeros_(module.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
    return model


def new_pipeline() -> FluxPipeline:
    """A pipeline around the playground's VAE and CLIP, for the words of its world."""
    source = playground_model(PLAYGROUND_FLUX)
    vae: Any = AutoencoderKL.from_pretrained(source / "vae", dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # FLUX's pipeline adds it
    clip = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32)
    words = CLIPTokenizer.from_pretrained(source / "tokenizer")
    tokenizer = new_tokenizer(known_words(words, insisted()))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=vae, text_encoder=clip, tokenizer=words,
        text_encoder_2=new_encoder(tokenizer, clip, words), tokenizer_2=tokenizer, transformer=new_transformer(),
    )  # fmt: skip


def _attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention by two products: for short sequences a CPU is faster so than in the fused kernel's backward pass."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@contextmanager
def quick_attention() -> Iterator[None]:
    """Inside this block diffusers' FLUX attends like that."""
    before = transformer_flux.dispatch_attention_fn
    transformer_flux.dispatch_attention_fn = _attend
    try:
        yield
    finally:
        transformer_flux.dispatch_attention_fn = before


class TransformerTrainer(AveragedTrainer[Batch]):
    """Trains transformer and T5.

    Args:
        pipe: The pipeline, trained in place.
        lr: Learning rate of Muon.
        seed: Seed of noise, times and dropped captions.
        fast: Compiles the forward pass.
    """

    def __init__(self, pipe: FluxPipeline, lr: float, seed: int, fast: bool = True) -> None:
        super().__init__([pipe.transformer, pipe.text_encoder_2], _is_inner, lr, seed)
        self.pipe = pipe
        self.t5: Any = pipe.text_encoder_2
        self.compiled: Any = torch.compile(pipe.transformer, dynamic=False) if fast else pipe.transformer
        self.seconds = 0.0
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}

    def read(self, captions: Sequence[str]) -> None:
        """T5's tokens and CLIP's pooled features of new captions, computed in one batch."""
        new = sorted(set(captions) - set(self._texts))
        for at in range(0, len(new), 256):
            part = new[at : at + 256]
            ids: Any = self.pipe.tokenizer_2(
                part, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                pooled = self.pipe._get_clip_prompt_embeds(part)
            self._texts |= zip(part, zip(ids, pooled, strict=True), strict=True)

    def loss(self, batch: Batch) -> Tensor:
        """The error of the velocity."""
        self.read(["", *batch.captions])
        clean, rng = packed(batch.latents), self.generator
        left_out = (torch.rand(len(clean), generator=rng) < NO_CAPTION).tolist()
        texts = [self._texts["" if out else text] for text, out in zip(batch.captions, left_out, strict=True)]
        ids, pooled = (torch.stack(part) for part in zip(*texts, strict=True))
        times = torch.randn(len(clean), generator=rng).sigmoid()
        noise = torch.randn(clean.shape, generator=rng)
        at = times.view(-1, 1, 1)
        with cpu_autocast():
            predicted = self.compiled(
                hidden_states=clean.lerp(noise, at), timestep=times, encoder_hidden_states=self.t5(ids)[0],
                pooled_projections=pooled, img_ids=image_positions(batch.latents), txt_ids=torch.zeros(MAX_TOKENS, 3),
                return_dict=False,
            )[0]  # fmt: skip
        return (predicted.float() - (noise - clean)).pow(2).mean()

    def state_dict(self) -> dict[str, Any]:
        """The state of a checkpoint."""
        return super().state_dict() | {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes."""
        super().load_state_dict(state)
        self.seconds = state["seconds"]

    def save(self, out: Path) -> None:
        """Writes the pipeline with averaged weights in fp16; training may continue afterwards."""
        parts = (self.pipe.transformer, self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.vae)
        self.write(self.pipe, parts, out)
        # Otherwise text encoders alone are opened in the precision of the file.
        for path in out.glob("text_encoder*/config.json"):
            path.write_text(path.read_text(encoding="utf-8").replace('"float16"', '"float32"'), encoding="utf-8")


def _is_inner(name: str, weight: Tensor) -> bool:
    """Whether a weight maps features to features inside of a block, which is what Muon is for."""
    return weight.ndim == 2 and name.startswith("0.") and "blocks" in name and ".linear" not in name


def run(trainer: TransformerTrainer, pool: Pool, batch: int, minutes: float, checkpoint: Path, every: float) -> None:
    """Trains for `minutes` in all; the learning rate follows the clock."""
    values: list[float] = []
    trainer.read(["", *pool.captions])
    saved = time.perf_counter()
    for each in pool.batches(batch):
        start, done = time.perf_counter(), trainer.seconds / (60 * minutes)
        if done >= 1:
            break
        values.append(trainer.learn(each, share(trainer.step, done)))
        if len(values) > 1:  # the first step waits for the compiler
            trainer.seconds += time.perf_counter() - start
        if trainer.step % EVERY == 0:
            mean = sum(values) / len(values)
            echo(f"{trainer.step} loss {mean:.4f} {trainer.seconds:.0f} s, {len(pool)} pictures")
            values = []
        if time.perf_counter() - saved > every:
            keep(checkpoint, trainer.state_dict())
            saved = time.perf_counter()
    keep(checkpoint, trainer.state_dict())


@handle_errors()
def train(
    pool: Path,
    out: Path,
    init: Annotated[Path | None, typer.Option(help="A model to start from.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="In all; the rate falls towards their end.")] = 60,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    lr: float = 0.01,
    every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 180,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Trains the transformer; a checkpoint next to OUT is resumed."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    pipe: Any = FluxPipeline.from_pretrained(init, dtype=torch.float32) if init else new_pipeline()
    trainer, checkpoint = TransformerTrainer(pipe, lr, seed), out.with_suffix(".state.pt")
    resume(trainer, checkpoint)
    pictures = Pool(pool, seed + trainer.step)
    pictures.look()
    with quick_attention():
        run(trainer, pictures, batch, minutes, checkpoint, every)
    trainer.save(out)


if __name__ == "__main__":
    typer.run(train)
