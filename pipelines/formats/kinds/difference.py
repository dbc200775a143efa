"""A whole difference of a weight, as it is (LyCORIS' `full`, extracted checkpoints)."""

from lora_compose.pipelines.formats.kinds.kind import Kind, columns, rows

DIFFERENCE = Kind(
    "whole differences",
    {"diff": r"\.diff"},
    sides=lambda shapes: (rows(shapes, "diff"), columns(shapes, "diff")),
    delta=lambda tensors: tensors["diff"],
    scaled=False,
    of_norms=True,
)
