"""Recognises from all keys of a file which tool wrote it, and which model family it is for."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Size

from lora_compose.pipelines.formats import kinds
from lora_compose.pipelines.formats.keys import Key, Part, parse

# Other families, by words that only their layer names have; the last ones count only if no UNet block is named.
_FOREIGN = (
    (r"motion_modules|temporal_transformer", "AnimateDiff"),
    (r"lora_prior_|clip_txt_pooled_mapper", "Stable Cascade"),
    (r"joint_blocks|lora_te3_", "SD3"),
)
_UNET_BLOCKS = r"(?:down|up|input|output)_blocks|mid_block|middle_block"


@dataclass(frozen=True)
class Transformer:
    """A supported family of transformers, as its LoRA files are told from those of others.

    Attributes:
        name: Of the family; the names of several models begin with it.
        kind: diffusers' class.
        layers: A regular expression for names of layers that only it has.
        models: Models of one structure, by the width of most layers; none if there is one.
        others: Models of other families with the same names of layers, by width.
        architecture: A regular expression for what a header calls it.
    """

    name: str
    kind: str
    layers: str
    models: Mapping[int, str] = field(default_factory=dict)
    others: Mapping[int, str] = field(default_factory=dict)
    architecture: str = ""

    @property
    def names(self) -> Collection[str]:
        """The names of its models."""
        return self.models.values() or (self.name,)

    def of_width(self, width: int) -> str:
        """The model of a width; 0 is an unknown one."""
        sizes = {**self.models, **self.others}
        return sizes.get(width, f"{self.name} of another size") if self.models and width else self.name


TRANSFORMERS: Sequence[Transformer] = (
    Transformer("Anima", "CosmosTransformer3DModel",
        r"(?<![a-z])blocks[._]\d+[._](?:cross_attn[._]output_proj|adaln_modulation_(?:self_attn|cross_attn|mlp))"
        r"|(?<![a-z])blocks[._]\d+[._](?:(?:self|cross)_attn[._][qkv]_proj|mlp[._]layer[12])|llm_adapter"
        r"|text_conditioner[._]"
        r"|transformer_blocks[._]\d+[._]norm[123][._]linear_[12]",
        {2048: "Anima"}),
    # Its single blocks have the layers of FLUX.2's double ones, and no others have blocks for each mode.
    Transformer("FLUX.3", "Flux3Transformer2DModel",
        r"mode_blocks|(?:early|single)_stream_modulations"
        r"|single_transformer_blocks[._]\d+[._](?:attn[._]to_out[._]0|ff)[._]"
        r"|single_blocks[._]\d+[._](?:[qkv]_proj|attn_out|mlp_(?:in|out))"),
    Transformer("FLUX.2", "Flux2Transformer2DModel",
        r"to_qkv_mlp_proj|(?:single|double)_stream_modulation|ff(?:_context)?[._]linear_in",
        {3072: "FLUX.2-klein 4B", 4096: "FLUX.2-klein 9B", 6144: "FLUX.2-dev"}),
    Transformer("Krea 2", "Krea2Transformer2DModel",
        r"txtfusion|text_fusion|(?<![a-z])blocks[._]\d+[._](?:attn[._]w[qkvo]|mlp[._](?:gate|up|down))|attn[._]to_gate"),
    Transformer("Ideogram 4", "Ideogram4Transformer2DModel",
        r"layers[._]\d+[._](?:attention[._]o[._]|adaln_modulation)|llm_cond_proj|^conditional_transformer"),
    Transformer("Z-Image", "ZImageTransformer2DModel",
        r"layers[._]\d+[._](?:attention[._](?:to_[qkv]|to_out|qkv|out)|feed_forward[._]w[123])",
        {3840: "Z-Image"}, {2304: "Lumina 2", 4608: "Ideogram 4"}),
    # Attention alone is named as FLUX.1's and SD3's, which have no block 40.
    Transformer("Qwen-Image", "QwenImageTransformer2DModel",
        r"transformer_blocks[._]\d+[._](?:img|txt)_m(?:lp|od)[._]"
        r"|(?<!single_)transformer_blocks[._][45]\d[._]attn[._](?:add_[qkv]_proj|to_(?:[qkv]|out|add_out))",
        {3072: "Qwen-Image"}),
    Transformer("Chroma", "ChromaTransformer2DModel", r"distilled_guidance_layer", architecture=r"^chroma"),
    # Only kohya's OFT for FLUX.1 numbers the parts of a layer.
    Transformer("FLUX.1", "FluxTransformer2DModel",
        r"(?:double|single)_blocks[._]\d+[._]processor|(?:double|single)_blocks_\d+_\w+\.oft_blocks\.\d"
        r"|img_mod[._]lin|norm1_context|single_transformer_blocks[._]\d+[._]proj_(?:mlp|out)|modulation[._]lin"),
)  # fmt: skip
"""Supported transformers, the first that fits counts."""
_FLUX = r"single_transformer_blocks|double_blocks|single_blocks"  # of several families
_FLUX2 = next(known for known in TRANSFORMERS if known.name == "FLUX.2")
_FLUX1_WIDTH = 3072  # FLUX.2-klein 4B and FLUX.3 have the same, and fewer blocks
_FLUX2_WIDTHS = _FLUX2.models.keys() - {_FLUX1_WIDTH}  # which no other model with these names has
_FLUX3_SINGLE_BLOCKS = 28
_BESIDE_QKV = r"(?<!single_)transformer_blocks|double_blocks|single_blocks"
"""What a file of FLUX.1 has beside the queries, keys and values of single blocks, which FLUX.3 names alike."""
_ANIMA_SIDES = (2048, 1024)  # of keys and values that read the text
_KLEIN_BLOCKS = ((r"double_blocks|(?<!single_)transformer_blocks", 5), (r"single_(?:transformer_)?blocks", 20))
_UNLIKE_CHROMA = r"_mod[._]lin|norm1|modulation|(?:time|vector|guidance)_in[._]|time_text_embed"
"""Layers of FLUX.1 that Chroma, whose blocks are FLUX.1's, does not have."""
_FOREIGN_WITHOUT_UNET = (
    (r"adaln_single|caption_projection", "PixArt"),
    (r"add_q_proj|(?<![a-z_])transformer_blocks", "SD3 or another transformer of that kind"),
    (r"(?<![a-z])blocks[._]\d+[._](?:self_attn|cross_attn|attn1|attn2|attn|ffn)", "a transformer for video or images"),
    (r"(?:diffusion_model|transformer)[._]layers[._]\d+", "Lumina"),
    (r"^transformer\.|^lora_transformer_", "a diffusion transformer"),
)
_NOT_THESE = r"joint_blocks|motion_modules|adaln_single"
"""Other transformers whose layers have some of the same names (SD3, PixArt)."""

