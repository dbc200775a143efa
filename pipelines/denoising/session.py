"""The session of a method: one concept set, its prompts and the denoiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lora_compose.attention import SitePart
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.denoising.attention_log import AttentionLog
from lora_compose.pipelines.denoising.guidance import Guider
from lora_compose.pipelines.denoising.passes import AttentionMaps, Gradient, MapLoss, MapRequest, Pass, Prediction
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.sampler import Sampler
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.text.encoder import Prompts


class Runner(Protocol):
    """The interface of `Denoiser` for methods; the benchmark has another one, which only counts costs."""

    @property
    def canvas(self) -> Canvas:
        """Sizes of the images."""
        ...

    @property
    def log(self) -> AttentionLog:
        """Attention maps and masks of the recorded steps."""
        ...

    @property
    def sampler(self) -> Sampler:
        """The scheduler and its timesteps."""
        ...

    def ahead(self, sampler: Sampler) -> "Runner":
        """The denoiser for steps of a draft, with a copy of the sampler; they are not recorded."""
        ...

    @property
    def has_controlnet(self) -> bool:
        """Whether there is a ControlNet, which reads a text for the whole image."""
        ...

    @property
    def has_values(self) -> bool:
        """Whether attention maps say something; otherwise costs are counted, and what depends on maps costs most."""
        ...

    def fold(self, parts: Sequence[SitePart], weights: Sequence[float]) -> None:
        """Adds LoRAs with constant gates to the weights for the rest of the call."""
        ...

    def prepare(self, spec: Pass, same_text_as: PreparedPass | None = None) -> PreparedPass:
        """Prepares a pass, to be run in every step."""
        ...

    def predict(
        self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest | None = None
    ) -> Prediction:
        """One forward pass."""
        ...

    def maps(self, latents: Tensor, step: Step, prepared: PreparedPass, request: MapRequest) -> AttentionMaps:
        """Attention maps alone."""
        ...

    def gradient(self, latents: Tensor, step: Step, prepared: PreparedPass, wanted: MapLoss) -> Gradient:
        """The gradient of a loss on attention maps."""
        ...


class SetRunner(Runner, Protocol):
    """A runner of all concept sets of a call."""

    def of_set(self, concepts: ConceptSet, images: Sequence[int]) -> Runner:
        """The runner of one of several concept sets, with these images of the batch."""
        ...


@dataclass(frozen=True)
class Session:
    """One concept set of a call, its prompts, and the denoiser with its LoRAs installed."""

    concepts: ConceptSet
    prompts: Prompts
    denoiser: Runner
    guider: Guider

    @property
    def canvas(self) -> Canvas:
        """Sizes of the set's images."""
        return self.denoiser.canvas

    @property
    def log(self) -> AttentionLog:
        """Attention maps and masks of the recorded steps."""
        return self.denoiser.log
