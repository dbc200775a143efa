"""Labels of methods and settings on the page: by what they do; the paper's names come second."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_compose.pipelines.methods import METHODS

Decides = Literal["boxes", "found areas", "words", "nothing"]
"""What decides where a LoRA acts: the boxes, areas that the method finds itself, words of the prompt, or nothing."""


@dataclass(frozen=True)
class MethodLabel:
    """The labels of a method.

    Attributes:
        name: By what it does.
        paper: Its name in the paper or on the command line.
        keeps_boxes: Whether boxes that are there decide instead of areas that it finds.
    """

    name: str
    paper: str
    sentence: str
    decides: Decides
    keeps_boxes: bool = False

    @property
    def knows_places(self) -> bool:
        """Whether each subject has a place, which the LoRAs of others keep off."""
        return self.decides in ("boxes", "found areas")


MERGER_LABELS: Mapping[str, tuple[str, str]] = {
    "cat": ("Add up", "The exact sum: as with all of them loaded, in one file."),
    "svd": ("Add up, compact", "The same sum without ranks that add nothing."),
    "ties": ("Elect signs", "TIES: small entries go, and where LoRAs disagree the majority wins."),
    "dare": ("Drop at random", "DARE: half of the entries go, the rest is doubled."),
    "tsv": ("Untangle", "TSV: what LoRAs share acts once. For versions of one subject."),
    "lego": ("Join what is alike", "LoRA-LEGO: ranks that are alike become one."),
    "np": ("Protect the style", "NP-LoRA: first the subject, then the style, which stays as it is."),
    "k-lora": ("Layer by layer", "K-LoRA: first the subject, then the style; each layer takes mostly one of them."),
    "soups": ("Weigh each layer", "LoRA Soups: makes an image with each LoRA, then finds weights for each layer."),
    "ssr": ("Sort by input", "SSR-Merge: makes an image with each LoRA, then leads its inputs to it."),
    "iteris": ("Sort by input, again", "IterIS: as before, and again with what the merged layers read."),
}
"""Ways of merging files, in the page's words: a name, and what it does."""

METHOD_LABELS: Mapping[str, MethodLabel] = {
    "draft": MethodLabel(
        "By subjects", "draft",
        "A few first steps show where the model puts each subject, and each LoRA acts there. Boxes are kept, and not "
        "needed.",
        "found areas", keeps_boxes=True,
    ),
    "regional": MethodLabel(
        "In boxes", "regional",
        "Each LoRA acts in its box only. Nothing moves the subjects into their boxes.", "boxes",
    ),
    "lora-composer": MethodLabel(
        "In boxes, moved", "LoRA-Composer",
        "Each box has its own text and LoRA, and the subjects are moved into their boxes.", "boxes",
    ),
    "clora": MethodLabel(
        "By words", "CLoRA",
        "Finds each concept by its words while the image is made, and moves concepts apart. Needs no boxes.",
        "found areas",
    ),
    "tara": MethodLabel(
        "By trained words", "TARA", "Each LoRA acts on its own trigger. Best for LoRAs that were trained with TARA.",
        "words",
    ),
    "merge": MethodLabel(
        "Added up", "merge", "All LoRAs act everywhere, as in most tools. Subjects may blend.", "nothing",
    ),
    "switch": MethodLabel(
        "Taking turns", "LoRA Switch", "One LoRA at a time, the next one every few steps.", "nothing",
    ),
    "freefuse": MethodLabel(
        "By subjects, as published", "FreeFuse",
        "A third of the steps shows where the model puts each subject, and each LoRA acts there. Needs no boxes.",
        "found areas",
    ),
    "composite": MethodLabel(
        "Averaged", "LoRA Composite", "The average of what the model predicts with each LoRA alone.", "nothing",
    ),
}  # fmt: skip