_ARCHITECTURES = (
    *((known.architecture, known.name) for known in TRANSFORMERS if known.architecture),
    (r"stable-diffusion-xl|^sdxl|^xl$", "SDXL"),
    (r"stable-diffusion-v2|^sd_?v?2|^sd2", "SD 2.x"),
    (r"stable-diffusion-v1|^sd_?v?1|^sd1", "SD 1.x"),
)
_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_READ_TEXT: Sequence[Part] = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Guess:
    """The model family that a file is for.

    Attributes:
        family: "SD 1.x", "SD 2.x", "SDXL", the name of another one, or None if it is unknown.
        supported: Whether lora-compose supports that family.
        why: The evidence.
    """

    family: str | None
    supported: bool
    why: tuple[str, ...]


def form(keys: Sequence[str]) -> str:
    """One line: the kind of adapter, and the tool whose key names it has."""
    parsed = [key for name in keys if (key := parse(name))]
    slots = {key.slot for key in parsed}
    present = [kind for kind in kinds.KINDS if not kind.left_out and not kind.endings.keys().isdisjoint(slots)]
    if not present:
        return "no adapter"
    # What rescales has the factors of another kind beside its own tensors.
    named = present[:1] if present[0].refused or present[0].transform else present[:2]
    return f"{' and '.join(kind.name for kind in named)}, keys of {_spelling(keys, parsed)}"


def _spelling(keys: Sequence[str], parsed: Sequence[Key]) -> str:
    suffixes, prefixes = {key.suffix for key in parsed}, {key.prefix for key in parsed}
    text = " ".join(keys)
    original = ", with the original checkpoint's block names" if re.search(r"input_blocks|output_blocks", text) else ""
    if any(suffix.startswith(".lora_layer.") for suffix in suffixes):
        return "a whole UNet with LoRA layers inside (TARA, SD 1.5)"
    if re.search(r"(?:double|single)_blocks\.\d+\.processor", text):
        return "XLabs (attention processors of FLUX.1)"
    if "_processor_" in " ".join(key.module for key in parsed):
        return "early diffusers (attention processors)"
    if any(suffix.startswith("_lora.") for suffix in suffixes):
        return "ED-LoRA (Mix-of-Show, LoRA-Composer)"
    if prefixes & {"lora_unet_", "oft_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"}:
        return f"kohya's scripts{original}"
    if prefixes & {"clip_l.", "clip_g.", "t5."}:
        return "the Open Model Initiative (OneTrainer)"
    if "lycoris_" in prefixes:
        return f"LyCORIS{original}"
    if any("diffusion_model." in prefix for prefix in prefixes):
        return f"ComfyUI{original}"
    if any(suffix.startswith((".lora.", ".lora_linear_layer.")) for suffix in suffixes):
        return "diffusers before PEFT, and TARA for SDXL"
    if any(prefix.startswith("base_model.model.") for prefix in prefixes):
        return "PEFT"
    if any(suffix.startswith((".lora_down", ".lora_up")) for suffix in suffixes):
        own = "transformer." in prefixes  # which Mix-of-Show's models do not have
        return "diffusers, with kohya's endings (OneTrainer)" if own else "ED-LoRA (Mix-of-Show, newer)"
    return "diffusers (PEFT's names)"


