"""A draft is shown as images in ComfyUI's layout, and its regions are masks of all concepts."""

import torch

from lora_compose.compose.comfyui.composition import Found, on_grids
from lora_compose.compose.comfyui.showing import previewed
from lora_compose.compose.figures.overlay import PALETTE


def test_the_division_and_the_map_of_each_subject_are_shown() -> None:
    """The first of two images is shown; a style and a subject with a box have no map."""
    style, box = 1, (0, 0, 500, 1000)
    maps = torch.zeros(2, 4, 2, 4)
    maps[:, 0, :, 0] = maps[:, 2, :, 3] = 1
    left, right = torch.zeros(4, 8), torch.zeros(4, 8)
    left[:, :4], right[:, 4:] = 1, 1
    cells = torch.stack([on_grids([left, None, right, box], (4, 8))] * 2)
    images, masks = previewed(Found(maps, cells))
    assert images.shape == (3, 192, 384, 3), "grown, as small images are on the page"
    assert images.max() <= 1
    assert masks.shape == (4, 32, 64)
    assert masks[style].all()
    assert torch.equal(masks[2], 1 - masks[0])
    colours = [torch.tensor([int(PALETTE[i][k : k + 2], 16) / 255 for k in (1, 3, 5)]) for i in (0, 2)]
    for image, colour, bright, dark in ((images[1], colours[0], 20, 360), (images[2], colours[1], 360, 20)):
        assert image[96, dark].max() < 0.05
        assert torch.cosine_similarity(image[96, bright], colour, dim=0) > 0.98
