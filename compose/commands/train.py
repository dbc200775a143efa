"""`lora-compose train`: a LoRA from a folder of images."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_compose.compose.files.paths import model_source
from lora_compose.compose.support.names import TRAINING_PRESETS, unknown
from lora_compose.compose.support.terminal import handle_errors, starting

_prior, _for_tara, _memory, _watch = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Prior preservation", "TARA", "Speed and memory", "Watching")
)


@handle_errors()
def train(
    images: Annotated[Path, typer.Argument(help="A folder with images, and captions.tsv or a .txt next to each.")],
    out: Annotated[Path, typer.Option(help="The LoRA to write, a .safetensors file.")],
    trigger: Annotated[str, typer.Option(help="The rare word that names the concept, e.g. sks.")],
    class_word: Annotated[str, typer.Option("--class", help="The noun after the trigger, e.g. cat.")],
    model: Annotated[
        str, typer.Option(help="playground, a folder as diffusers saves it, a .safetensors file, or a hub repository.")
    ],
    preset: Annotated[
        str | None, typer.Option(help=f"Defaults: {', '.join(TRAINING_PRESETS)}; default: chosen by the model.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Caption for images without one; default: 'a photo of {trigger} {class_word}'.")
    ] = None,
    references: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with a reference image for each image, of the same name; repeatable."),
    ] = None,
    scope: Annotated[str | None, typer.Option(help="Layers to train: cross_kv, attention or transformer.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The LoRA is scaled by alpha / rank; default: the rank.")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Train the norms of the changed weights too (DoRA).")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch and process.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per step (gradient accumulation).")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or muon.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Learning rate schedule: constant, linear or cosine.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Warm-up steps of the learning rate.")] = None,
    min_snr: Annotated[float | None, typer.Option(help="Gamma of min-SNR weighting, e.g. 5.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the training images in pixels; default: the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    preserve_class: Annotated[
        bool,
        _prior("--preserve-class", help="Keep what the model makes of the captions without the trigger; no images."),
    ] = False,
    class_images: Annotated[Path | None, _prior(help="A folder with images of the class.")] = None,
    class_prompt: Annotated[
        list[str] | None, _prior(help="Caption of class images, repeatable; default: 'a photo of {class_word}'.")
    ] = None,
    class_count: Annotated[int | None, _prior(help="Generate missing class images up to this number.")] = None,
    prior_batch: Annotated[int | None, _prior(help="Rows of the class per batch.")] = None,
    prior_weight: Annotated[float | None, _prior(help="Weight of the loss on the class.")] = None,
    tara: Annotated[bool, _for_tara("--tara", help="Train for the method tara.")] = False,
    align_weight: Annotated[float | None, _for_tara(help="Weight of the token alignment loss.")] = None,
    align_norm: Annotated[str | None, _for_tara(help="Distance of the alignment loss: l1 or l2.")] = None,
    class_target: Annotated[
        str | None,
        _for_tara(help="Source of the class word's features: caption, or clean (the caption without the trigger)."),
    ] = None,
    keys: Annotated[str | None, _for_tara(help="aligned (trained), or tied (not trained, set in closed form).")] = None,
    token_mask: Annotated[
        str | None, _for_tara(help="Where LoRAs are masked: training (and inference), or inference only.")
    ] = None,
    start_aligned: Annotated[
        bool | None,
        _for_tara("--start-aligned/--start-apart", help="Start with aligned keys, or with the base model's."),
    ] = None,
    mixed_precision: Annotated[str | None, _memory(help="no, fp16 or bf16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        _memory("--gradient-checkpointing/--no-gradient-checkpointing", help="Recompute activations to save memory."),
    ] = None,
    save_dtype: Annotated[str | None, _memory(help="Precision of the file: float32, float16 or bfloat16.")] = None,
    cpu: Annotated[bool, _memory("--cpu", help="Train on the CPU.")] = False,
    threads: Annotated[int | None, _memory(help="CPU threads.")] = None,
    sample_every: Annotated[int | None, _watch(help="Steps between sample images; 0 turns them off.")] = None,
    sample_prompt: Annotated[list[str] | None, _watch(help="Prompt of sample images, repeatable.")] = None,
    checkpoint_every: Annotated[int | None, _watch(help="Steps between checkpoints.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the checkpoint and start over.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing LoRA.")] = False,
) -> None:
    """Train a LoRA on a folder of images. Ctrl-C stops; the same command resumes.

    On several GPUs: accelerate launch --module lora_compose train OPTIONS
    """
    if preset is not None and preset not in TRAINING_PRESETS:
        raise ValueError(unknown("preset", preset, TRAINING_PRESETS))
    model_source(model)
    variants = _given(
        align_weight=align_weight, align_norm=align_norm, class_target=class_target, keys=keys, token_mask=token_mask,
        start_aligned=start_aligned,
    )  # fmt: skip
    fields = _given(
        images=images, out=out, trigger=trigger, class_word=class_word, model=model, prompt=prompt,
        references=tuple(references or ()) or None, scope=scope, rank=rank,
        alpha=alpha, dora=dora or None, steps=steps, batch_size=batch_size, accumulate=accumulate,
        optimizer=optimizer, learning_rate=learning_rate, schedule=schedule, warmup=warmup, min_snr=min_snr,
        resolution=resolution, seed=seed, preserve_class=preserve_class or None,
        class_images=class_images, class_prompts=tuple(class_prompt or ()) or None, class_count=class_count,
        prior_batch=prior_batch, prior_weight=prior_weight, mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing, save_dtype=save_dtype, cpu=cpu or None, threads=threads,
        sample_every=sample_every, sample_prompts=tuple(sample_prompt or ()) or None, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    words = _tara(tara, variants)
    with starting():
        from lora_compose.compose.training.command import train as train_and_show
    train_and_show(preset, words, fields, fresh=fresh, overwrite=overwrite)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; defaults are the training's own."""
    return {name: value for name, value in options.items() if value is not None}


def _tara(wanted: bool, variants: dict[str, Any]) -> dict[str, Any] | None:
    if variants and not wanted:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in variants)
        raise ValueError(f"{names}: these are options of --tara, which is not given")
    return variants if wanted else None
