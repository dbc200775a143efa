"""What a method works with during one call."""

from dataclasses import dataclass

from lora_compose.pipelines.attention_log import AttentionLog
from lora_compose.pipelines.canvas import Canvas
from lora_compose.pipelines.concept_set import ConceptSet
from lora_compose.pipelines.denoiser import Denoiser
from lora_compose.pipelines.guidance import Guider
from lora_compose.pipelines.prompt_encoder import Prompts


@dataclass(frozen=True)
class Session:
    """One concept set of a call, its prompts, and the denoiser with its LoRAs installed.

    Attributes:
        concepts: The concept set.
        prompts: Encodes its prompts.
        denoiser: Runs its passes.
        guider: Applies guidance.
        steps: How many steps there are.
    """

    concepts: ConceptSet
    prompts: Prompts
    denoiser: Denoiser
    guider: Guider
    steps: int

    @property
    def canvas(self) -> Canvas:
        """Sizes of the set's images."""
        return self.denoiser.canvas

    @property
    def log(self) -> AttentionLog:
        """Attention maps and masks of the recorded steps."""
        return self.denoiser.log
