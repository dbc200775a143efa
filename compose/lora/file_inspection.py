"""Inspects a LoRA file by itself, without a model: format, family, words, ranks."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import BaseModel

from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.formats.kinds import rank_of
from lora_compose.pipelines.formats.layers import Layer, by_layer
from lora_compose.pipelines.formats.recognise import form, guess_family
from lora_compose.pipelines.formats.triggers import parsed

# Metadata of trainers, and our labels for them.
_FACTS = {
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.license": "licence",
    "modelspec.usage_hint": "usage",
    "modelspec.date": "date",
    "method": "trained with",
    "ss_sd_model_name": "trained on",
    "ss_network_module": "network",
    "ss_network_dim": "rank, in the metadata",
    "ss_network_alpha": "alpha, in the metadata",
    "ss_network_args": "network settings",
    "ss_tlora_min_rank": "ranks at the most noise (T-LoRA)",
    "ss_num_train_images": "images",
    "ss_resolution": "resolution",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps planned",
    "ss_epoch": "epoch",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate of the UNet",
    "ss_text_encoder_lr": "learning rate of the text encoder",
    "ss_optimizer": "optimizer",
    "ss_clip_skip": "clip skip",
    "ss_training_comment": "comment",
}
_MANY = 200  # the most characters of a fact, and the most merged files, that are shown

RECORD = "lora_compose.merge"
"""The metadata key of the record of a merge: sources and settings, as JSON."""


class Block(BaseModel, frozen=True):
    """A file's changes of one block of a model.

    Attributes:
        part: "unet", "text_encoder" or "text_encoder_2".
        name: Such as "down_blocks.1"; "layers" for all of a text encoder.
        alphas: Alphas of the changes; empty if the file has none.
        norm: Frobenius norm of the change, as it is applied; None if it was matched with no model, or depends on
            weights that are not there.
    """

    part: str
    name: str
    layers: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    norm: float | None

    @property
    def rank(self) -> str:
        """The ranks in words."""
        return _span(self.ranks) or "whole"

    @property
    def alpha(self) -> str:
        """The alphas in words."""
        return _span(self.alphas) or "none"


class Inspection(BaseModel, frozen=True):
    """The result of inspecting one file.

    Attributes:
        size: In bytes.
        form: The kind of adapter, and the tool whose key names it has.
        family: Model family: "SD 1.x", "SD 2.x", "SDXL", another name, or None.
        why: The evidence for the family.
        trigger: The trigger that loading takes; None if it takes none.
        class_word: The class word that loading takes.
        triggers: Words that may be the trigger, each with where they were found.
        class_words: Words that may be the class word.
        notes: What is cut, left out or guessed.
    """

    file: str
    sha256: str
    size: int
    form: str
    family: str | None
    why: tuple[str, ...]
    matched_with: str | None
    trigger: str | None
    class_word: str | None
    triggers: tuple[tuple[str, str], ...]
    class_words: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...] = ()
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What is known of the file as a whole, each with a label."""
        family = self.family or "unknown"
        return [
            ("format", self.form),
            ("made for", f"{family}: {'; '.join(self.why)}" if self.why else family),
            ("content", f"{self.size / 2**20:.1f} MiB, SHA-256 {self.sha256}"),
            *((("trigger", self.trigger),) if self.trigger else ()),
            *((("class word", self.class_word),) if self.class_word else ()),
            *(("word", f"{word}: {where}") for word, where in self.triggers),
            *(("noun", f"{word}: {where}") for word, where in self.class_words),
            *self.facts,
        ]


def about(file: LoraFile) -> Inspection:
    """The format of a file, its family, its words and what its metadata say; not yet its layers."""
    guess = guess_family({key: tensor.shape for key, tensor in file.tensors.items()}, file.metadata)
    return Inspection(
        file=str(file.path), sha256=file.sha256, size=file.path.stat().st_size if file.path.is_file() else 0,
        form=form([*file.tensors]), family=guess.family, why=guess.why, matched_with=None,
        trigger=file.trigger, class_word=file.class_word, triggers=tuple(_triggers(file)),
        class_words=tuple((word.words, word.where) for word in file.words.class_words),
        facts=(*merge_facts(file.metadata), *_facts(file.metadata)),
    )  # fmt: skip


