"""Encoders on small real models of every family, saved to folders as transformers saves them."""

import logging
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import transformers.utils.logging as transformers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchmetrics.multimodal import CLIPScore
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from components import tokenizer
from lora_compose.compose.evaluation import encoders
from lora_compose.compose.evaluation.encoders import IMAGES_AND_TEXTS, IMAGES_ONLY, load_encoder
from lora_compose.compose.evaluation.metrics import clip_t
from lora_compose.compose.playground.assets import PLAYGROUNDS, playground_model

FAMILIES = (*IMAGES_AND_TEXTS, *IMAGES_ONLY)
ONE_OF_EACH = ("clip", "siglip2", "dinov2")  # SigLIP is read as CLIP is, DINOv2 with registers as that without
TEXTS = ["a sks cat", "a blue robot on grass", "", "a red car and a dog", "dog", "a bear in the rain", "x", "an image"]
SIZE = {"height": 32, "width": 32}
LAYERS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 32, "patch_size": 16}
EYES = {**LAYERS, **PATCHES}
DINO: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **PATCHES}


def tokenizer_of(family: str) -> Any:
    """A small tokenizer; for SigLIP 2 its own kind, which transformers uses for any folder."""
    if family != "siglip2":
        return tokenizer()
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return Siglip2Tokenizer({letter: i for i, letter in enumerate(letters)}, model_max_length=64)


def model_of(family: str) -> tuple[Any, Any]:
    """A model with random weights, and its image processor."""
    torch.manual_seed(0)
    own = tokenizer_of(family)
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**LAYERS, **ids, "vocab_size": len(own), "max_position_embeddings": 32}
    if family == "clip":
        images = CLIPImageProcessorPil(size=SIZE, do_center_crop=False)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=EYES, projection_dim=12)), images
    if family == "siglip":
        return SiglipModel(SiglipConfig(text_config=text, vision_config=EYES)), SiglipImageProcessorPil(size=SIZE)
    if family == "siglip2":
        eyes = {**LAYERS, "patch_size": 16, "num_patches": 16}
        images = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
        return Siglip2Model(Siglip2Config(text_config=text, vision_config=eyes)), images
    images = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIZE)
    if family == "dinov2":
        return Dinov2Model(Dinov2Config(**DINO)), images
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=2)), images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in found.items():
        model, images = model_of(family)
        with torch.no_grad():
            for parameter in model.parameters():  # an untrained model gives nearly the same for everything
                if parameter.ndim > 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder)
        if family == "clip":
            CLIPProcessor(images, tokenizer_of(family)).save_pretrained(folder)
        else:
            images.save_pretrained(folder)
        if family in IMAGES_AND_TEXTS:
            tokenizer_of(family).save_pretrained(folder)
    return found


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: copytree(folders[family], tmp_path / "encoder")


