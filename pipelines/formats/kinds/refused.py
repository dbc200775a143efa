"""Kinds that are named and refused. One that becomes readable leaves this list for a file of its own."""

from lora_compose.pipelines.formats.kinds.kind import Kind

_GATED = "only low-rank changes can be gated"
REFUSED = (  # several tensors of a layer may be in one slot
    Kind("DoRA", {"magnitude": r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w++){0,3}+)"}, setting="use_dora",
         refused=f"a DoRA, which rescales the model's own weights; {_GATED}"),
    Kind("OFT", {"oft": r"\.(?:oft_(?:blocks|diag)|oft_R\.(?:\w++\.)?weight|rescale)"},
         refused=f"an OFT, which rotates the model's own weights; {_GATED}"),
    Kind("GLoRA", {"glora": r"\.(?:[ab][12]|bm)\.weight"},
         refused=f"a GLoRA, which multiplies the model's own weights; {_GATED}"),
    Kind("IA3", {"ia3": r"\.on_input"}, refused=f"an IA3, which rescales activations; {_GATED}"),
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
