"""The files that a suite names, packed for nodes that share no folder with this machine."""

from pathlib import Path

from lora_compose.compose.cluster.packing import Packer, Parcel, union
from lora_compose.compose.evaluation.scoring import CAPTIONS, reference_files
from lora_compose.compose.evaluation.suite import Suite, SuiteConcept, moved_suite
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.pipelines.support.home import expanded


def pack(packer: Packer, suite: Suite) -> Parcel:
    """Everything that a suite names: models, LoRAs, references and images."""
    loras = {source for concept in suite.concepts for source in concept.loras.values()}
    references = union(_references(packer, concept) for concept in suite.concepts)
    packed = [references]

    def pack_one(source: str) -> str:
        if source not in references.moves:
            packed.append(packer.lora(source) if source in loras else packer.source(source))
        return source

    moved_suite(suite, pack_one)
    return union(packed)


def _references(packer: Packer, concept: SuiteConcept) -> Parcel:
    """Reference images, with the file beside them that says where the concept is."""
    references = concept.references
    if isinstance(references, str) and references.partition(":")[0] in PLAYGROUNDS:
        return Parcel()
    files = reference_files(concept)
    if isinstance(references, str):
        folder = expanded(references)
        return packer.together(references, folder, [*files, *_captions(folder)])
    pairs = zip(references, files, strict=True)
    return union(packer.together(name, file.parent, [file, *_captions(file.parent)], file) for name, file in pairs)


def _captions(folder: Path) -> list[Path]:
    path = folder / CAPTIONS
    return [path] if path.is_file() else []
