"""The words that a file was trained with: those that it declares, and candidates from captions and folder names.

Sources: the public metadata of sd-scripts (`ss_tag_frequency`, `ss_dataset_dirs`, and the `class_tokens` of
`ss_datasets`, where folders have any name), modelspec (`trigger_phrase`), ai-toolkit, which writes its trigger word as
the name of a folder with one caption, and OneTrainer (`ot_config`). Booru tags are written with spaces or underscores.
Metadata are not trusted: they may be anything.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from lora_compose.pipelines.support.words import parts_of, spaced, without_ending

_MOST = 5  # candidates from captions
_MANY = 200  # the most characters of a candidate
_LONG = 4  # words of a tag; a longer one is a sentence
_FOLDERS = 100  # of training images whose class tokens are read
_LARGEST = 10**9  # images; more is no count
_HALF = 0.5  # the share of captions that confirms the name of a folder

_NOUNS = frozenset(
    [
        "person",
        "people",
        "man",
        "woman",
        "boy",
        "girl",
        "child",
        "kid",
        "baby",
        "guy",
        "lady",
        "male",
        "female",
        "character",
        "face",
        "creature",
        "animal",
        "cat",
        "dog",
        "kitten",
        "puppy",
        "horse",
        "bird",
        "bear",
        "fox",
        "wolf",
        "rabbit",
        "dragon",
        "monster",
        "robot",
        "doll",
        "toy",
        "figure",
        "plushie",
        "mascot",
        "car",
        "vehicle",
        "ship",
        "building",
        "house",
        "castle",
        "landscape",
        "place",
        "room",
        "object",
        "product",
        "bottle",
        "shoe",
        "shirt",
        "dress",
        "outfit",
        "costume",
        "hat",
        "bag",
        "logo",
        "flower",
        "tree",
        "style",
        "artstyle",
        "1girl",
        "1boy",
        "1other",
        "2girls",
        "2boys",
    ]
)
_GENERAL = frozenset(
    ["solo", "looking at viewer", "simple background", "white background", "smile", "standing", "upper body", "blush",
     "long hair", "short hair", "highres", "masterpiece", "best quality", "full body", "open mouth", "closed mouth"]
)  # fmt: skip
_STOP = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "by",
        "to",
        "with",
        "and",
        "or",
        "is",
        "are",
        "her",
        "his",
        "their",
        "its",
        "from",
        "for",
        "as",
        "that",
        "this",
        "photo",
        "image",
        "picture",
        "wearing",
        "standing",
        "sitting",
        "looking",
    ]
)


@dataclass(frozen=True)
class Candidate:
    """Words that may be the trigger, or the class word, and where they were found: "in 40 captions"."""

    words: str
    where: str


@dataclass(frozen=True)
class Words:
    """What a file tells about its words.

    Attributes:
        trigger: The trigger that it declares: in its metadata, as a bundled word, or as the name of its only folder of
            training images, if its captions have that.
        class_word: The same for the noun after it.
        where: Where the trigger was found.
        triggers: Words that may be the trigger, the most likely first.
        class_words: Nouns of its captions, the most frequent first.
    """

    trigger: str | None = None
    class_word: str | None = None
    where: str = ""
    triggers: tuple[Candidate, ...] = ()
    class_words: tuple[Candidate, ...] = ()


def words_of(metadata: Mapping[str, str], bundled: Iterable[str] = ()) -> Words:
    """Reads the words of a file from its metadata; `bundled` are words with vectors of their own."""
    captions, own = _Captions.of(metadata), list(bundled)
    declared = list(_declared(metadata, captions))
    folders = [Candidate(name, where) for name, where in captions.folders.items()]
    tags = [Candidate(_short(tag), _in_captions(count)) for tag, count in captions.ranked()[:_MOST]]
    named = captions.named()
    own_words = [Candidate(_short(word), "a word with vectors of its own") for word in own]
    trained = [*folders, *tags] if named else [*tags, *folders]
    every = [*declared, *own_words, *_of_onetrainer(metadata), *trained]
    first: dict[str, Candidate] = {}
    for candidate in every:
        first.setdefault(candidate.words, candidate)
    noun = (metadata.get("class_word") or "").strip() or None
    trigger, where = None, ""
    if declared:
        trigger, where = declared[0].words, declared[0].where
    elif own:
        trigger, where = " ".join(own), "its bundled words"
    elif named:
        trigger, where = named, captions.named_by
    if trigger and not own:
        trigger, noun = (without_ending(trigger, noun), noun) if noun else divided(trigger)
    nouns = tuple(Candidate(word, _in_captions(count)) for word, count in captions.nouns())
    return Words(trigger, noun, where, tuple(first.values()), nouns)


def is_usual_noun(word: str) -> bool:
    """Whether a word is a usual class word."""
    return word.lower() in _NOUNS


def divided(phrase: str) -> tuple[str, str | None]:
    """Trigger and class word of a phrase that ends with a usual class word: ("ohwx", "man") of "ohwx_man"."""
    phrase = phrase.strip()
    last = parts_of(phrase)[-1]
    before = without_ending(phrase, last)
    return (before, last) if before not in ("", phrase) and is_usual_noun(last) else (phrase, None)


@dataclass(frozen=True)
class _Captions:
    """Captions and folders of training images.

    Attributes:
        counts: How many captions have a tag, by folder; in the order of the captions.
        dirs: Names of folders, as they were.
        images: How many images there are, if that is known.
        class_tokens: What the captions of folders are without files of their own.
    """

    counts: Mapping[str, Mapping[str, int]]
    dirs: tuple[str, ...]
    images: int
    class_tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "_Captions":
        subsets = list(_subsets(metadata))
        regular = {
            *parsed(metadata.get("ss_reg_dataset_dirs")),
            *(_text(it, "image_dir") for it in subsets if _is_regular(it)),
        }
        tokens = (_short(text) for it in subsets if not _is_regular(it) and (text := _text(it, "class_tokens")))
        dirs = {name: entry for name, entry in parsed(metadata.get("ss_dataset_dirs")).items() if name not in regular}
        counts: dict[str, dict[str, int]] = {}
        for folder, tags in parsed(metadata.get("ss_tag_frequency")).items():
            if folder in regular or not isinstance(tags, dict):
                continue
            for tag, count in tags.items():
                if _is_count(count) and tag.strip():
                    mine = counts.setdefault(folder, {})
                    mine[tag.strip()] = mine.get(tag.strip(), 0) + count
        images = [entry.get("img_count") for entry in dirs.values() if isinstance(entry, dict)]
        whole = sum(n for n in images if _is_count(n))
        return cls(counts, tuple(dict.fromkeys([*dirs, *counts])), whole, tuple(dict.fromkeys(tokens)))

    @property
    def folders(self) -> dict[str, str]:
        """What folders stand for, and where that is: their class tokens, or "ohwx man" for "10_ohwx man"."""
        if self.class_tokens:
            return dict.fromkeys(self.class_tokens, "class_tokens of the training images")
        matches = (re.fullmatch(r"\d+_(.+?)(?: \(\d+\))?", name) for name in self.dirs)
        return dict.fromkeys((_short(it[1].strip()) for it in matches if it), "name of a folder of training images")

    @property
    def named_by(self) -> str:
        """What names the only folder: class tokens, or itself, with its number of repeats."""
        (name,) = self.folders
        if self.class_tokens:
            return f"class_tokens of its training images, {name!r}"
        return f"the folder of its training images, {next((it for it in self.dirs if name in it), name)!r}"

    def named(self) -> str | None:
        """The name of the only folder, if it can be a trigger and captions have it; None otherwise."""
        if len(self.folders) != 1:
            return None
        (name,) = self.folders
        trigger, noun = divided(name)
        if spaced(trigger) in _NOUNS | _GENERAL:
            return None
        every = self._tags()
        if not every:
            return name if noun else None
        has = re.compile(rf"(?<!\w){re.escape(spaced(trigger))}(?!\w)")
        captions = sum(count for tag, count in every.items() if has.search(spaced(tag)))
        whole = self.images or max(every.values())
        if captions < _HALF * whole:
            return None
        # A caption may have several tags with the word, and a single caption may begin with it by chance.
        common = (tag for tag, count in every.items() if count >= max(whole, 2, _HALF * captions + 1))
        return next((tag for tag in common if _begins(tag, name)), name)

    def has(self, tag: str) -> bool:
        """Whether captions have a tag."""
        return any(spaced(known) == spaced(tag) for known in self._tags())

    def ranked(self) -> list[tuple[str, int]]:
        """Tags by how many captions have them, those that say little last; of sentences, their words."""
        every = self._tags()
        if every and all(len(parts_of(tag)) > _LONG for tag in every):
            every = self._spelled(lambda word: word not in _STOP and len(word) > 1)
        general = _NOUNS | _GENERAL
        return sorted(every.items(), key=lambda item: (spaced(item[0]) in general, -item[1]))

    def nouns(self) -> list[tuple[str, int]]:
        """Usual class words in the captions, the most frequent first."""
        return sorted(self._spelled(is_usual_noun).items(), key=lambda item: -item[1])[:_MOST]

    def _tags(self) -> dict[str, int]:
        """How many captions have each tag, in the spelling that most of them have."""
        spellings: dict[str, dict[str, int]] = {}
        for counts in self.counts.values():
            for tag, count in counts.items():
                mine = spellings.setdefault(spaced(tag), {})
                mine[tag] = mine.get(tag, 0) + count
        return {max(mine, key=mine.__getitem__): sum(mine.values()) for mine in spellings.values()}

    def _spelled(self, wanted: Callable[[str], bool]) -> dict[str, int]:
        """How many tags have each of the words that are wanted."""
        sums: dict[str, int] = {}
        for tag, count in self._tags().items():
            for word in dict.fromkeys(re.findall(r"[^\W_]+", tag.lower())):
                if wanted(word):
                    sums[word] = sums.get(word, 0) + count
        return sums


def _is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of metadata is a number of images."""
    return isinstance(value, int) and 0 < value <= _LARGEST


