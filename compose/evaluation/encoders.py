"""Image and text encoders for scoring: CLIP, SigLIP and DINOv2, by name or folder, through transformers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers.utils.logging as transformers_logging
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from lora_compose.compose.files.paths import is_hub_name
from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUNDS, playground_judge
from lora_compose.compose.support.quiet import without_bars
from lora_compose.pipelines.support.home import expanded

logger = logging.getLogger(__name__)

JUDGES = tuple(f"{model}:judge" for model in PLAYGROUNDS)
"""Names of the encoder that comes with lora-compose: the playgrounds have the same concepts."""
JUDGE = f"{PLAYGROUND}:judge"
IMAGES_AND_TEXTS = ("clip", "siglip", "siglip2")
IMAGES_ONLY = ("dinov2", "dinov2_with_registers")


class Encoder:
    """Encodes images, and with some models texts; `load_encoder` makes one.

    Images are resized and normalised by the model's own processor, computed with Pillow and numpy whether or not
    torchvision is there. The processors of CLIP and DINOv2 usually cut off what is not square. Embeddings do not depend
    on the batch size.
    """

    def __init__(
        self, name: str, model: Any, processor: Any, tokenizer: Any | None = None, batch_size: int = 64
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self._model = model
        self._processor = processor
        self._tokenizer = tokenizer
        self._has_warned = False

    @property
    def has_text(self) -> bool:
        """Whether the model encodes texts as well."""
        return self._tokenizer is not None

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embeddings of images of any size and mode. Shape: [n, channels] of length 1, float32 on the CPU."""
        return self._in_batches(self._encode_images, images, Image.new("RGB", (1, 1)))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings of texts; too long ones are cut off with one warning. Raises ValueError if the model has none."""
        if not self.has_text:
            raise ValueError(
                f"the encoder {self.name!r} has no texts; those that have are of {', '.join(IMAGES_AND_TEXTS)}"
            )
        return self._in_batches(self._encode_texts, texts, "")

    def _in_batches(self, encode: Callable[[Sequence], torch.Tensor], items: Sequence, blank: Any) -> torch.Tensor:
        if not len(items):
            return encode([blank])[:0]  # [0, channels]
        starts = range(0, len(items), self.batch_size)
        return torch.cat([encode(items[start : start + self.batch_size]) for start in starts])

    @torch.no_grad()
    def _encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        inputs = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        encode = self._model.get_image_features if self.has_text else self._model
        return _unit(encode(**inputs.to(self._model.device)).pooler_output)

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self._tokenized(texts).to(self._model.device)
        return _unit(self._model.get_text_features(**inputs).pooler_output)

    def _tokenized(self, texts: Sequence[str]) -> Any:
        """Token ids, padded to the length of the model: SigLIP was trained so, and for CLIP it makes no difference."""
        config, tokenizer = self._model.config, self._tokenizer
        assert tokenizer is not None
        length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
        is_clip = config.model_type == "clip"
        # Both SigLIPs were trained on lower case, which not all of their tokenizers enforce.
        texts = list(texts) if is_clip else [text.lower() for text in texts]
        self._warn_of_long(tokenizer(texts, verbose=False).input_ids, length)
        # SigLIP's text model attends to the padding.
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_attention_mask": is_clip}
        inputs = tokenizer(texts, return_tensors="pt", **options)
        inputs.pop("token_type_ids", None)
        return inputs

    def _warn_of_long(self, ids: Sequence[Sequence[int]], length: int) -> None:
        longest = max(map(len, ids))
        if longest > length and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the encoder %r reads %d tokens and a text has %d: the end of such texts is not scored",
                self.name, length, longest,
            )  # fmt: skip


def load_encoder(source: str, device: str = "cpu") -> Encoder:
    """Opens an encoder: weights from safetensors only, in float32, whatever the precision of the file.

    `source` is `playground:judge`, `playground-flux:judge`, a folder as transformers saves it, or a hub repository such
    as openai/clip-vit-base-patch32. The embeddings are those that are compared in the papers: the projected ones of
    CLIP, the pooled ones of SigLIP and SigLIP 2, and of DINOv2 the class token after the last normalisation. The first
    SigLIP's own tokenizer needs the package sentencepiece. Raises ValueError if there is no such encoder, it is of
    another family, or it cannot be opened.
    """
    where, what, family = _locate(source), f"the encoder {source!r}", family_of(source)
    model, loading = _opened(
        what, AutoModel, where, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{what} lacks {len(missing)} of its weights, such as {missing[0]}; {_expected()}")
    processor = _opened(f"the image processor of {what}", AutoImageProcessor, where, backend="pil")
    tokenizer = _opened(f"the tokenizer of {what}", AutoTokenizer, where) if family in IMAGES_AND_TEXTS else None
    return Encoder(source, model.eval().requires_grad_(False).to(device), processor, tokenizer)


def family_of(source: str) -> str:
    """The family of an encoder, by its configuration alone. Raises ValueError if there is none that is known."""
    what = f"the encoder {source!r}"
    family = _opened(what, AutoConfig, _locate(source)).model_type
    if family not in (*IMAGES_AND_TEXTS, *IMAGES_ONLY):
        raise ValueError(f"{what} is of the family {family!r}; {_expected()}")
    return family


def _locate(source: str) -> str:
    """The source for `from_pretrained`."""
    if source in JUDGES:
        try:
            return str(playground_judge())
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
    path = expanded(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {source!r} has no config.json; {_expected()}")
        return str(path)
    if path.exists() or not is_hub_name(source):
        raise ValueError(
            f"there is no encoder {source!r}; expected {JUDGE}, a folder as transformers saves it, or a hub repository "
            "such as openai/clip-vit-base-patch32"
        )
    return source


def _opened(what: str, kind: Any, where: str, **options: Any) -> Any:
    try:
        with _quiet():
            return kind.from_pretrained(where, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files are not trusted, and libraries raise many kinds of errors
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"{what} cannot be opened; {_expected()}. What went wrong: {reason[:600]}") from error


def _expected() -> str:
    families = ", ".join((*IMAGES_AND_TEXTS, *IMAGES_ONLY))
    return f"expected a model of {families} as transformers saves it, with weights in safetensors"


@contextmanager
def _quiet() -> Iterator[None]:
    """Switches off log lines and progress bars of transformers inside this block."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return F.normalize(embeddings, dim=-1).cpu()
