"""DoRA and OFT as low-rank factors, for mergers: their change W' - W depends on the model's weight W."""

from collections.abc import Mapping

import torch

from lora_compose.attention.column_norms import with_column_norms
from lora_compose.attention.device import modules_of
from lora_compose.attention.lora_bank import LoraFactors, base_layer
from lora_compose.attention.transforms import dense_weight
from lora_compose.pipelines.formats.change import MAX_RANK, cut, inner, matrix, shaped
from lora_compose.pipelines.formats.files import LoraError
from lora_compose.pipelines.formats.models import models_by_part
from lora_compose.pipelines.merging.changes import Name


def expressed(
    pipe: object, lora: Mapping[Name, LoraFactors], called: str
) -> tuple[Mapping[Name, LoraFactors], str | None]:
    """Factors without transforms, exact up to `MAX_RANK` and the best of that rank beyond, and a note on what was cut.

    Args:
        pipe: Has the models, with their weights.
        called: What messages call the LoRA.

    Raises:
        LoraError: If the weights are not there.
    """
    by_layer, lost, whole = dict(lora), 0.0, 0.0
    models, known, cpu = models_by_part(pipe), {}, torch.device("cpu")
    for (part, name), factors in lora.items():
        if factors.transform is None:
            continue
        modules = modules_of(models[part])
        layer = base_layer(modules[name])
        if layer.get_parameter("weight").is_meta:
            raise LoraError(
                f"{called} rescales or rotates the model's own weights (DoRA, OFT), so it is another change for each "
                "model; give the model whose weights it was trained on (--model)"
            )
        if part not in known:
            of_part = {layer: mine for (component, layer), mine in lora.items() if component == part}
            known[part] = with_column_norms(of_part, modules, cpu, torch.float32)
        change = known[part][name].change_of(dense_weight(layer, cpu, torch.float32))
        best = shaped(*cut(matrix(change), MAX_RANK), change.shape[1:])
        by_layer[part, name] = best.factors
        lost, whole = lost + best.lost, whole + best.lost + inner(best.factors, best.factors)
    if not whole:
        return lora, None
    count = sum(factors.transform is not None for factors in lora.values())
    return by_layer, (
        f"{count} layers rescale or rotate the model's weights; their change is taken from this model, as the best of "
        f"rank {MAX_RANK}: relative error {(lost / whole) ** 0.5:.2%}"
    )
