"""Kinds of scenes: how many subjects, whether two have one class, and how closely they interact."""

import pandas as pd

from lora_compose.compose.evaluation.suite import Suite, SuiteScene
from lora_compose.compose.evaluation.table import Evaluation, arm_names


def kind_of_scene(suite: Suite, scene: SuiteScene) -> str:
    """How many subjects a scene has, whether two of them have one class word, and how they interact, if it says so."""
    words = [(suite.concept(name).class_word or name).lower() for name in scene.concepts]
    alike = " of one class" if len(set(words)) < len(words) else ""
    how = "" if scene.interaction is None else f", {scene.interaction}"
    return f"{len(words)} subject{'s' if len(words) > 1 else ''}{alike}{how}"


def success_by_kind(evaluation: Evaluation) -> pd.DataFrame:
    """Mean success by row of the tables and kind of scene; a column for each kind, in the order of the suite.

    Empty if all scenes are of one kind.
    """
    suite = evaluation.suite
    kinds = {str(scene.name): kind_of_scene(suite, scene) for scene in suite.scenes}
    if len(columns := list(dict.fromkeys(kinds.values()))) < 2:
        return pd.DataFrame()
    images = evaluation.images.assign(kind=[kinds[str(scene)] for scene in evaluation.images["scene"]])
    found = {
        kind: [images["success"][(images["arm"] == arm) & (images["kind"] == kind)].mean() for arm in arm_names(suite)]
        for kind in columns
    }
    return pd.DataFrame(found, index=arm_names(suite))  # pyright: ignore[reportArgumentType]  # its stubs want an Index