def by_itself(known: Inspection, file: LoraFile, why: str | None = None) -> Inspection:
    """The changes of a file by its own keys alone; `why` says why it was not matched with its family's layers."""
    try:
        grouped = by_layer(file)
        own = Alphas(file).own
        blocks: dict[tuple[str, str], list[Layer]] = {}
        for layer in grouped.layers:
            blocks.setdefault((layer.part, _block_in_file(layer.module)), []).append(layer)
        alphas = {key: [own(layer.module, layer) for layer in inside] for key, inside in blocks.items()}
        summaries = tuple(block(*key, inside, alphas[key]) for key, inside in blocks.items())
    except (LoraError, ValueError) as error:
        return known.model_copy(update={"problem": str(error)})
    refused = next((layer.refused for layer in grouped.layers if layer.refused), None)
    about = {"problem": f"it is {refused}"} if refused else {"notes": () if why is None else (why,)}
    return known.model_copy(update={"blocks": summaries, "unmatched": grouped.unknown, **about})


def block(
    part: str, name: str, layers: Sequence[Layer], alphas: Iterable[float | None], norm: float | None = None
) -> Block:
    """A file's changes of the layers of one block, each with its alpha."""
    ranks = sorted({rank for layer in layers if (rank := rank_of(layer.shapes)) is not None})
    known = sorted({alpha for alpha in alphas if alpha is not None})
    return Block(part=part, name=name, layers=len(layers), ranks=tuple(ranks), alphas=tuple(known), norm=norm)


def _block_in_file(module: str) -> str:
    """The block of a layer by the name that the file has for it: "double_blocks", "down_blocks_1", "mid_block"."""
    match = re.match(r"(?:input|output|down|up)_blocks_\d+|[a-z_]*?(?:blocks?|layers)(?=_|$)", module)
    return match[0] if match else module


def _triggers(file: LoraFile) -> Iterator[tuple[str, str]]:
    for candidate in file.words.triggers:
        by_part = file.embeddings.get(candidate.words, {})
        vectors = " and ".join(f"{len(tensor.flatten(0, 1))} for {part}" for part, tensor in by_part.items())
        yield candidate.words, f"{candidate.where}: {vectors}" if vectors else candidate.where


def merge_facts(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Method and inputs from the metadata of a file that `lora-compose merge` wrote, which are not trusted."""
    record = parsed(metadata.get(RECORD))
    files = record.get("files")
    if not isinstance(files, list):
        return
    settings = record.get("settings")
    words = [f"{name}={value}" for name, value in settings.items()] if isinstance(settings, dict) else []
    words += [f"rank {record['rank']}"] if record.get("rank") is not None else []
    yield "merged by", _short(" ".join([str(record.get("method")), f"({', '.join(words)})" if words else ""]).strip())
    for merged in files[:_MANY]:
        if isinstance(merged, dict):
            weight, sha256 = merged.get("weight"), str(merged.get("sha256"))
            yield "merged from", _short(f"{merged.get('name')}, weight {weight}, SHA-256 {sha256[:12]}")


def _facts(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, label in _FACTS.items():
        value = (metadata.get(key) or "").strip()
        if value and value not in ("None", "{}"):
            yield label, _short(value)


def _short(text: str) -> str:
    return text if len(text) <= _MANY else f"{text[:_MANY]} ..."


def block_of(part: str, layer: str) -> str:
    """The block of a layer: "unet.down_blocks.1", "unet.mid_block"; a text encoder is one block."""
    if part != "unet":
        return f"{part}.layers"
    match = re.match(r"\w+_blocks\.\d+|[^.]+", layer)
    return f"{part}.{match[0] if match else layer}"


def _span(values: Sequence[float]) -> str:
    few = "/".join(f"{value:g}" for value in values)
    return few if len(values) <= 3 else f"{min(values):g} to {max(values):g}"
