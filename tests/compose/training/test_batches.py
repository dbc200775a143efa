"""What is drawn for a step depends on the seed and the number of the row, and on nothing else."""

import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_compose.compose.training.batches import Batches, Stream, batches_of, generator
from lora_compose.compose.training.data import pixels_of, square
from lora_compose.compose.training.examples import Examples
from lora_compose.compose.training.learner import Batch
from lora_compose.compose.training.noising import Diffusion

NOISING = Diffusion(torch.nn.Identity(), DDPMScheduler())


def examples(number: int, *, xl: bool = False) -> Examples:
    """Images with their index as latents; every second one has the caption with the trigger at token 1."""
    captions = torch.arange(number) % 2
    mask = torch.zeros(2, 3, 1)
    mask[1, 1] = 1
    return Examples(
        latents=torch.arange(float(number))[:, None, None, None].expand(-1, 2, 2, 2),
        caption=captions,
        text=torch.arange(2.0)[:, None, None].expand(-1, 3, 4),
        mask=mask,
        by_caption={"text_embeds": torch.arange(2.0)[:, None].expand(-1, 4)} if xl else {},
        by_image={"time_ids": torch.arange(float(number))[:, None].expand(-1, 6)} if xl else {},
    )


def make(sizes: tuple[int, int], accumulate: int = 1, processes: int = 1, process: int = 0, seed: int = 0) -> Batches:
    return batches_of(
        examples(5, xl=True), examples(3, xl=True), None, seed=seed, sizes=sizes, noising=NOISING,
        accumulate=accumulate, processes=processes, process=process,
    )  # fmt: skip


def rows_of(batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Everything about the rows of the concept, and about those of the class."""
    parts = [batch.latents, batch.noise, batch.times, batch.text, batch.mask, *batch.added.values()]
    return [part[: batch.own] for part in parts], [part[batch.own :] for part in parts]


@given(number=st.integers(1, 12), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_every_image_comes_once_before_any_comes_again(number: int, seed: int, epoch: int) -> None:
    stream = Stream(examples(number), seed, 1, NOISING)
    drawn = [stream.image(row) for row in range(epoch * number, (epoch + 1) * number)]
    assert sorted(drawn) == list(range(number))


def test_orders_noise_and_timesteps_vary() -> None:
    stream = Stream(examples(8), 0, 1, NOISING)
    orders = [tuple(stream.image(row) for row in range(e * 8, e * 8 + 8)) for e in range(4)]
    assert len(set(orders)) == 4
    noise = torch.stack([stream.draw(row).noise for row in range(200)])
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    times = torch.tensor([stream.draw(row).time for row in range(400)])
    assert times.min() < 50
    assert times.max() > 950
    assert abs(times.float().mean() - 500) < 60


@given(
    step=st.integers(0, 6), size=st.integers(1, 3), prior=st.integers(1, 2), accumulate=st.integers(1, 3),
    processes=st.integers(1, 3),
)  # fmt: skip
def test_rows_do_not_depend_on_how_they_are_split(
    step: int, size: int, prior: int, accumulate: int, processes: int
) -> None:
    parts = accumulate * processes
    whole = rows_of(make((size * parts, prior * parts)).of(step, 0))
    split = [
        rows_of(make((size, prior), accumulate, processes, process).of(step, part))
        for part in range(accumulate)
        for process in range(processes)
    ]
    for kind in (0, 1):
        for number, expected in enumerate(whole[kind]):
            assert torch.equal(torch.cat([one[kind][number] for one in split]), expected)


def test_concept_and_class_draw_apart_and_seeds_differ() -> None:
    batch = make((5, 5)).of(0, 0)
    concept, prior = rows_of(batch)
    assert not torch.equal(concept[1], prior[1])
    assert not torch.equal(make((5, 5), seed=1).of(0, 0).noise, batch.noise)


def test_a_perturbation_is_in_the_input_alone_and_changes_no_other_draw() -> None:
    plain = [Stream(examples(8), 0, 1, NOISING).draw(row) for row in range(200)]
    perturbed = [Stream(examples(8), 0, 1, NOISING, input_perturbation=0.1).draw(row) for row in range(200)]
    for one, other in zip(plain, perturbed, strict=True):
        assert torch.equal(one.input_noise, one.noise)
        assert torch.equal(other.noise, one.noise)
        assert other.time == one.time
    added = torch.stack([row.input_noise - row.noise for row in perturbed])
    assert abs(added.std() - 0.1) < 0.01
    assert abs((added * torch.stack([row.noise for row in perturbed])).mean()) < 0.01


def test_rows_carry_what_belongs_to_their_image() -> None:
    batch = make((5, 3)).of(0, 0)
    images = batch.latents[:, 0, 0, 0]
    captions = images % 2
    assert torch.equal(batch.text[:, 0, 0], captions)
    assert torch.equal(batch.added["text_embeds"][:, 0], captions)
    assert torch.equal(batch.added["time_ids"][:, 0], images)
    assert torch.equal(batch.mask[:, 1, 0], captions)
    assert not batch.mask[:, [0, 2]].any()


def test_generators_belong_to_all_their_numbers() -> None:
    seeds = {generator(*numbers).initial_seed() for numbers in ((0,), (1,), (0, 1), (1, 0), (0, 0, 1), (2**62, 3))}
    assert len(seeds) == 6


@given(width=st.integers(1, 200), height=st.integers(1, 200), side=st.integers(1, 12).map(lambda n: 8 * n))
def test_any_image_becomes_a_square(width: int, height: int, side: int) -> None:
    image, cut = square(Image.new("RGB", (width, height), (255, 0, 127)), side)
    (pixels,) = pixels_of(image)
    assert pixels.shape == (3, side, side)
    assert torch.allclose(pixels[:, side // 2, side // 2], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]))
    assert min(cut) == 0
    assert max(cut) <= max(1, round(side * max(width, height) / min(width, height)) - side)
