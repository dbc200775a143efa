"""`lora-compose train`: a LoRA from a folder of images."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.files.paths import model_source
from lora_compose.compose.support.names import TRAINING_PRESETS, TRAINING_SCOPES, unknown
from lora_compose.compose.support.terminal import handle_errors, starting

_prior, _for_tara, _memory, _watch = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Prior preservation", "TARA", "Speed and memory", "Watching")
)
_OF_TARA = ("align_weight", "align_norm", "class_target", "keys", "token_mask", "start_aligned")
"""Options that are fields of `TaraTraining`; the others, but for those of the command itself, are of `Training`."""


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
    scope: Annotated[str | None, typer.Option(help=f"Layers to train: {', '.join(TRAINING_SCOPES)}.")] = None,
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
    high_noise: Annotated[
        float | None, typer.Option(help="Share of the rows with the most noise, which decides shapes and places.")
    ] = None,
    input_perturbation: Annotated[
        float | None, typer.Option(help="Noise in the input alone, e.g. 0.1: images forgive errors of steps.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of models of which it is an input; as in the images later.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the training images in pixels; default: the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    preserve_class: Annotated[
        bool,
        _prior("--preserve-class", help="Keep what the model makes of the captions without the trigger; no images."),
    ] = False,
    preserve_empty: Annotated[
        bool,
        _prior(
            "--preserve-empty", help="Keep what it makes of the empty caption, on which guidance stands; no images."
        ),
    ] = False,
    class_images: Annotated[Path | None, _prior(help="A folder with images of the class.")] = None,
    class_prompts: Annotated[
        list[str] | None,
        _prior("--class-prompt", help="Caption of class images, repeatable; default: 'a photo of {class_word}'."),
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
    compile: Annotated[
        bool, _memory("--compile", help="Compile the blocks: some minutes at first, then faster steps.")
    ] = False,
    save_dtype: Annotated[str | None, _memory(help="Precision of the file: float32, float16 or bfloat16.")] = None,
    cpu: Annotated[bool, _memory("--cpu", help="Train on the CPU.")] = False,
    threads: Annotated[int | None, _memory(help="CPU threads.")] = None,
    sample_every: Annotated[int | None, _watch(help="Steps between sample images; 0 turns them off.")] = None,
    sample_prompts: Annotated[
        list[str] | None, _watch("--sample-prompt", help="Prompt of sample images, repeatable.")
    ] = None,
    checkpoint_every: Annotated[int | None, _watch(help="Steps between checkpoints.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the checkpoint and start over.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing LoRA.")] = False,
) -> None:
    """Train a LoRA on a folder of images. Ctrl-C stops; the same command resumes.

    On several GPUs: accelerate launch --module lora_compose train OPTIONS
    """
    given = {name: value for name, value in locals().items() if value is not None and value != []}
    if preset is not None and preset not in TRAINING_PRESETS:
        raise ValueError(unknown("preset", preset, TRAINING_PRESETS))
    model_source(model)
    for name in ("preset", "tara", "fresh", "overwrite"):
        given.pop(name, None)
    words = {name: given.pop(name) for name in _OF_TARA if name in given}
    if words and not tara:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in words)
        raise ValueError(f"{names}: these are options of --tara, which is not given")
    with starting():
        from lora_compose.compose.training.command import train as train_and_show
    train_and_show(preset, words if tara else None, given, fresh=fresh, overwrite=overwrite)
