"""The UNet as a teacher of the transformer: the velocity that it expects, where an image alone tells one of many.

A noisy image has one velocity, but many images could lie behind it; a denoiser learns their mean, and learns it sooner
from one that already knows it (distillation of flow models: Liu et al. 2023; across schedules, by the signal-to-noise
ratio: Kingma et al. 2021).
"""

from copy import deepcopy
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lora_compose.compose.support.precision import cpu_autocast


class Teacher:
    """A denoiser of Stable Diffusion, asked on the straight path between image and noise.

    Args:
        pipe: Its pipeline. Its text encoder is copied, since the transformer's pipeline trains it.
    """

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.unet: Any = pipe.unet.eval().requires_grad_(False)
        self.words: Any = deepcopy(pipe.text_encoder).eval().requires_grad_(False)
        self.tokenizer: Any = pipe.tokenizer
        alphas: Tensor = pipe.scheduler.alphas_cumprod
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.times = self.noise / (self.signal + self.noise)
        """Time on the straight path with the signal-to-noise ratio of each timestep; rises from 0 to 1."""

    @torch.no_grad()
    def velocity(self, mixed: Tensor, times: Tensor, captions: list[str], guidance: Tensor) -> Tensor:
        """The expected velocity, noise minus image, with classifier-free guidance.

        Args:
            mixed: (1 - time) x image + time x noise. Shape: [images, channels, height, width].
            times: From 0 to 1; the nearest timesteps are taken. Shape: [images].
            captions: Of the images.
            guidance: Scales; 1 is none. Shape: [images].
        """
        steps = (self.times - times[:, None]).abs().argmin(1)
        time, signal, noise = (each[steps].view(-1, 1, 1, 1) for each in (self.times, self.signal, self.noise))
        noisy = mixed / (time.square() + (1 - time).square()).sqrt()
        guided = guidance > 1
        texts = [*captions, ""]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with cpu_autocast():
            text = self.words(ids)[0]
            text = torch.cat((text[:-1], text[-1:].expand(int(guided.sum()), -1, -1)))
            rows, at = torch.cat((noisy, noisy[guided])), torch.cat((steps, steps[guided]))
            v, unconditional = self.unet(rows, at, text).sample.float().split([len(noisy), int(guided.sum())])
        v[guided] = unconditional + guidance[guided].view(-1, 1, 1, 1) * (v[guided] - unconditional)
        return (noise * noisy + signal * v) - (signal * noisy - noise * v)