_RULE = "How the strength is measured"
_UNTIL = "(share of the steps)"
SETTING_LABELS: Mapping[str, Mapping[str, str]] = {
    "lora-composer": {
        "inject": "Where a LoRA acts in its box",
        "rows": "LoRAs act on",
        "isolate": "Boxes do not see each other",
        "threshold": "How much of a cell a box has to cover",
        "step_size": "Strength of moving into the boxes",
        "step_rule": _RULE,
        "step_decay": "How fast the strength falls",
        "least_updates": f"Move at least until {_UNTIL}",
        "most_updates": f"Move at most until {_UNTIL}",
        "ce_weight": "Weight of: words stay in their box",
        "fill_weight": "Weight of: the subject fills its box",
        "region_weight": "Weight of: nothing outside the box",
        "gaussian": "Prefer the middle of a box",
        "reinit": "Rearrange the noise before the start",
        "apart": f"Make each box alone until {_UNTIL}",
        "apart_side": "Smallest side of a box made alone (share)",
        "background": "What the background reads",
    },
    "regional": {
        "rows": "LoRAs act on",
        "token_mask": "Words that a LoRA changes",
        "texts": "What the boxes read",
        "background": "What everything reads besides",
        "isolate": f"Boxes do not see each other at first {_UNTIL}",
        "norm_apart": f"Contrast of each box apart until {_UNTIL}",
        "limit": "Most that LoRAs change together",
    },
    "draft": {
        "length": "Length of the draft (share of the steps)",
        "layers": "Layers of the model that show where subjects are; empty is its own",
        "threshold": "How sure a cell of a subject has to be",
        "division": "How the image is divided",
        "reading": "What each place reads",
        "background": "What the background reads",
        "apart": f"Make each area alone until {_UNTIL}",
        "isolate": f"Areas do not see each other at first {_UNTIL}",
        "bias": "How strongly areas read their own words",
        "bias_steps": f"Areas read their own words more until {_UNTIL}",
        "norm_apart": f"Contrast of each area apart until {_UNTIL}",
        "keep_regions": "Keep your boxes",
        "token_mask": "Words that a LoRA changes",
        "leftover": "Leave out cells below (share of the highest)",
        "drafts": "Drafts at most",
        "spacing": "Space that subjects have to have",
        "restart": "Start the image again after its draft",
        "limit": "Most that LoRAs change together",
    },
    "clora": {
        "fuse": "How concepts are joined",
        "uncond": "Pass for the negative prompt",
        "step_size": "Strength of moving concepts apart",
        "step_rule": _RULE,
        "update_until": f"Move concepts until {_UNTIL}",
        "refine_at": "Move more at these shares of the steps",
        "refinements": "How often it moves there",
        "temperature": "Softness of the contrast between concepts",
        "threshold": "How sure a cell of an area has to be",
        "smoothed": "Smooth what was found",
        "exclusive": "A cell belongs to one concept only",
        "morphology": "Grow or shrink the areas",
        "mask_from": f"Areas count from {_UNTIL}",
        "mask_until": f"Areas stay as they are from {_UNTIL}",
        "isolate": "Areas do not see each other",
        "whole": "Move as the authors' code does",
        "branch_batch_size": "Passes at once; fewer need less memory",
        "base_prompt": "Prompt of the background",
        "words": "Words that name each concept",
        "mask_words": "Words that find each concept's area",
    },
    "freefuse": {
        "length": "Steps without LoRAs (share of the steps)",
        "words": "Words that show where a subject is",
        "share": "Cells that stand for a subject (share)",
        "temperature": "Softness of the areas; empty fits the model",
        "own_bias": "Draw areas to their own words",
        "other_bias": "Draw areas to the words of others",
        "rows": "LoRAs act on",
    },
    "tara": {"cfg_mask": "LoRAs act on", "scope": "What a LoRA changes", "limit": "Most that LoRAs change together"},
    "switch": {"interval": "Steps of a turn"},
    "composite": {"shares": "Share of each LoRA"},
    "merge": {"limit": "Most that LoRAs change together"},
}

_CHOICES: Mapping[tuple[str, str], str] = {
    ("inject", "attn2"): "on the text only",
    ("inject", "full"): "in all layers",
    ("inject", "off"): "nowhere",
    ("rows", "cond_only"): "the prompt",
    ("rows", "all"): "both prompts",
    ("cfg_mask", "cond_only"): "the prompt",
    ("cfg_mask", "broadcast"): "both prompts",
    ("scope", "all"): "all layers",
    ("scope", "cross_kv"): "how text is read",
    ("token_mask", "tara"): "its trigger, if trained so",
    ("token_mask", "all"): "its trigger",
    ("token_mask", "phrase"): "its trigger and class word",
    ("token_mask", "others"): "all but those of others",
    ("token_mask", "image"): "none",
    ("token_mask", "none"): "all",
    ("step_rule", "raw"): "as published",
    ("step_rule", "rms"): "evened out",
    ("reinit", "copy"): "copy",
    ("reinit", "swap"): "swap",
    ("background", "surroundings"): "all but the concepts",
    ("background", "scene"): "the scene in plain words",
    ("words", "class_word"): "class word",
    ("words", "phrase"): "trigger and class word",
    ("fuse", "regions"): "in one pass",
    ("fuse", "branches"): "a pass each",
    ("uncond", "shared"): "shared by all concepts",
    ("uncond", "each"): "one for each concept",
}


def label_of(method: str) -> MethodLabel:
    """A method's label; a method without one is called as on the command line."""
    return METHOD_LABELS.get(method) or MethodLabel(method, "", "", "nothing")


def full_name(method: str) -> str:
    """The label of a method, with its name in the paper."""
    label = label_of(method)
    return f"{label.name} · {label.paper}" if label.paper else label.name


def methods() -> list[str]:
    """All methods, the most useful first."""
    return [*METHOD_LABELS, *(method for method in METHODS if method not in METHOD_LABELS)]


SHOWN_METHODS = ("regional", "merge")
"""The methods beside the automatic choice that need no further knowledge: in boxes, and added up."""


def setting_label(method: str, name: str) -> str:
    """The label of a setting."""
    return SETTING_LABELS.get(method, {}).get(name) or name.replace("_", " ")


def choice_label(setting: str, value: Any) -> str:
    """The label of a value of a setting."""
    return _CHOICES.get((setting, value)) or str(value)
