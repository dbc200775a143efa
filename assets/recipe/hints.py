"""What lies where: an auxiliary target for features inside a denoiser in training.

Representation alignment (REPA, Yu et al. 2025; U-REPA, Tian et al. 2025, for UNets), by which denoisers learn faster,
compares their features with those of another network. Images that are drawn need none: of each patch it is known which
class lies there, and which part of the object. The head exists in training alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.world import CLASSES, PATCH

WEIGHT = 0.1  # beside the error of the denoiser
NAMES = {name: number for number, name in enumerate(CLASSES, 1)}  # 0 is the background


def as_numbers(objects: list[tuple[str, tuple[int, int, int]]], most: int = 3) -> Tensor:
    """Class, left, top and side of every object in pixels, with zeros for missing ones. Shape: [most, 4]."""
    rows = [(NAMES[name], *square) for name, square in objects]
    return torch.tensor(rows + [(0, 0, 0, 0)] * (most - len(rows)), dtype=torch.int16)


def lying(objects: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The class of each patch, and where in its object it is.

    Args:
        objects: Of each image, as by `as_numbers`. Shape: [images, objects, 4].
        height: Of an image in patches.
        width: Of an image in patches.

    Returns:
        Classes, 0 where there is none: [images, height * width]; shares of the side from left and top, 0 to 1:
        [images, height * width, 2].
    """
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = PATCH * (torch.stack((xs, ys), -1).reshape(1, 1, -1, 2) + 0.5)
    classes, corners, sides = objects[:, :, None, 0], objects[:, :, None, 1:3], objects[:, :, None, 3:]
    shares = (centres - corners) / sides.clamp(min=1)
    inside = ((shares > 0) & (shares < 1)).all(-1)
    return (inside * classes).amax(1).long(), (inside[..., None] * shares).sum(1)


class Hints(nn.Module):
    """Reads class and part of each patch from features.

    Args:
        channels: Of the features.
        patches: Of an image that one position of the features covers.
    """

    def __init__(self, channels: int, patches: int = 1) -> None:
        super().__init__()
        self.read = nn.Linear(channels, patches * (len(CLASSES) + 1 + 2))

    def forward(self, features: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
        """The weighted error.

        Args:
            features: Shape: [images, positions, channels].
            classes: By `lying`, the patches of a position one after the other. Shape: [images, positions * patches].
            shares: By `lying`, in the same order. Shape: [images, positions * patches, 2].
        """
        known = self.read(features.float()).view(*classes.shape, -1)
        error = F.cross_entropy(known[..., :-2].flatten(0, 1), classes.flatten())
        apart = F.smooth_l1_loss(known[..., -2:], shares, reduction="none", beta=0.1)
        return WEIGHT * (error + (apart * (classes > 0)[..., None]).mean())
