"""Concepts in a model of ComfyUI: their files are read, their words found, and the texts encoded."""

import logging
from collections.abc import Sequence
from typing import Any

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.sd  # pyright: ignore[reportMissingImports]

from lora_compose.attention import Lora
from lora_compose.compose.comfyui.concepts import ComposeRequest, NodeConcept
from lora_compose.compose.comfyui.families import family_of
from lora_compose.compose.comfyui.files import read_concept, read_text_encoders
from lora_compose.compose.comfyui.hooks import compose, marked
from lora_compose.pipelines.formats.files import LoraFile, read_lora

logger = logging.getLogger("lora_compose")


def factors_in(model: Any, file: LoraFile, *, products: bool = True) -> Lora:
    """The factors of a file for a model; what is left out is said in the log. Arguments: `read_concept`."""
    network = model.model.diffusion_model
    names, sites = comfy.lora.model_lora_keys_unet(model.model, {}), family_of(network).sites
    lora, notes = read_concept(file, network, names, sites, products=products)
    for note in notes:
        logger.warning("%s: %s", file.path.name, note)
    return lora


def composed(
    model: Any, clip: Any, concepts: Sequence[NodeConcept], text: str, method: str, texts: str = "auto"
) -> tuple[Any, Any]:
    """A model in which concepts act, and the conditioning for it. Arguments and errors: `ComposeRequest`."""
    if clip is None:  # ComfyUI gives it where a checkpoint has none
        raise ValueError("the checkpoint has no CLIP, which reads the text; connect that of a CLIP loader")
    files = [None if concept.path is None else read_lora(concept.path) for concept in concepts]
    loras = [{} if file is None else factors_in(model, file) for file in files]
    parts = [{} if file is None else read_text_encoders(file) for file in files]
    names, used = [concept.scene.name for concept in concepts], set()

    def encode(text: str, which: Sequence[int]) -> Any:
        encoder = clip
        for i in which:
            weight = concepts[i].weight.constant
            if parts[i] and weight is None and i not in used:
                logger.warning("%s: its LoRA of text encoders is left out, since texts are read once", names[i])
            elif parts[i] and weight:
                encoder = comfy.sd.load_lora_for_models(None, encoder, {**parts[i]}, 0, weight)[1]
            used.add(i)
        return encoder.encode_from_tokens_scheduled(encoder.tokenize(text))

    joint = family_of(model.model.diffusion_model).joint is not None
    composition, conditioning = ComposeRequest(concepts, loras, clip, encode, text, texts, joint).composed(method)
    for i, part in enumerate(parts):
        if part and i not in used:
            logger.warning("%s: its LoRA of text encoders is left out, since all read one text", names[i])
    return compose(model, composition), marked(conditioning, composition)