def is_of(guess: Guess, kind: str) -> bool:
    """Whether a guess is a model of diffusers' class, or may be: for classes that are not listed, any may."""
    own = next((known for known in TRANSFORMERS if known.kind == kind), None)
    return own is None or (guess.family or "").startswith(own.name)


def guess_family(shapes: Mapping[str, Size | Sequence[int]], metadata: Mapping[str, str]) -> Guess:
    """The family of models that a file is for."""
    text, reasons = "\n".join(shapes), _reasons(metadata)
    # Text encoders that also read images have blocks named as in some transformers.
    denoiser = "\n".join(key for key in shapes if (parsed := parse(key)) is None or parsed.part not in _READ_TEXT)
    if not re.search(f"{_UNET_BLOCKS}|{_NOT_THESE}", denoiser) and (guess := _transformer(denoiser, shapes, metadata)):
        return guess
    foreign = _FOREIGN if re.search(_UNET_BLOCKS, text) else (*_FOREIGN, *_FOREIGN_WITHOUT_UNET)
    for pattern, name in foreign:
        if match := re.search(pattern, text, re.MULTILINE):
            return Guess(name, False, (f"layers called {match[0]!r}", *reasons))
    seen = _from_shapes(shapes)
    families = list(dict.fromkeys(family for family, _ in seen))
    why = tuple(dict.fromkeys(reason for _, reason in seen))
    named = next((family for family, _ in _named(metadata)), None)
    if len(families) == 1:
        contrary = named is not None and named != families[0]
        return Guess(families[0], True, (*why, *((f"although {reasons[0]}",) if contrary else reasons)))
    if families:
        return Guess(None, False, ("signs of several families: " + "; ".join(why), *reasons))
    if named is not None:
        return Guess(named, named in _WIDTHS.values(), reasons)
    return Guess(None, False, ("neither its keys nor its metadata tell",))


def _transformer(text: str, shapes: Mapping[str, Size | Sequence[int]], metadata: Mapping[str, str]) -> Guess | None:
    """The family if it is a supported transformer."""
    reasons = _reasons(metadata)
    tables = [*((known.layers, known.name) for known in TRANSFORMERS), (_FLUX, "FLUX")]
    seen = next(((match[0], name) for pattern, name in tables if (match := re.search(pattern, text))), None)
    if seen is None:
        return _by_width(shapes, reasons)
    layer, name = seen
    why = [f"layers called {layer!r}"]
    as_chroma = name in ("FLUX", "FLUX.1") and not re.search(_UNLIKE_CHROMA, text)
    if as_chroma and any(family == "Chroma" for family, _ in _named(metadata)):
        return Guess("Chroma", True, (*reasons, *why))
    width, ratios = _main_width(shapes)
    if name == "FLUX":
        # The first layer of a single block has 7 outputs for each input in FLUX.1 and 9 in FLUX.2, of an MLP 4 and 6.
        name = "FLUX.1" if ratios & {4, 7} else "FLUX.2" if ratios & {6, 9} else name
        alike = not re.search(_BESIDE_QKV, text) and not _blocks(
            text, "single_transformer_blocks", _FLUX3_SINGLE_BLOCKS
        )
        if name == "FLUX" and alike:
            return Guess("FLUX.1 or FLUX.3", False, (*why, *reasons))
        if name == "FLUX" and width in _FLUX2_WIDTHS:
            name = "FLUX.2"
        elif name == "FLUX" and width == _FLUX1_WIDTH and any(_blocks(text, *of) for of in _KLEIN_BLOCKS):
            why.append("it has more blocks than FLUX.2-klein 4B")
            name = "FLUX.1"
        elif name == "FLUX":
            return Guess("FLUX.1 or FLUX.2", False, (*why, *reasons))
        else:
            why.append("by the ratio of outputs to inputs in its MLPs")
    if name == "FLUX.1" and as_chroma:
        why.append("layers of Chroma have the same names and sizes")
    family = next(known for known in TRANSFORMERS if known.name == name)
    if family.models and width:
        why.append(f"its layers have width {width}")
    model = family.of_width(width)
    return Guess(model, any(model in known.names for known in TRANSFORMERS), (*why, *reasons))


