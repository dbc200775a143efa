"""The transformer: a small FLUX.1 on the latents of the same world, with a T5 whose every word is one token.

    PYTHONPATH=assets python -m recipe.transformer POOL MODEL --base UNET_MODEL --minutes 480

VAE and words are those of the UNet's model, whose CLIP learns on together with transformer and T5. T5's vectors of
words begin as CLIP's, which have learnt from images what a cat and a fox have in common. Flow matching, mostly with the
velocity that the UNet expects (`teacher.py`), and half of the times where it is decided what is where; half of an
image's tokens skip the blocks in the middle (Krause et al. 2025); features of a block in the middle are to tell what
lies where (`hints.py`); Muon for the matrices of blocks, an average of the last weights. As in FLUX.1-dev, guidance is
an input, and what the UNet expects with guidance is learnt (Meng et al. 2023). With `--own`, part of the noisy images
are those that the transformer itself makes (`rollouts.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from lora_compose.attention.backbones.joint import image_positions, packed, unpacked
from lora_compose.compose.support.precision import cpu_autocast
from lora_compose.compose.support.terminal import handle_errors
from recipe.averaged import NO_CAPTION, AveragedTrainer
from recipe.clock import train_for
from recipe.hints import Hints, lying
from recipe.pool import Batch
from recipe.ranks import start_ranks
from recipe.rollouts import Noisy, Rollout
from recipe.teacher import Teacher
from recipe.tokenizer import known_words

WIDTH = 192
MAX_TOKENS = 32
SHIFT = 2.0  # of the timesteps, when images are made
LAYOUT_FROM = 0.7
"""Times from which on it is decided what is where; half of a batch has such a time."""
TAUGHT = 0.75
"""Share of the velocity that is the teacher's without guidance; the rest is that of the image and its noise."""
GUIDED = 0.75  # share of the images with guidance, of which the velocity is the teacher's alone
GUIDANCE = (2.0, 6.0)
SHAPES = 64  # of images, words and kept tokens, for which blocks are compiled; beyond, they run without
KEPT = 0.5  # share of an image's tokens that go through all blocks in training, in whole sixteens
FIRST, LAST = 1, 2  # blocks at both ends that all tokens go through
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
ENDING = "</w>"  # of words in CLIP's vocabulary


def new_tokenizer() -> T5Tokenizer:
    """One token per word, with the space before it, and letters for what is none of them."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    spaced = [(f"▁{word}", -2.0) for word in known_words()]
    letters = [(letter, -8.0) for letter in LETTERS]
    return T5Tokenizer(vocab=[*special, *spaced, ("▁", -6.0), *letters], extra_ids=0, model_max_length=MAX_TOKENS)


def new_encoder(tokenizer: T5Tokenizer, clip: CLIPTextModel, words: CLIPTokenizer) -> T5EncoderModel:
    """An untrained encoder that has CLIP's vectors of the words it knows, at T5's size."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=48, d_ff=512, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    model: Any = T5EncoderModel(config)
    source: Any = clip
    known = source.get_input_embeddings().weight.detach().float()
    known = known / known.pow(2).mean(1, keepdim=True).sqrt()
    vocabulary = words.get_vocab()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for piece, index in tokenizer.get_vocab().items():
            same = vocabulary.get(piece.removeprefix("▁") + ENDING)
            if same is not None:
                table[index] = known[same]
    return model


