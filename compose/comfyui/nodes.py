"""The ComfyUI nodes (V3 schema): Concept, Boxes and Compose. Labels and tooltips are those of the Streamlit page."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.sd  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]

from lora_compose.compose.comfyui.concepts import Concept, boxes_of, composition_of, drawn, with_boxes
from lora_compose.compose.comfyui.families import family_of
from lora_compose.compose.comfyui.files import read_concept, read_text_encoders
from lora_compose.compose.comfyui.host import compose, marked
from lora_compose.compose.comfyui.words import (
    BOX,
    BOXES,
    CLASS_WORD,
    CONCEPT,
    MASK,
    METHODS,
    PROMPT,
    TEXT,
    TEXTS,
    TRIGGER,
    WEIGHT,
)

logger = logging.getLogger("lora_compose")
Concepts = io.Custom("LORA_COMPOSE_CONCEPTS")
CATEGORY = "lora-compose"


class ConceptNode(io.ComfyNode):
    """A LoRA with its trigger, class word, weight and region."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return io.Schema(
            node_id="LoraComposeConcept",
            display_name="Concept",
            category=CATEGORY,
            description=CONCEPT,
            inputs=[
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras")),
                io.String.Input("trigger", default="", tooltip=TRIGGER),
                io.String.Input("class_word", default="", tooltip=CLASS_WORD),
                io.Float.Input("weight", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=WEIGHT),
                io.String.Input("box", default="", tooltip=BOX),
                io.String.Input("prompt", default="", optional=True, multiline=True, tooltip=PROMPT),
                io.Mask.Input("mask", optional=True, tooltip=MASK),
                Concepts.Input("concepts", optional=True, tooltip="The concepts before this one."),
            ],
            outputs=[Concepts.Output(display_name="concepts")],
        )

    @classmethod
    def execute(
        cls,
        lora: str,
        trigger: str,
        class_word: str,
        weight: float,
        box: str,
        prompt: str = "",
        mask: Any = None,
        concepts: Any = (),
    ) -> Any:
        """Adds a concept to those before it."""
        path = Path(folder_paths.get_full_path_or_raise("loras", lora))
        return io.NodeOutput((*concepts, Concept.of(path, trigger, class_word, weight, box, mask, prompt)))


class BoxesNode(io.ComfyNode):
    """The boxes of several concepts."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return io.Schema(
            node_id="LoraComposeBoxes",
            display_name="Boxes",
            category=CATEGORY,
            description="Gives each concept its box. The masks show them: connect them to a MaskPreview.",
            inputs=[
                Concepts.Input("concepts"),
                io.String.Input("boxes", multiline=True, default="0,0,0.5,1\n0.5,0,1,1", tooltip=BOXES),
            ],
            outputs=[Concepts.Output(display_name="concepts"), io.Mask.Output(display_name="masks")],
        )

    @classmethod
    def execute(cls, concepts: Sequence[Concept], boxes: str) -> Any:
        """The concepts with their boxes, and the boxes as masks."""
        found = with_boxes(concepts, boxes_of(boxes))
        return io.NodeOutput(found, drawn(found))


class ComposeNode(io.ComfyNode):
    """Concepts and a text as a model and a conditioning."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return io.Schema(
            node_id="LoraComposeCompose",
            display_name="Compose",
            category=CATEGORY,
            description="Lets concepts act in a model, in one pass. Connect both outputs to one sampler.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                Concepts.Input("concepts"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip=TEXT),
                io.Combo.Input(
                    "method", options=[*METHODS], tooltip=" ".join(f"{name}: {said}" for name, said in METHODS.items())
                ),
                io.Combo.Input("texts", options=["auto", "shared", "regions"], optional=True, tooltip=TEXTS),
            ],
            outputs=[io.Model.Output(), io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, concepts: Sequence[Concept], text: str, method: str, texts: str = "auto"
    ) -> Any:
        """Reads the files, finds the words, and encodes the texts."""
        network = model.model.diffusion_model
        family, loras = family_of(network), []
        names = comfy.lora.model_lora_keys_unet(model.model, {})
        for concept in concepts:
            lora, notes = read_concept(concept.path, network, names, family.sites)
            for note in notes:
                logger.warning("%s: %s", concept.path.name, note)
            loras.append(lora)

        parts, used = [read_text_encoders(concept.path) for concept in concepts], set()

        def encode(text: str, which: Sequence[int]) -> Any:
            encoder = clip
            for i in which:
                if parts[i] and concepts[i].weight:
                    weight = concepts[i].weight
                    encoder = comfy.sd.load_lora_for_models(None, encoder, {**parts[i]}, 0, weight)[1]
                    used.add(i)
            return encoder.encode_from_tokens_scheduled(encoder.tokenize(text))

        composition, conditioning = composition_of(
            concepts, loras, clip, encode, text, method, texts, joint=family.joint is not None
        )
        for i, part in enumerate(parts):
            if part and i not in used:
                logger.warning(
                    "%s: its LoRA of text encoders is left out, since all read one text", concepts[i].path.name
                )
        return io.NodeOutput(compose(model, composition), marked(conditioning, composition))


class Extension(ComfyExtension):
    """The list of nodes that ComfyUI asks for."""

    async def get_node_list(self) -> list[type]:
        """All of them."""
        return [ConceptNode, BoxesNode, ComposeNode]


async def comfy_entrypoint() -> Extension:
    """What ComfyUI calls."""
    return Extension()
