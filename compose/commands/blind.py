"""`lora-compose blind`: votes on images whose method is hidden."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.support.packages import EVALUATION, check_packages
from lora_compose.compose.support.terminal import handle_errors, starting

app = typer.Typer(help="Blind tests: vote on images whose method is not shown.", no_args_is_help=True)


@app.command()
@handle_errors(logging.ERROR)
def make(
    out: Annotated[Path, typer.Option(help="Where to write sheets, votes.csv and key.json.")] = Path("outputs/blind"),
    seeds: Annotated[int, typer.Option(help="Number of seeds (0, 1, ...) per pair and method.", min=1)] = 20,
) -> None:
    """Generate and shuffle the images. Vote before you open key.json.

    `regional` gives all LoRAs token masks.
    """
    with starting():
        from lora_compose.compose.evaluation import blind
    blind.make(out, seeds)


@app.command("from")
@handle_errors()
def make_from(
    evaluation: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    method: Annotated[list[str], typer.Option(help="A row of its table; several times, once for each.")],
    images: Annotated[int, typer.Option(help="Number of images per method.", min=1)] = 20,
    subjects: Annotated[int, typer.Option(help="Number of subjects in the scenes.", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Where to write sheets, votes.csv and key.json.")] = Path("outputs/blind"),
) -> None:
    """Shuffle images of an evaluation. Vote before you open key.json.

    For example: lora-compose blind from outputs/evaluation/playground-full --method draft --method clora
    """
    check_packages("an evaluation", EVALUATION, "evaluation")
    with starting():
        from lora_compose.compose.evaluation import votes
    votes.make_from(evaluation, out, method, images, subjects)


@app.command()
@handle_errors()
def score(out: Annotated[Path, typer.Argument(help="The folder that `make` wrote.")] = Path("outputs/blind")) -> None:
    """Count the votes by method."""
    with starting():
        from lora_compose.compose.evaluation import blind
    blind.score(out)


@app.command()
@handle_errors(logging.ERROR)
def judge(
    out: Annotated[Path, typer.Argument(help="A folder with votes.csv and key.json.")],
    evaluation: Annotated[Path, typer.Option(help="A finished evaluation of the playground, for the thresholds.")],
    first: Annotated[int | None, typer.Option(help="Only this number of images, evenly spaced.", min=1)] = None,
) -> None:
    """Let the judge vote too, and list where it disagrees with you.

    The images are reproduced for that.
    """
    check_packages("an evaluation", EVALUATION, "evaluation")
    with starting():
        from lora_compose.compose.evaluation import votes
    votes.judge(out, evaluation, first)


@app.command()
@handle_errors(logging.ERROR)
def follow(
    out: Annotated[Path, typer.Argument(help="The folder that `from` wrote, with your votes.")],
    evaluation: Annotated[Path, typer.Option(help="The evaluation that the images are of.")],
) -> None:
    """Show how well each metric follows your votes.

    So you know which number to read.
    """
    check_packages("an evaluation", EVALUATION, "evaluation")
    with starting():
        from lora_compose.compose.evaluation import votes
    votes.show_following(out, evaluation)