def _begins(tag: str, name: str) -> bool:
    """Whether a tag of few words begins with the name of a folder: "saber (fate)" with "saber"."""
    long = len(parts_of(tag)) > _LONG
    return not long and re.match(rf"{re.escape(spaced(name))}(?!\w)", spaced(tag)) is not None


def _declared(metadata: Mapping[str, str], captions: _Captions) -> Iterator[Candidate]:
    """Words that a header declares; of several tags each, those that captions have first, and then all of them."""
    for key in ("trigger", "modelspec.trigger_phrase"):
        word = (metadata.get(key) or "").strip(" ,")
        tags = [tag for part in word.split(",") if (tag := part.strip())]
        if len(tags) > 2 or (len(tags) == 2 and not is_usual_noun(tags[1])):
            ordered = sorted(tags[:_MOST], key=lambda tag: not captions.has(tag))
            yield from (Candidate(_short(tag), f"one of several in {key}") for tag in ordered)
        if word:
            yield Candidate(_short(word), key)


def _subsets(metadata: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """The folders of sd-scripts, where its settings name them."""
    datasets = _loaded(metadata.get("ss_datasets"))
    for dataset in datasets[:_FOLDERS] if isinstance(datasets, list) else ():
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        yield from (it for it in (subsets[:_FOLDERS] if isinstance(subsets, list) else ()) if isinstance(it, dict))


def _is_regular(subset: Mapping[str, Any]) -> bool:
    """Whether a folder has regularisation images."""
    return subset.get("is_reg") is True


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return value.strip() if isinstance(value, str) else ""


def _of_onetrainer(metadata: Mapping[str, str]) -> Iterator[Candidate]:
    concepts = parsed(metadata.get("ot_config")).get("concepts")
    for concept in concepts[:_MOST] if isinstance(concepts, list) else ():
        if isinstance(concept, dict) and _is_trained(concept) and (name := _text(concept, "name")):
            yield Candidate(_short(name), "name of a concept in OneTrainer")


def _is_trained(concept: Mapping[str, Any]) -> bool:
    """Whether OneTrainer trained on a concept: it may be off, for validation, or to keep what the model had."""
    elsewhere = concept.get("validation_concept") is True or _text(concept, "type") in (
        "VALIDATION",
        "PRIOR_PREDICTION",
    )
    return concept.get("enabled") is not False and not elsewhere


def _in_captions(count: int) -> str:
    return f"in {count} captions" if count != 1 else "in 1 caption"


def _short(text: str) -> str:
    return text if len(text) <= _MANY else f"{text[:_MANY]} ..."


def parsed(text: str | None) -> dict[str, Any]:
    """A JSON object inside metadata, which may be anything."""
    value = _loaded(text)
    return value if isinstance(value, dict) else {}


def _loaded(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
