"""Kinds that are named and refused. One that becomes readable leaves this list for a file of its own."""

from lora_compose.pipelines.formats.kinds.kind import Kind

_UNSUPPORTED = "that is not supported"
REFUSED = (  # several tensors of a layer may be in one slot
    Kind("early OFT", {"oft_diag": r"\.oft_diag"},
         refused="an OFT of an early LyCORIS, whose numbers mean something else"),
    Kind("GLoRA", {"glora": r"\.(?:[ab][12]|bm)\.weight"},
         refused=f"a GLoRA, which multiplies the model's own weights; {_UNSUPPORTED}"),
    Kind("IA3", {"ia3": r"\.on_input"}, refused=f"an IA3, which rescales activations; {_UNSUPPORTED}"),
    Kind("an adapter of another kind",
         {"other": r"\.(?:vera|randlora|boft|hra|shira|bone|vblora)_\w++(?:\.\w++){0,3}+"},
         refused="an adapter of an unknown kind"),
)  # fmt: skip
LEFT_OUT = Kind(
    "biases and norms",
    {"bias": r"\.lora_(?:[AB](?:\.\w++)?|down|up)\.bias|\.diff_b", "norm": r"\.[wb]_norm"},
    left_out=True,
)
"""What no low-rank change of a weight can express."""
