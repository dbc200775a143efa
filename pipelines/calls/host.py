"""The host of a call, as planning and the loop need it: one of our pipelines, or another program that paints."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from lora_compose.attention import Backbone, BankCache
from lora_compose.pipelines.calls.call import Call, Sampling
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.denoising.sampler import Schedule
from lora_compose.pipelines.images.from_image import Source
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.scene.scene import ConceptNames
from lora_compose.pipelines.text.textual_inversion import ReadsText, TextualInversions
from lora_compose.pipelines.text.tokens import Tokenizer


class Host(ReadsText, Protocol):
    """A model with its text encoders, its scheduler, and the concepts that it knows. Planning changes nothing of it."""

    scheduler: Any
    vae_scale_factor: int
    reads_weights: ClassVar[bool]
    """Whether prompts may have weights."""
    reads_in_chunks: ClassVar[bool]
    """Whether prompts may be longer than a text encoder reads at once."""

    @property
    def components(self) -> Mapping[str, Any]:
        """Models and tokenizers by diffusers' names."""
        ...

    @property
    def own_size(self) -> tuple[int, int]:
        """Width and height in pixels of the images that the model was made for."""
        ...

    @property
    def banks(self) -> BankCache:
        """LoRAs that are kept for the next calls."""
        ...

    def resolve_concepts(self, concepts: ConceptNames) -> tuple[LoadedConcept, ...]:
        """Concepts with their factors; raises ValueError for unknown names and names given twice."""
        ...

    def backbone_of(self, call: Call) -> Backbone:
        """The backbone of a call."""
        ...

    def prompt_tokenizers(self, textual_inversions: TextualInversions, length: int | None) -> Sequence[Tokenizer]:
        """The tokenizers of the prompt, for texts of so many tokens; None means as many as the tokenizer says."""
        ...

    def check_start(self, call: Call, canvas: Canvas) -> None:
        """Raises ValueError if the latents that a call is to start from have a shape that cannot be used."""
        ...

    def schedule(self, scheduler: Any, sampling: Sampling, canvas: Canvas, source: Source | None) -> Schedule:
        """Sets the timesteps of a scheduler, and of nothing else.

        Args:
            scheduler: The host's own, or a copy of it.
            source: The image to start from; None means text-to-image.

        Raises:
            ValueError: If the scheduler refuses the steps, or none is left of them.
        """
        ...
