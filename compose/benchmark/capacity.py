"""Cards for many requests a minute, on paper: from counted FLOPs and bytes and a share of what data sheets promise."""

from collections.abc import Mapping

from rich.table import Table

from lora_compose.compose.benchmark.hardware import CARDS, SHARE, Need
from lora_compose.compose.benchmark.tables import new_table

REQUESTS = 1000
"""Images a minute."""
BANDWIDTH = {"RTX 3090": 936, "RTX 4090": 1008, "A100": 2039, "H100": 3350}
"""GB/s of memory by card, as NVIDIA's data sheets have them (RTX: 384 bits at 19.5 and 21 Gbit/s; A100 with 80 GB; H100
SXM)."""


def seconds(need: Need, card: str) -> float:
    """Seconds of an image: of FLOPs, or of reading the denoiser's weights once in each step, whichever is more."""
    arithmetic = need.flops / (CARDS[card] * 1e12)
    reading = need.steps * need.weights / (BANDWIDTH[card] * 1e9)
    return max(arithmetic, reading) / SHARE


def capacity_table(needs: Mapping[str, Need]) -> Table:
    """Cards that `REQUESTS` images a minute keep busy, by model."""
    table = new_table(
        f"Estimated: cards for {REQUESTS} images a minute with two LoRAs and regional, at {SHARE:.0%} of the peak in "
        "half precision and of the memory's bandwidth, whichever takes longer; text and decoding are not in it",
        ["model", "TFLOP", "TB read", *CARDS],
    )
    for model, it in needs.items():
        cards = (REQUESTS / 60 * seconds(it, card) for card in CARDS)
        read = it.steps * it.weights / 1e12
        table.add_row(model, f"{it.flops / 1e12:.0f}", f"{read:.2f}", *(f"{number:.0f}" for number in cards))
    return table