def _by_width(shapes: Mapping[str, Size | Sequence[int]], reasons: tuple[str, ...]) -> Guess | None:
    """Anima and FLUX.2, if attention that is named as in other models has their widths."""
    for (_, module), tensors in _layers(shapes).items():
        outputs, inputs = sides = _sides(tensors)
        if re.search(r"transformer_blocks[._]\d+[._]attn2[._]to_[kv]$", module) and sides == _ANIMA_SIDES:
            return Guess("Anima", True, ("cross-attention of width 2048 reads text of width 1024", *reasons))
        # The first letters may be missing (`names.present_name`).
        joint = re.search(r"sformer_blocks[._]\d+[._]attn[._](?:add_[qkv]_proj|to_[kv])$", module)
        if joint and inputs == outputs and inputs in _FLUX2_WIDTHS:
            name = _FLUX2.models[inputs]
            return Guess(name, True, (f"attention to text and image of width {inputs}", *reasons))
    return None


def _blocks(text: str, name: str, most: int) -> bool:
    """Whether there are more blocks of a name."""
    return any(int(number) >= most for number in re.findall(rf"(?:{name})[._](\d{{1,3}})[._]", text))


def _main_width(shapes: Mapping[str, Size | Sequence[int]]) -> tuple[int, set[int]]:
    """Inputs of most layers; and for the first layers of MLPs and of single blocks, outputs by input."""
    every = _layers(shapes).items()
    layers = [(module, *_sides(shapes)) for (part, module), shapes in every if part in ("unet", "transformer")]
    counted = Counter(inputs for _, _, inputs in layers if inputs)
    first = [layer for layer in layers if re.search(r"linear1$|_mlp_0$", layer[0])]
    return (counted.most_common(1)[0][0] if counted else 0), {
        outputs // inputs for _, outputs, inputs in first if inputs
    }


def _layers(shapes: Mapping[str, Sequence[int]]) -> Mapping[tuple[Part, str], dict[str, Sequence[int]]]:
    """The shapes of each layer's tensors, by slot."""
    layers: dict[tuple[Part, str], dict[str, Sequence[int]]] = {}
    for key, shape in shapes.items():
        if (parsed := parse(key)) and parsed.kind is not None:  # the others are numbers
            layers.setdefault((parsed.part, parsed.module), {})[parsed.slot] = shape
    return layers


def _sides(shapes: kinds.Shapes) -> tuple[int, int]:
    """Outputs and inputs of a layer according to its tensors; 0 if they do not tell."""
    try:
        outputs, inputs = (0, 0) if (kind := kinds.readable(shapes)) is None else kind.sides(shapes)
        return outputs or 0, inputs or 0
    except ValueError:
        return 0, 0


def _named(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Families named in the metadata, each with the text that names it."""
    named = []
    for key in ("modelspec.architecture", "ss_base_model_version", "base_model"):
        value = metadata.get(key) or ""
        architecture = value.rpartition("/")[2] if key == "base_model" else value.partition("/")[0]
        if value:
            known = next((name for pattern, name in _ARCHITECTURES if re.search(pattern, architecture.lower())), None)
            named.append((known or architecture, f"{key} says {value!r}"))
    return named


def _reasons(metadata: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(reason for _, reason in _named(metadata))


def _from_shapes(shapes: Mapping[str, Size | Sequence[int]]) -> list[tuple[str, str]]:
    """Families that layers and their widths point to, each with the reason."""
    seen, text = [], []
    for (part, module), tensors in _layers(shapes).items():
        width = _sides(tensors)[1]
        if part == "unet" and re.search(r"attn2_(?:processor_)?to_[kv]$", module) and width in _WIDTHS:
            seen.append((_WIDTHS[width], f"cross-attention reads text of width {width}"))
        elif part == "text_encoder_2":
            seen.append(("SDXL", "it has layers of a second text encoder"))
        elif re.search(r"attentions_\d_transformer_blocks_[2-9]|put_blocks_\d_1_transformer_blocks_[2-9]", module):
            seen.append(("SDXL", "it has more than two transformer blocks in a row"))
        elif part == "text_encoder" and re.search(r"q_proj$", module) and width in (768, 1024):
            text.append((_WIDTHS[width], f"its text encoder has width {width}"))
    return seen or text
