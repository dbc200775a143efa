"""The ComfyUI nodes that read and write LoRA files: Merge to file and Inspect file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]

from lora_compose.compose.comfyui import words
from lora_compose.compose.comfyui.composing import factors_in
from lora_compose.compose.comfyui.concepts import NodeConcept
from lora_compose.compose.comfyui.merging import merge_concepts
from lora_compose.compose.comfyui.showing import merged_text, text_about
from lora_compose.pipelines.formats.files import LoraError, read_lora

Concepts = io.Custom("LORA_COMPOSE_CONCEPTS")


def schema(
    name: str, label: str, about: str, *, inputs: list[Any], outputs: list[Any], is_output_node: bool = False
) -> Any:
    """What ComfyUI asks of a node.

    Args:
        name: What workflows call it.
        is_output_node: Whether it runs also where nothing reads its outputs.
    """
    return io.Schema(
        node_id=f"LoraCompose{name}",
        display_name=label,
        category="lora-compose",
        description=about,
        inputs=inputs,
        outputs=outputs,
        is_output_node=is_output_node,
    )


def choice(name: str, options: Mapping[str, str]) -> Any:
    """The input for one of some options, of which each is described."""
    tooltip = " ".join(f"{option}: {about}" for option, about in options.items())
    return io.Combo.Input(name, options=[*options], tooltip=tooltip)


class MergeNode(io.ComfyNode):
    """Concepts merged into one file."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return schema(
            "Merge",
            "Merge to file",
            words.MERGE,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRAs are for."),
                Concepts.Input("concepts"),
                choice("method", words.MERGERS),
                io.String.Input("filename_prefix", default="loras/merged", tooltip=words.MERGED_NAME),
            ],
            outputs=[io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model: Any, concepts: Sequence[NodeConcept], method: str, filename_prefix: str) -> Any:
        """Writes the file, and says how much of each concept is in it."""
        files = [read_lora(concept.path) for concept in concepts if concept.path is not None]
        loras = [factors_in(model, file, products=False) for file in files]
        if any(factors.transform is not None for lora in loras for factors in lora.values()):
            # A DoRA or OFT is read from the weights, and as long as they are loaded, LoRA loaders are in them.
            comfy.model_management.unload_all_models()
        given = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        out = Path(given[0]) / f"{given[1]}_{given[2]:05}_.safetensors"
        said = merged_text(merge_concepts(concepts, loras, model.model.diffusion_model, method, out))
        return io.NodeOutput(said, ui=ui.PreviewText(said))


class InspectNode(io.ComfyNode):
    """What a LoRA file is."""

    @classmethod
    def define_schema(cls) -> Any:
        """What the node has."""
        return schema(
            "Inspect",
            "Inspect file",
            words.INSPECT,
            is_output_node=True,
            inputs=[
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras")),
                io.Model.Input("model", optional=True, tooltip="To see whether the LoRA fits this model."),
            ],
            outputs=[io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, lora: str, model: Any = None) -> Any:
        """The content of the file, in words."""
        file = read_lora(Path(folder_paths.get_full_path_or_raise("loras", lora)))
        said = text_about(file)
        if model is not None:
            try:
                fitting = factors_in(model, file)
                said += f"\nfits: {len(fitting)} layers of this model are changed"
            except LoraError as error:
                said += f"\nproblem: {error}"
        return io.NodeOutput(said, ui=ui.PreviewText(said))