def random_images(count: int = 5, seed: int = 0) -> list[Image.Image]:
    """Noise in squares, so that it does not vanish when it is made smaller, of several sizes."""
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    sizes = [(32, 32), (50, 40), (30, 64), (128, 128), (20, 20)]
    return [image.resize(sizes[i % 5], Image.Resampling.NEAREST) for i, image in enumerate(coarse)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


# Embeddings.


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_have_length_one_and_differ(folders: dict[str, Path], family: str) -> None:
    encoder = load_encoder(str(folders[family]))
    assert (encoder.name, encoder.has_text) == (str(folders[family]), family in IMAGES_AND_TEXTS)
    found = [encoder.images(random_images())]
    if encoder.has_text:
        found.append(encoder.texts(TEXTS))
    for embeddings in found:
        assert (embeddings.dtype, embeddings.device.type, embeddings.requires_grad) == (torch.float32, "cpu", False)
        assert embeddings.shape == (len(embeddings), 12 if family == "clip" else 16)
        close(embeddings.norm(dim=1), torch.ones(len(embeddings)))
        likeness = embeddings @ embeddings.T
        assert likeness.fill_diagonal_(0).max() < 0.9999


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_batches_leave_embeddings_as_they_are(folders: dict[str, Path], family: str) -> None:
    encoder = load_encoder(str(folders[family]))
    assert encoder.batch_size == 64
    images, texts = encoder.images(random_images()), encoder.texts(TEXTS) if encoder.has_text else None
    encoder.batch_size = 2
    close(encoder.images(random_images()), images)
    if texts is not None:
        close(encoder.texts(TEXTS), texts)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_nothing_gives_no_rows(folders: dict[str, Path], family: str) -> None:
    encoder = load_encoder(str(folders[family]))
    assert encoder.images([]).shape == (0, encoder.images(random_images(1)).shape[1])
    if encoder.has_text:
        assert encoder.texts([]).shape == (0, encoder.texts(["x"]).shape[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_images_may_have_any_mode_and_be_tiny(folders: dict[str, Path], family: str) -> None:
    encoder = load_encoder(str(folders[family]))
    gray = random_images(1)[0].convert("L")
    modes = [gray, gray.convert("RGB"), gray.convert("RGBA"), gray.convert("P")]
    embeddings = encoder.images(modes)
    close(embeddings, embeddings[:1].expand(4, -1))
    for size in [(1, 1), (3, 3), (1, 3), (3, 40), (40, 3)]:
        plain = Image.new("RGB", size, (200, 30, 60))
        close(encoder.images([plain]), encoder.images([plain.resize((40, 40)) if family != "siglip2" else plain]))


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_half_precision_files_are_computed_in_single_precision(copied: Callable[[str], Path], family: str) -> None:
    folder = copied(family)
    whole = load_encoder(str(folder)).images(random_images())
    AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    half = load_encoder(str(folder)).images(random_images())
    assert half.dtype == torch.float32
    assert not torch.equal(half.half().float(), half)
    torch.testing.assert_close(half, whole, rtol=0, atol=0.01)


@pytest.mark.parametrize("family", IMAGES_AND_TEXTS)
def test_similarities_are_those_of_the_model_itself(folders: dict[str, Path], family: str) -> None:
    encoder = load_encoder(str(folders[family]))
    model, images = AutoModel.from_pretrained(folders[family]).eval(), model_of(family)[1]
    padded = tokenizer_of(family)(TEXTS, padding="max_length", max_length=32, return_tensors="pt")
    if family != "clip":
        del padded["attention_mask"]  # SigLIP was trained without
    with torch.no_grad():
        logits = model(**padded, **images(random_images(), return_tensors="pt")).logits_per_image
        bias = 0 if family == "clip" else model.logit_bias
        expected = (logits - bias) / model.logit_scale.exp()
    close(encoder.images(random_images()) @ encoder.texts(TEXTS).T, expected)


@pytest.mark.parametrize("family", IMAGES_ONLY)
def test_dinov2_gives_its_class_token(folders: dict[str, Path], family: str) -> None:
    model, images = AutoModel.from_pretrained(folders[family]).eval(), model_of(family)[1]
    with torch.no_grad():
        tokens = model(**images(random_images(), return_tensors="pt")).last_hidden_state
    expected = tokens[:, 0] / tokens[:, 0].norm(dim=1, keepdim=True)
    close(load_encoder(str(folders[family])).images(random_images()), expected)


class _TensorClip(CLIPModel):
    """Gives tensors, as torchmetrics expects it from older transformers."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(super().get_image_features(*args, **kwargs), "pooler_output")  # noqa: B009 (not in its type)

    def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(super().get_text_features(*args, **kwargs), "pooler_output")  # noqa: B009 (not in its type)


@pytest.mark.filterwarnings("ignore:.max_length. is ignored:UserWarning")  # torchmetrics asks the tokenizer so
def test_clip_t_is_the_clip_score_of_torchmetrics(folders: dict[str, Path]) -> None:
    folder = folders["clip"]
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    reference = CLIPScore(lambda: (_TensorClip.from_pretrained(folder).eval(), processor))  # pyright: ignore[reportArgumentType]
    images, encoder = random_images(len(TEXTS)), load_encoder(str(folder))
    scores = clip_t(encoder.images(images), encoder.texts(TEXTS))
    assert (scores > 0).any()
    assert (scores == 0).any()
    for image, text, score in zip(images, TEXTS, scores, strict=True):
        reference.reset()
        reference.update(torch.from_numpy(np.array(image)).permute(2, 0, 1), text)
        assert score == pytest.approx(reference.compute().item(), abs=1e-3)


# Texts.


@pytest.mark.parametrize(("family", "word"), [("clip", " cat"), ("siglip", " cat"), ("siglip2", "x")])
def test_the_end_of_long_texts_is_cut_off_and_the_log_says_so_once(
    folders: dict[str, Path], family: str, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, own = load_encoder(str(folders[family])), tokenizer_of(family)
    full = next(word * n for n in range(40) if len(own(word * n).input_ids) == 32)
    fitting = encoder.texts([full])
    assert caplog.messages == []
    close(encoder.texts([f"{full} dog and a bear", full]), fitting.expand(2, -1))
    assert (encoder.texts([full[: -len(word)]]) - fitting).abs().max() > 1e-4
    encoder.texts(["dog " * 100])
    (message,) = caplog.messages
    assert "reads 32 tokens" in message
    assert encoder.name in message


def test_siglip_reads_small_letters_with_whatever_tokenizer_the_folder_has(copied: Callable[[str], Path]) -> None:
    folder = copied("siglip")
    for path in [*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("merges*")]:
        path.unlink()
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "dog": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    cat, big, dog = load_encoder(str(folder)).texts(["cat", "CAT", "dog"])
    close(big, cat)
    assert (dog - cat).abs().max() > 1e-3


@pytest.mark.parametrize("family", IMAGES_ONLY)
def test_texts_need_an_encoder_that_has_them(folders: dict[str, Path], family: str) -> None:
    encoder = load_encoder(str(folders[family]))
    with pytest.raises(ValueError, match="has no texts; those that have are of clip, siglip, siglip2") as caught:
        encoder.texts(["a cat"])
    assert encoder.name in str(caught.value)


# Sources.


@pytest.mark.parametrize("name", PLAYGROUNDS)
def test_the_judge_of_a_playground_has_a_name(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "playground_judge", lambda: folders["clip"])
    encoder = load_encoder(f"{name}:judge")
    assert encoder.name == f"{name}:judge"
    close(encoder.images(random_images()), load_encoder(str(folders["clip"])).images(random_images()))


def test_a_missing_judge_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise FileNotFoundError("the playground's judge is missing")

    monkeypatch.setattr(encoders, "playground_judge", missing)
    with pytest.raises(ValueError, match="the playground's judge is missing"):
        load_encoder("playground:judge")


@pytest.mark.parametrize("source", ["nowhere", "playground:other", "playground", "a/b/c", "", "./nowhere"])
def test_what_is_not_there_is_named_with_what_was_expected(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"playground:judge, a folder|has no config\.json") as caught:
        load_encoder(source)
    assert repr(source) in str(caught.value)


def test_a_hub_repository_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ValueError, match="'nobody/no-clip' cannot be opened; expected a model of clip, siglip"):
        load_encoder("nobody/no-clip")


def test_other_families_are_refused_and_those_that_work_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family 'clip_text_model'; expected a model of clip, siglip, siglip2, dinov"):
        load_encoder(str(playground_model() / "text_encoder"))
    (tmp_path / "config.json").write_text('{"model_type": "of another kind"}')
    with pytest.raises(ValueError, match="cannot be opened; expected a model of clip, siglip"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "lost", "message"),
    [
        ("clip", "model.safetensors", r"the encoder .* cannot be opened; .* weights in safetensors"),
        ("dinov2", "preprocessor_config.json", r"the image processor of the encoder .* cannot be opened"),
        pytest.param("siglip", "token*", r"the tokenizer of the encoder .* cannot be opened", marks=pytest.mark.slow),
    ],
)
def test_missing_files_are_reported(copied: Callable[[str], Path], family: str, lost: str, message: str) -> None:
    folder = copied(family)
    for path in folder.glob(lost):
        path.unlink()
    with pytest.raises(ValueError, match=message):
        load_encoder(str(folder))


def test_pickled_weights_are_not_opened(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights in safetensors"):
        load_encoder(str(folder))


def test_damaged_weights_are_reported(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be opened"):
        load_encoder(str(folder))


def test_missing_weights_do_not_become_random_ones(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, such as visual_projection\.weight"):
        load_encoder(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_prepared_without_torchvision(folders: dict[str, Path], family: str) -> None:
    assert load_encoder(str(folders[family]))._processor.backend == "pil"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_keeps_quiet_and_is_left_as_it_was(
    folders: dict[str, Path], family: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    verbosity, bars = library.level, transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    try:
        encoder = load_encoder(str(folders[family]))
        encoder.images(random_images())
        if encoder.has_text:
            encoder.texts([*TEXTS, "cat " * 100])
        assert transformers_logging.is_progress_bar_enabled()
        assert library.level == logging.WARNING
    finally:
        library.removeHandler(handler)
        library.setLevel(verbosity)
        if not bars:
            transformers_logging.disable_progress_bar()
    assert messages == []
    assert "%|" not in capfd.readouterr().err
