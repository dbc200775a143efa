"""CLoRA: concepts are told apart by their attention maps; no layout is needed.

Meral et al., "CLoRA: A Contrastive Approach to Compose Multiple LoRA Models", arXiv 2403.19776.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import Gates, Layout, Partition, Recorder, grid_at
from attention.masks import closed, dilated, eroded, opened
from pipelines.branches import Branch, branches_of
from pipelines.conditioning import Conditioning, join_branches, stack_texts
from pipelines.engine import Engine, Prediction
from pipelines.losses import contrast, smooth
from pipelines.methods.merge import Merge
from pipelines.methods.process import Process
from pipelines.methods.region_gates import region_gates
from pipelines.regions import Regions

Fuse = Literal["branches", "regions"]
Uncond = Literal["shared", "each"]
StepRule = Literal["raw", "rms"]
Morphology = Literal["dilate", "erode", "open", "close"]
_MORPHOLOGY = {"dilate": dilated, "erode": eroded, "open": opened, "close": closed}
_CHOICES = {"fuse": Fuse, "uncond": Uncond, "step_rule": StepRule}


@dataclass(frozen=True)
class Clora:
    step_size: float = 20.0
    step_rule: StepRule = "raw"
    update_until: float = 0.5
    refine_at: tuple[float, ...] = (0.0, 0.2, 0.4)
    refinements: int = 20
    temperature: float = 0.5
    threshold: float = 0.3
    mask_from: float = 0.0
    mask_until: float = 1.0
    smooth: bool = False
    soft: bool = False
    exclusive: bool = False
    morphology: tuple[Morphology, ...] = ()
    fuse: Fuse = "branches"
    uncond: Uncond = "shared"
    isolate: bool = False
    whole: bool = False
    base_prompt: str | None = None
    words: Mapping[str, Sequence[str]] | None = None
    mask_words: Mapping[str, Sequence[str]] | None = None
    prior: float = 0.0

    @classmethod
    def official(cls) -> "Clora":
        return cls(whole=True, uncond="each", threshold=0.4)

    def start(self, engine: Engine) -> Process:
        subjects = [i for i, concept in enumerate(engine.concepts) if concept.role != "style"]
        if len(subjects) < 2:
            return Merge().start(engine)
        if engine.prompts is None:
            raise ValueError("text")
        branches = branches_of(
            engine.prompts, engine.concepts, subjects, base_prompt=self.base_prompt, words=self.words
        )
        texts = [self._encode(engine, branch) for branch in branches]
        joined = join_branches(texts, uncond="first" if self.uncond == "shared" else "each")
        return Contrasting(
            self,
            engine,
            tuple(subjects),
            joined,
            self._gates(engine, branches, joined),
            _words(engine, branches, texts),
            stack_texts(texts),
        )

    def _encode(self, engine: Engine, branch: Branch) -> Conditioning:
        return engine.encode(_acting(engine, branch), branch.prompts, None, branch.names, branch.mentions)

    def _gates(self, engine, branches, conditioning) -> Gates:
        acting = torch.tensor([_acting(engine, branch) for branch in branches])
        unconds = (
            torch.zeros(conditioning.unconds, acting.shape[1])
            if self.uncond == "shared"
            else acting[: conditioning.unconds]
        )
        gate = torch.cat([unconds, acting]).repeat_interleave(conditioning.images, dim=0).to(engine.device)[:, None]
        return Gates(gate, dict.fromkeys(engine.levels, gate), gate[:, 0], engine.latent_grid)


def _acting(engine, branch):
    return [
        weight if concept.role == "style" or i == branch.owner else 0.0
        for i, (concept, weight) in enumerate(zip(engine.concepts, engine.weights, strict=True))
    ]


@dataclass(frozen=True, eq=False)
class Words:
    readout: Tensor  # [branches, images, tokens, maps]
    groups: Tensor  # [images, branches, maps]
    mine: Tensor  # [branches, images, maps]


def _words(engine, branches, texts) -> Words:
    rows = [text.conditional().phrase_mask for text in texts]  # [images, tokens, concepts]
    columns = []
    for b, phrase in enumerate(rows):
        for image in phrase:
            columns.append([(int(token), int(concept)) for token, concept in image.nonzero()])
    most = max(map(len, columns))
    images, tokens, _ = rows[0].shape
    readout = torch.zeros(len(columns), tokens, most)
    groups = torch.full((len(columns), most), -1)
    owner = torch.tensor([-2 if branch.owner is None else branch.owner for branch in branches]).repeat_interleave(
        images
    )
    for row, found in enumerate(columns):
        for column, (token, concept) in enumerate(found):
            readout[row, token, column] = 1
            groups[row, column] = concept
    shape = (len(branches), images)
    mine = groups == owner[:, None]
    dev = engine.device
    return Words(readout.to(dev), groups.unflatten(0, shape).transpose(0, 1).to(dev), mine.unflatten(0, shape).to(dev))


@dataclass
class Contrasting:
    settings: Clora
    engine: Engine
    subjects: tuple[int, ...]
    conditioning: Conditioning
    gates: Gates
    words: Words
    texts: Conditioning
    masks: Tensor | None = None  # [images, subjects, h, w]

    def prepare(self, latents):
        return latents

    def step(self, latents, t):
        latents, maps, prediction = self._update(latents, t)
        if self.settings.fuse == "branches":
            return latents, self._branches(latents, t, maps, prediction)
        return latents, self._regions(latents, t, maps)

    def _due(self):
        return self.masks is None or self.engine.step < self._steps(self.settings.mask_until)

    def _steps(self, part):
        return math.ceil(round(part * len(self.engine.timesteps), 6))

    def _recorder(self, whole):
        readout = self.words.readout
        if whole and self.engine.guided:
            readout = torch.cat([readout, readout])
        return Recorder(self.engine.map_layers, readout)

    def _maps(self, recorder):
        """[branches, images, maps, h, w]"""
        grid = grid_at(self.engine.latent_grid, self.engine.map_level)
        images = self.conditioning.images
        maps = recorder.mean().transpose(1, 2).unflatten(2, grid)
        maps = maps.unflatten(0, (-1, len(self.subjects) + 1, images))
        return maps.mean(dim=0)

    def loss(self, recorder):
        maps = self._maps(recorder).transpose(0, 1)
        return contrast(maps.flatten(1, 2), self.words.groups.flatten(1), self.settings.temperature)

    def _update(self, latents, t):
        s, step = self.settings, self.engine.step
        if s.step_size == 0 or step >= self._steps(s.update_until):
            return latents, None, None
        times = 1 + (s.refinements if step in {self._steps(at) for at in s.refine_at} else 0)
        for _ in range(times):
            recorder = self._recorder(s.whole)
            found = self.engine.gradient(latents, t, self.conditioning, self.gates, recorder, self.loss, whole=s.whole)
            g = found.direction
            if s.step_rule == "rms":
                g = g / g.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
            latents = (latents - s.step_size * g).to(latents.dtype)
        return latents, self._maps(recorder).detach(), found.prediction

    def _branches(self, latents, t, maps, prediction):
        if prediction is None:
            need = self._due() and maps is None
            cond = self.conditioning
            recorder = None
            if need:
                readout = self.words.readout
                if self.engine.guided:
                    un = (
                        readout
                        if self.settings.uncond == "each"
                        else torch.zeros_like(readout[: cond.unconds * cond.images])
                    )
                    readout = torch.cat([un, readout])
                recorder = Recorder(self.engine.map_layers, readout)
            prediction = self.engine.unet(latents, t, cond, self.gates, record=recorder)
            if need:
                m = (
                    recorder.mean()
                    .transpose(1, 2)
                    .unflatten(2, grid_at(self.engine.latent_grid, self.engine.map_level))
                )
                if self.settings.uncond == "each":
                    maps = m.unflatten(0, (-1, len(self.subjects) + 1, cond.images)).mean(dim=0)
                else:
                    maps = m[-(len(self.subjects) + 1) * cond.images :].unflatten(
                        0, (len(self.subjects) + 1, cond.images)
                    )
        if self._due():
            self.masks = self._masks(maps)
        shares = self._shares()  # [branches, images, 1, h, w]
        uncond, cond = prediction.parts
        fused = (cond * shares).sum(dim=0)
        if prediction.unconds == 0:
            return fused
        u = uncond[0] if prediction.unconds == 1 else (uncond * shares).sum(dim=0)
        return self.engine.guide(Prediction(torch.cat([u, fused]), 1, len(latents)))

    def _shares(self):
        s = self.settings
        images = self.conditioning.images
        if self.engine.step < self._steps(s.mask_from):
            return torch.full(
                (len(self.subjects) + 1, 1, 1, 1, 1), 1 / (len(self.subjects) + 1), device=self.engine.device
            )
        base = ~self.masks.any(dim=1, keepdim=True)
        all_ = torch.cat([base, self.masks], dim=1).float()
        if s.soft:
            all_ = F.interpolate(all_, self.engine.latent_grid, mode="bilinear", align_corners=False)
        else:
            all_ = F.interpolate(all_, self.engine.latent_grid, mode="nearest")
        all_ = all_ / all_.sum(dim=1, keepdim=True)
        return all_.transpose(0, 1)[:, :, None]

    def _masks(self, maps):
        """[images, subjects, h, w]"""
        s = self.settings
        maps = maps[1:]
        mine = self.words.mine[1:]
        if s.smooth:
            maps = smooth(maps)
        grid = maps.shape[-2:]
        rel = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-20)
        if s.prior > 0:
            n = maps.shape[0]
            x = (torch.arange(grid[1]) + 0.5) / grid[1]
            centers = (torch.arange(n) + 0.5) / n
            prior = torch.exp(-((x[None] - centers[:, None]) * n).square() * s.prior)
            rel = rel * prior[:, None, None, None, :]
            rel = rel / rel.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-20)
        masks = ((rel > s.threshold) & mine[..., None, None]).any(dim=2).transpose(0, 1)
        share = torch.where(mine[..., None, None], rel, 0).amax(dim=2).transpose(0, 1)  # [images, subjects, h, w]
        for name in s.morphology:
            masks = _MORPHOLOGY[name](masks)
        if s.exclusive:
            best = share.argmax(dim=1, keepdim=True)
            won = torch.zeros_like(masks).scatter_(1, best, True)
            masks = masks & won
            top = share.flatten(2).argmax(dim=2)
            masks = masks | F.one_hot(top, share.shape[-2] * share.shape[-1]).bool().view(masks.shape)
        return masks

    def _regions(self, latents, t, maps):
        if self._due():
            if maps is None:
                recorder = self._recorder(False)
                self.engine.observe(latents, t, self.conditioning, self.gates, recorder)
                maps = self._maps(recorder)
            self.masks = self._masks(maps)
            self.parts = [self._part(i) for i in range(len(latents))]
        outs = []
        for i, (conditioning, gates, layout) in enumerate(self.parts):
            prediction = self.engine.unet(latents[i : i + 1], t, conditioning, gates, layout)
            outs.append(self.engine.guide(prediction))
        return torch.cat(outs)

    def _part(self, i):
        engine = self.engine
        fine = F.interpolate(self.masks[i][None].float(), engine.latent_grid, mode="nearest")[0]
        regions = Regions.of_masks(self.subjects, fine, engine.levels, 1.0 if not self.settings.soft else 0.5)
        cells = {level: c.flatten(0, 1) for level, c in regions.cells.items()}
        layout = Layout(
            {level: Partition.of(c, engine.device) for level, c in cells.items()}, True, self.settings.isolate
        )
        if not hasattr(self, "per_image"):
            self.per_image = [self.texts.of_image(k) for k in range(self.conditioning.images)]
            self.text_gates = [None] * self.conditioning.images
        text = self.per_image[i]
        gates = region_gates(engine, text, regions)
        if self.text_gates[i] is None:
            self.text_gates[i] = gates.text
        return text, replace(gates, text=self.text_gates[i]), layout
