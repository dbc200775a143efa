"""What can be judged of a run before its model is opened, which takes minutes for a large one."""

from pathlib import Path

from lora_compose.compose.files.paths import model_source
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.compose.playground.assets import lora_source
from lora_compose.pipelines.formats.files import read_words, refuse_format
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.scene.scene import Concept, Run, check_box
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.text.emphasis import plain_text
from lora_compose.pipelines.text.tokens import check_all_named


def check_early(run: Run) -> None:
    """Checks method, settings, LoRA files on this machine, triggers in the prompt, and boxes, by headers alone.

    Raises:
        ValueError: For the first problem, as a call would raise it after the model was opened.
    """
    if run.method is not None:
        make_method(run.method, run.settings)
    check_all_named(map(_with_words, run.scene.concepts), plain_text(run.scene.prompt))
    scene, source = run.scene, model_source(run.model)
    if scene.image is None and not scene.references and source.is_dir():  # otherwise the size may be theirs
        own = facts_of(run.model).own_size or (None, None)
        for concept in scene.concepts:
            check_box(concept, scene.width or own[0], scene.height or own[1])


def _with_words(concept: Concept) -> Concept:
    """A concept with the words in the header of its first file, if that is on this machine."""
    for number, source in enumerate(files_of(concept.lora)):
        path = Path(lora_source(source)).expanduser()
        if path.is_file():
            refuse_format(path)
            in_file = read_words(path)
            if number == 0:
                words = {
                    "trigger": concept.trigger or in_file.trigger,
                    "class_word": concept.class_word or in_file.class_word,
                }
                concept = concept.model_copy(update=words)
    return concept
