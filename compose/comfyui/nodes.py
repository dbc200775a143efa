"""The ComfyUI nodes (V3 schema) that make images. Labels and tooltips are those of the Streamlit page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.samplers  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
import nodes as core  # ComfyUI's, which it has loaded under this name
import torch
from comfy_api.latest import ComfyExtension, io, ui  # pyright: ignore[reportMissingImports]
from torch import Tensor

from lora_compose.compose.comfyui import words
from lora_compose.compose.comfyui.composing import composed
from lora_compose.compose.comfyui.concepts import NodeConcept, boxes_of, chained, drawn, with_boxes, with_masks
from lora_compose.compose.comfyui.file_nodes import Concepts, InspectNode, MergeNode, choice, schema
from lora_compose.compose.comfyui.hooks import draft_alone
from lora_compose.compose.comfyui.refining import refined
from lora_compose.compose.comfyui.showing import previewed


class ConceptNode(io.ComfyNode):
    """A LoRA with its trigger, class word, weight and region; or a subject without a LoRA."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return schema(
            "Concept",
            "Concept",
            words.CONCEPT,
            inputs=[
                io.Combo.Input(
                    "lora", options=[words.NO_LORA, *folder_paths.get_filename_list("loras")], tooltip=words.LORA
                ),
                io.String.Input("trigger", default="", tooltip=words.TRIGGER),
                io.String.Input("class_word", default="", tooltip=words.CLASS_WORD),
                io.Float.Input("weight", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=words.WEIGHT),
                io.String.Input("box", default="", tooltip=words.BOX),
                io.String.Input("prompt", default="", optional=True, multiline=True, tooltip=words.PROMPT),
                io.String.Input("schedule", default="", optional=True, tooltip=words.SCHEDULE),
                io.Mask.Input("mask", optional=True, tooltip=words.MASK),
                Concepts.Input("concepts", optional=True, tooltip="The concepts before this one."),
            ],
            outputs=[Concepts.Output(display_name="concepts")],
        )

    @classmethod
    def execute(cls, lora: str, concepts: Sequence[NodeConcept] = (), **given: Any) -> Any:
        """Adds a concept to those before it. Further arguments: `NodeConcept.of`."""
        path = None if lora == words.NO_LORA else Path(folder_paths.get_full_path_or_raise("loras", lora))
        return io.NodeOutput(chained(concepts, NodeConcept.of(path, **given)))


class BoxesNode(io.ComfyNode):
    """The boxes of several concepts."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return schema(
            "Boxes",
            "Boxes",
            "Gives each concept its box. The masks show them: connect them to a MaskPreview.",
            inputs=[
                Concepts.Input("concepts"),
                io.String.Input("boxes", multiline=True, default="0,0,0.5,1\n0.5,0,1,1", tooltip=words.BOXES),
            ],
            outputs=[Concepts.Output(display_name="concepts"), io.Mask.Output(display_name="masks")],
        )

    @classmethod
    def execute(cls, concepts: Sequence[NodeConcept], boxes: str) -> Any:
        """The concepts with their boxes, and the boxes as masks."""
        placed = with_boxes(concepts, boxes_of(boxes))
        return io.NodeOutput(placed, drawn(placed))


class ComposeNode(io.ComfyNode):
    """Concepts and a text as a model and a conditioning; and the regions as masks."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return schema(
            "Compose",
            "Compose",
            "Lets concepts act in a model, in one pass. Connect the model and the conditioning to one sampler.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                Concepts.Input("concepts"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip=words.TEXT),
                choice("method", {"auto": words.AUTO, **words.METHODS}),
                io.Combo.Input("texts", options=["auto", "shared", "regions"], optional=True, tooltip=words.TEXTS),
            ],
            outputs=[
                io.Model.Output(),
                io.Conditioning.Output(),
                io.Mask.Output(display_name="masks", tooltip=words.MASKS),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, concepts: Sequence[NodeConcept], text: str, method: str, texts: str = "auto"
    ) -> Any:
        """Reads the files, finds the words, and encodes the texts."""
        return io.NodeOutput(*composed(model, clip, concepts, text, method, texts), drawn(concepts))


def sampled() -> list[Any]:
    """The inputs of a KSampler that say how it samples."""
    return [
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
        io.Int.Input("steps", default=20, min=1, max=10_000),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS),
    ]


class DraftPreviewNode(io.ComfyNode):
    """Where `draft` would let each concept act, for the price of the drafted steps."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return schema(
            "DraftPreview",
            "Draft preview",
            words.DRAFT_PREVIEW,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="That of Compose, with method draft."),
                io.Conditioning.Input("positive", tooltip="That of the same Compose."),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                *sampled(),
            ],
            outputs=[io.Image.Output(display_name="images"), io.Mask.Output(display_name="masks")],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, latent_image: Any, **how: Any) -> Any:
        """The division of the first image, and the map of each subject; and the regions of all concepts as masks."""
        draft = draft_alone(model, lambda: _sample(model, positive, negative, latent_image, **how))
        shown, masks = previewed(draft)
        return io.NodeOutput(shown, masks, ui=ui.PreviewImage(shown, cls=cls))


class RefineNode(io.ComfyNode):
    """Repaints the subjects of images."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return schema(
            "Refine",
            "Refine subject",
            words.REFINE,
            inputs=[
                io.Image.Input("image"),
                io.Model.Input("model", tooltip="That of your checkpoint, not that of Compose."),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.Conditioning.Input("negative"),
                Concepts.Input("concepts"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip=words.REFINED_TEXT),
                io.Int.Input("size", default=1024, min=64, max=4096, step=16, tooltip=words.REFINED_SIZE),
                *sampled(),
                io.Float.Input("denoise", default=0.5, min=0.01, max=1.0, step=0.01, tooltip=words.DENOISE),
                io.Mask.Input("masks", optional=True, tooltip=words.REFINED_MASKS),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, image: Tensor, model: Any, clip: Any, vae: Any, negative: Any, concepts: Sequence[NodeConcept], text: str,
        size: int, masks: Tensor | None = None, **how: Any,
    ) -> Any:  # fmt: skip
        """The images, with each subject repainted."""

        def repaint(acting: Sequence[NodeConcept], own: str, part: Tensor, mask: Tensor) -> Tensor:
            clone, positive = composed(model, clip, acting, own, "merge")
            # One by one: VAEs of videos take several images as the frames of one video.
            samples = torch.cat([vae.encode(image) for image in part.split(1)])
            latent = {"samples": samples, "noise_mask": mask[None]}
            made = vae.decode(_sample(clone, positive, negative, latent, **how))
            return made.flatten(0, -4)  # VAEs of videos add a dimension of frames

        placed = concepts if masks is None else with_masks(concepts, masks)
        return io.NodeOutput(refined(image[..., :3], placed, text, size, repaint))


def _sample(model: Any, positive: Any, negative: Any, latent: Any, **how: Any) -> Tensor:
    """Latents, as KSampler makes them."""
    run: Any = core.common_ksampler  # pyright: ignore[reportAttributeAccessIssue]  # to pyright it is this module
    return run(model, positive=positive, negative=negative, latent=latent, **how)[0]["samples"]


class Extension(ComfyExtension):
    """The list of nodes that ComfyUI asks for."""

    async def get_node_list(self) -> list[type]:
        """All of them."""
        return [ConceptNode, BoxesNode, ComposeNode, DraftPreviewNode, RefineNode, MergeNode, InspectNode]