def new_transformer(channels: int, double: int = 3, single: int = 8) -> FluxTransformer2DModel:
    """An untrained transformer whose blocks do nothing yet."""
    model = FluxTransformer2DModel(
        in_channels=4 * channels, num_layers=double, num_single_layers=single, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    for name, module in model.named_modules():
        silent = name == "proj_out" or name.endswith("guidance_embedder.linear_2")
        if silent or (isinstance(module, nn.Linear) and "norm" in name):
            nn.init.zeros_(module.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
    return model


def new_pipeline(parts: Any) -> FluxPipeline:
    """An untrained model around VAE, CLIP and words of the UNet's."""
    parts.vae.register_to_config(shift_factor=0.0)  # FLUX's pipeline adds it
    tokenizer = new_tokenizer()
    return FluxPipeline(
        # Deterministic steps tear faces: an error in the latents stays.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, stochastic_sampling=True), vae=parts.vae,
        text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        text_encoder_2=new_encoder(tokenizer, parts.text_encoder, parts.tokenizer), tokenizer_2=tokenizer,
        transformer=new_transformer(parts.vae.config.latent_channels),
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


class Routed(nn.Module):
    """A FLUX transformer in which some of an image's tokens skip the blocks in the middle (Krause et al. 2025).

    Args:
        transformer: Its weights.
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer: Any = transformer

    def forward(
        self, latents: Tensor, times: Tensor, guidance: Tensor, text: Tensor, pooled: Tensor, positions: Tensor,
        kept: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The velocity, and features of the kept tokens in the middle.

        Args:
            latents: Tokens of each image, in any order. Shape: [images, tokens, channels].
            times: From 0 to 1. Shape: [images].
            guidance: Scales. Shape: [images].
            text: Shape: [images, words, channels].
            pooled: Shape: [images, channels].
            positions: Of the image's tokens. Shape: [tokens, 3].
            kept: So many of the first tokens go through all blocks.
        """
        model, words = self.transformer, text.shape[1]
        embedding = model.time_text_embed(1000 * times, 1000 * guidance, pooled)
        hidden, text = model.x_embedder(latents), model.context_embedder(text)
        rotary = model.pos_embed(torch.cat((torch.zeros(words, 3), positions)))
        of_kept = tuple(part[: words + kept] for part in rotary)
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        middle = len(blocks) // 2
        for block in blocks[:FIRST]:
            text, hidden = block(hidden, text, embedding, rotary)
        some, others = hidden[:, :kept], hidden[:, kept:]
        for block in blocks[FIRST:middle]:
            text, some = block(some, text, embedding, of_kept)
        telling = some
        for block in blocks[middle:-LAST]:
            text, some = block(some, text, embedding, of_kept)
        hidden = torch.cat((some, others), 1)
        for block in blocks[-LAST:]:
            text, hidden = block(hidden, text, embedding, rotary)
        return model.proj_out(model.norm_out(hidden, embedding)), telling


class TransformerTrainer(AveragedTrainer[Batch]):
    """Trains transformer, T5 and CLIP.

    Args:
        base: The UNet's pipeline, which teaches; its CLIP is trained in the new pipeline, a copy of it teaches.
        lr: Learning rate of Muon.
        seed: Seed of noise, times and dropped captions.
        own: Share of the images that the transformer makes itself, with guidance.
    """

    def __init__(self, base: StableDiffusionPipeline, lr: float, seed: int, own: float) -> None:
        self.teacher = Teacher(base)
        pipe = new_pipeline(base)
        self.hints = Hints(pipe.transformer.inner_dim)
        super().__init__([pipe.transformer, pipe.text_encoder_2, pipe.text_encoder, self.hints], _is_inner, lr, seed)
        self.pipe = pipe
        self.clip: Any = pipe.text_encoder
        self.t5: Any = pipe.text_encoder_2
        self.routed = Routed(pipe.transformer)
        self.own = own
        self.rollouts: dict[torch.Size, Rollout] = {}  # by the shape of a batch
        torch._dynamo.config.recompile_limit = SHAPES
        self.teacher.unet.compile(dynamic=False)
        # Blocks alone: where all of a step is compiled (PyTorch 2.13, CPU, bf16), gradients of close-ups are NaN.
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
            block.compile(dynamic=False)

    def loss(self, batch: Batch) -> Tensor:
        """The error of the velocity, and that of what lies where."""
        clean, rng = batch.latents, self.generator
        order = torch.randperm(clean.shape[2] * clean.shape[3] // 4, generator=rng)
        # Always as many, so that the compiled teacher sees few shapes.
        guided = torch.arange(len(clean)) < round(GUIDED * len(clean))
        left_out = ((torch.rand(len(clean), generator=rng) < NO_CAPTION / (1 - GUIDED)) & ~guided).tolist()
        captions = ["" if out else text for text, out in zip(batch.captions, left_out, strict=True)]
        times = torch.rand(len(clean), generator=rng)
        times[::2] = times[::2].lerp(torch.ones(1), LAYOUT_FROM)
        noise = torch.randn(clean.shape, generator=rng)
        least, most = GUIDANCE
        guidance = (least + (most - least) * torch.rand(len(clean), generator=rng)).where(guided, 1.0)
        noised = Noisy(clean.lerp(noise, times.view(-1, 1, 1, 1)), times, guidance, captions)
        own = round(self.own * len(clean))
        rollout = self.rollouts.setdefault(clean.shape, Rollout.of(noised.first(own), rng))
        mixed, times, guidance, captions = noised.with_first(rollout.noisy)
        tokens = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        words = self.pipe.tokenizer_2(captions, **tokens).input_ids
        # What follows a caption's end changes nothing of what CLIP says of it.
        clip_words = self.pipe.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
        taught = torch.ones(len(clean)).where(guided, TAUGHT).view(-1, 1, 1, 1)
        velocity = (noise - clean).lerp(self.teacher.velocity(mixed, times, captions, guidance), taught)
        kept = 16 * round(KEPT * len(order) / 16)
        with cpu_autocast(), quick_attention():
            predicted, telling = self.routed(
                packed(mixed)[:, order], times, guidance, self.t5(words)[0], self.clip(clip_words).pooler_output,
                image_positions(clean)[order], kept,
            )  # fmt: skip
        classes, shares = lying(batch.objects, *(side // 2 for side in batch.latents.shape[2:]))
        predicted, of_kept = predicted.float(), order[:kept]
        made = unpacked(predicted[:own, order.argsort()].detach(), clean.shape[2:])
        rollout.advance(made, noised.first(own), rng)
        error = (predicted - packed(velocity)[:, order]).pow(2).mean()
        # What lies where in its own images is not known.
        return error + self.hints(telling[own:], classes[own:, of_kept], shares[own:, of_kept])

    def save(self, out: Path) -> None:
        """Writes the pipeline with averaged weights in fp16; training may continue afterwards."""
        parts = (self.pipe.transformer, self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.vae)
        self.write(self.pipe, parts, out)


def _is_inner(name: str, weight: Tensor) -> bool:
    """Whether a weight maps features to features inside of a block, which is what Muon is for."""
    return weight.ndim == 2 and name.startswith("0.") and "blocks" in name and ".linear" not in name


@handle_errors()
def train(
    pool: Path,
    out: Path,
    base: Annotated[Path, typer.Option(help="The UNet's model: VAE, CLIP, its words, and the teacher.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Of computing, in all; the rate falls to their end.")] = 480,
    images: Annotated[int, typer.Option(min=1, help="Of the usual size in a batch.")] = 32,
    own: Annotated[float, typer.Option(min=0, max=GUIDED, help="Share of images that it makes itself.")] = 0.0,
    lr: float = 0.01,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Trains the transformer."""
    start_ranks()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    known: dict[str, Any] = {"dtype": torch.float32, "safety_checker": None}
    teacher = StableDiffusionPipeline.from_pretrained(base, **known)
    train_for(minutes, TransformerTrainer(teacher, lr, seed, own), pool, out, images, seed)


if __name__ == "__main__":
    typer.run(train)
