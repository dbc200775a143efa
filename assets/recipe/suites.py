"""Writes the suites and the scenes of the small world: which concepts stand together where, and by which methods.

    PYTHONPATH=assets python -m recipe.suites assets

Every suite lists all concepts that its scenes name. Boxes are pixels: left, top, right, bottom.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.concepts import STYLE
from recipe.scenes import enumerate_words
from recipe.world import CHARACTERS, CLASSES, SIZE, STYLE_TRIGGER, WIDE, article

Box = tuple[int, int, int, int]
GUIDANCE = 5

HALVES: tuple[Box, ...] = ((0, 0, 96, 192), (96, 0, 192, 192))
THIRDS: tuple[Box, ...] = ((0, 0, 64, 192), (64, 0, 128, 192), (128, 0, 192, 192))
BOXES: tuple[Box, ...] = ((0, 24, 90, 168), (102, 24, 192, 168))
OVERLAPPING: tuple[Box, ...] = ((0, 24, 114, 168), (78, 24, 192, 168))
SMALL: tuple[Box, ...] = ((12, 60, 84, 132), (108, 60, 180, 132))
APART: tuple[Box, ...] = ((6, 18, 90, 174), (102, 18, 186, 174), (198, 18, 282, 174), (294, 18, 378, 174))
"""Boxes side by side on a wide canvas, three or four."""


class Place(NamedTuple):
    """A scene of a suite.

    Attributes:
        names: Concepts from left to right; "+tree" is a plain object, a style acts on all.
        ground: End of the prompt.
        boxes: One for each concept; none where words alone tell.
        size: Width and height, if it is not the model's.
        bundle: Concepts that are in the file as well.
        title: Instead of its concepts' names.
    """

    names: tuple[str, ...]
    ground: str
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None
    bundle: tuple[str, ...] = ()
    title: str = ""

    @property
    def concepts(self) -> list[str]:
        """Names of its concepts."""
        return [name for name in self.names if not name.startswith("+")]

    @property
    def prompt(self) -> str:
        """The prompt."""
        words = [CHARACTERS[name].phrase if name in CHARACTERS else name[1:] for name in self.names if name != STYLE]
        styled = f" in {STYLE_TRIGGER} style" if STYLE in self.names else ""
        return f"{enumerate_words([article(each) for each in words])} {self.ground}{styled}"

    def lines(self) -> Iterator[str]:
        """Lines of a suite."""
        shown = [name.removeprefix("+") for name in self.names if name != STYLE]
        yield f'  - name: "{self.title or enumerate_words(shown)} {self.ground}"'
        yield f"    prompt: {self.prompt}"
        yield f"    concepts: [{', '.join(self.concepts)}]"
        if self.size:
            yield f"    width: {self.size[0]}"
            yield f"    height: {self.size[1]}"
        if self.boxes:
            each = (f"{name}: {list(box)}" for name, box in zip(self.concepts, self.boxes, strict=True))
            yield f"    regions: {{{', '.join(each)}}}"
        if self.bundle:
            yield f"    bundle: [{', '.join(self.bundle)}]"


class Suite(NamedTuple):
    """A suite.

    Attributes:
        name: Name of its file.
        about: A comment at its top.
        scenes: Its scenes.
        methods: Lines of YAML.
        seeds: Seeds of each scene.
        baseline: The method that others are compared with.
        steps: Steps of an image.
        model: playground or playground-flux.
        scheduler: Class name of a diffusers scheduler; None keeps the model's.
    """

    name: str
    about: str
    scenes: Sequence[Place]
    methods: str
    seeds: Sequence[int] = (0, 1)
    baseline: str = "merge"
    steps: int = 25
    model: str = "playground"
    scheduler: str | None = None

    def text(self) -> str:
        """The file."""
        used = {name for scene in self.scenes for name in (*scene.concepts, *scene.bundle)}
        return "\n".join(
            [
                *(f"# {line}" for line in textwrap.wrap(self.about, 118)),
                f"name: {self.name}",
                f"model: {self.model}",
                f"encoder: {self.model}:judge",
                "detector:",
                "  kind: windows",
                f"  vocabulary: [{', '.join(CLASSES)}]",
                f"steps: {self.steps}",
                f"guidance_scale: {GUIDANCE}",
                *([f"scheduler: {self.scheduler}"] if self.scheduler else []),
                f"seeds: {list(self.seeds)}",
                f"batch_size: {min(4, len(self.seeds))}",
                "threads: 1",
                "processes: 2",
                f"baseline: {self.baseline}",
                "concepts:",
                *(line for name in (*CHARACTERS, STYLE) if name in used for line in self._concept(name)),
                "scenes:",
                *(line for scene in self.scenes for line in scene.lines()),
                "methods:",
                *(f"  - {line}" for line in self.methods.strip().splitlines()),
                "",
            ]
        )

    def _concept(self, name: str) -> Iterator[str]:
        trigger, class_word = _words(name)
        loras = {"ordinary": f"{self.model}:{name}"}
        if self.model == "playground":
            loras["tara"] = f"playground:{name}-tara"
        yield f"  - name: {name}"
        yield "    lora:"
        yield from (f'      {kind}: "{source}"' for kind, source in loras.items())
        yield f"    trigger: {trigger}"
        yield f"    class_word: {class_word}"
        yield f"    references: {self.model}:{name}"
        if name == STYLE:
            yield "    role: style"


def _words(name: str) -> tuple[str, str]:
    return (STYLE_TRIGGER, "style") if name == STYLE else CHARACTERS[name][:2]


def _pairs(text: str, boxes: tuple[Box, ...] = ()) -> list[Place]:
    """Scenes from lines such as "cat dog on grass"."""
    return [Place((one, two), ground, boxes) for one, two, ground in (line.split(" ", 2) for line in _lines(text))]


def threes(text: str, boxes: tuple[Box, ...] = (), size: tuple[int, int] | None = None) -> list[Place]:
    """Scenes of three concepts, a line each: their names, and the end of the prompt."""
    split = (line.split(" ", 3) for line in _lines(text))
    return [Place((one, two, three), ground, boxes, size) for one, two, three, ground in split]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


QUICK = """
    cat dog on a white background
    mira omar in a room
    bear robot on grass
    rabbit owl in snow
    kitten lena on a green background
    dog mira on grass
    omar bear on a blue background
    owl cat on sand
"""
FULL = """
    cat dog on a white background
    rabbit cat on grass
    cat bear on a gray background
    owl cat on sand
    cat mira in a room
    dog rabbit in snow
    bear dog on a yellow background
    dog owl on a green background
    mira dog on grass
    rabbit bear in a forest
    owl rabbit on a pink background
    robot bear on a blue background
    bear lena in snow
    robot kitten on sand
    kitten omar on a white background
    omar robot on grass
    lena owl at sunset
    mira omar in a room
    omar lena on sand
    robot mira on a gray background
"""
ONE_CLASS = """
    cat kitten on grass
    kitten cat on a pink background
    mira lena on a white background
"""
THREES = """
    cat dog rabbit on a white background
    mira omar bear on grass
    robot owl cat on a gray background
    lena dog kitten in a room
    rabbit robot omar on a yellow background
"""
TEN = """
    cat dog on a white background
    rabbit bear on grass
    robot owl on a gray background
    mira omar in a room
    dog mira in snow
    omar robot on sand
    bear kitten on a yellow background
    lena cat on a blue background
    owl lena on grass
    kitten rabbit on a white background
"""
HELD_BACK = """
    bear dog at night
    cat rabbit in a forest
    robot cat in a room
    owl mira at sunset
    robot bear on a pink background
    kitten dog on a green background
    kitten omar underwater
    dog cat on a gray background
    omar mira in a forest
    lena rabbit on sand
"""
HELD_BACK_ONE_CLASS = """
    cat kitten in a forest
    kitten cat on a blue background
    lena mira on grass
"""
HELD_BACK_THREES = """
    robot bear dog on a yellow background
    mira cat rabbit on grass
    omar lena owl in snow
"""
TRIED_THREES = """
    cat rabbit robot on grass
    dog omar owl on a white background
    bear mira dog in snow
    rabbit lena cat on a pink background
    owl kitten bear on sand
    robot dog mira in a forest
"""
"""Like `TEN` and `ONE_CLASS`, settings may be chosen by these; the scenes below are held back for what was chosen."""
HELD_BACK_SQUARES = """
    kitten owl dog on a green background
    bear lena robot at sunset
    cat omar rabbit underwater
    dog robot owl in a room
    mira bear kitten at night
    rabbit dog omar on a blue background
"""
MERGES = """
{name: cat, method: merge, merge: cat}
{name: ties, method: merge, merge: ties}
{name: dare, method: merge, merge: dare}
{name: tsv, method: merge, merge: tsv}
{name: lego, method: merge, merge: lego}
"""
CALIBRATED = """{name: soups, method: merge, merge: soups}
{name: ssr, method: merge, merge: ssr}
{name: iteris, method: merge, merge: iteris}"""
IN_BOXES = '{name: "draft, in the boxes", method: draft}'
FREE_DRAFT = "{method: draft, settings: {keep_regions: false}}  # finds the regions itself"
IN_COLUMNS = (
    '{name: "regional, a column for each", method: regional}\n{name: "draft, a column for each", method: draft}'
)
PUBLISHED = '{name: "freefuse, as published for FLUX.1", method: "freefuse:official-flux"}'


def _free(name: str, settings: str) -> str:
    """A line for `draft` without boxes, with settings."""
    return f'{{name: "{name}", method: draft, settings: {{keep_regions: false, {settings}}}}}'


WITHOUT_BOXES = """merge
clora
draft
{name: texts of regions, method: draft, settings: {reading: regions}}
freefuse
{name: "freefuse, conditional rows", method: freefuse, settings: {rows: cond_only}}"""

PARTS_IN_ONE_SEQUENCE = "\n".join(
    [
        "merge",
        FREE_DRAFT,
        # What a LoRA changes, which words a cell reads, and which cells see each other: one of them as in `merge`.
        _free("LoRAs change all words", "token_mask: none"),
        _free("without the bias", "bias: 0"),
        _free("the bias in all steps", "bias_steps: 1"),
        _free("regions never isolated", "isolate: 0"),
        _free("isolated in all steps", "isolate: 1"),
        _free("a text for each region", "reading: regions"),
        # Where regions come from.
        _free("starts again", "restart: always"),
        _free("three drafts", "drafts: 3"),
        '{name: "draft, a column for each", method: draft}',
    ]
)
"""Each part of `draft` on a transformer with text and image in one sequence, changed alone."""


def alone() -> list[Place]:
    """Each character by itself, and beside something plain."""
    grounds = ("on grass", "on sand", "on a white background", "in snow", "in a room")
    besides = ("tree", "car", "fox", "penguin", "boy")
    scenes = []
    for number, name in enumerate(CHARACTERS):
        scenes.append(Place((name,), grounds[number % len(grounds)]))
        scenes.append(Place((name, f"+{besides[number % len(besides)]}"), grounds[(number + 2) % len(grounds)]))
    return scenes


def _one_each(grounds: Sequence[str]) -> Iterator[tuple[str, str]]:
    names = [name for name in CHARACTERS if name not in ("kitten", "lena")]
    for number, ground in enumerate(grounds):
        yield names[number % len(names)], ground


_GROUNDS = ("on a white background", "on grass", "in snow", "on sand", "on a blue background", "in a room",
            "on a yellow background", "in a forest", "on a pink background", "at night")  # fmt: skip


def _bundles() -> list[Place]:
    names = list(CHARACTERS)
    return [
        Place((name,), ground, bundle=tuple(names[(names.index(name) + step) % len(names)] for step in (2, 5)))
        for name, ground in _one_each(_GROUNDS)
    ]


BOXED = [
    *_pairs(TEN, BOXES),
    *_pairs("cat kitten on grass\nmira lena in snow", BOXES),
    *(
        one._replace(title=f"overlapping {one.names[0]} and {one.names[1]}")
        for one in _pairs("cat dog on grass\nbear robot on a gray background", OVERLAPPING)
    ),
    *(
        one._replace(title=f"small {one.names[0]} and {one.names[1]}")
        for one in _pairs("rabbit mira on grass\ndog bear on sand", SMALL)
    ),
    *threes(
        "cat dog rabbit on grass\nbear omar robot on a gray background\nrobot kitten dog on sand",
        APART[:3],
        WIDE,
    ),
    Place(("cat", "dog", "bear", "mira"), "on grass", APART, (2 * SIZE, SIZE)),
]

SUITES = (
    Suite(
        "playground-quick",
        "Eight pairs, and the methods that are chosen automatically.",
        _pairs(QUICK, HALVES),
        f"merge\n{IN_BOXES}\n{FREE_DRAFT}\n{{method: tara, lora: tara}}\nregional\nlora-composer",
    ),
    Suite(
        "playground-full",
        "Twenty pairs, three scenes of one class and five scenes of three, two seeds each; all methods but freefuse.",
        [*_pairs(FULL, HALVES), *_pairs(ONE_CLASS, HALVES), *threes(THREES, THIRDS)],
        f"""merge
{{name: "merge, tara LoRAs", method: merge, lora: tara}}
switch
composite
{{method: tara, lora: tara}}
regional
{{name: "regional, token masks", method: regional, settings: {{token_mask: all}}}}
{{name: "regional, tara LoRAs", method: regional, lora: tara}}
clora
lora-composer
{FREE_DRAFT}
{{name: "draft, tara LoRAs", method: draft, lora: tara, settings: {{keep_regions: false}}}}""",
    ),
    Suite(
        "playground-alone",
        "Every LoRA by itself, and beside something plain: what composing can at best keep.",
        alone(),
        'merge\n{name: "merge, tara LoRAs", method: merge, lora: tara}',
        seeds=range(5),
    ),
    Suite(
        "playground-boxes",
        "Boxes, as somebody would draw them: pairs, one class, overlapping and small boxes, three and four concepts on "
        "wider canvases; every method that reads boxes, and what is chosen automatically with them and without.",
        BOXED,
        """merge
regional
draft
{name: "draft, without boxes", method: draft, settings: {keep_regions: false}}
lora-composer
{name: "lora-composer, as published", method: "lora-composer:official"}""",
        seeds=(10, 11),
    ),
    Suite(
        "playground-boxes-parts",
        "The scenes of playground-boxes; the mechanisms of LoRA-Composer switched on and off.",
        BOXED,
        """lora-composer
{name: "official, full LoRAs", method: "lora-composer:official", settings: {inject: full}}
{name: attn2 only, method: lora-composer, settings: {inject: attn2}}
{name: no injection, method: lora-composer, settings: {inject: "off"}}
{name: both rows, method: lora-composer, settings: {rows: all}}
{name: no isolation, method: lora-composer, settings: {isolate: false}}
{name: not apart, method: lora-composer, settings: {apart: 0}}
{name: background reads scene, method: lora-composer, settings: {background: scene}}
{name: no updates, method: lora-composer, settings: {step_size: 0}}
{name: noise swapped, method: lora-composer, settings: {reinit: swap}}""",
        seeds=(0,),
        baseline="lora-composer",
    ),
    Suite(
        "playground-words",
        "Pairs, two of one class and a scene of three by words alone, without boxes: CLoRA, the authors' settings, and "
        "every part of it changed.",
        [*_pairs(TEN), *_pairs(ONE_CLASS), *threes("cat dog rabbit on grass", size=WIDE)],
        """merge
clora
{name: official, method: "clora:official"}
{name: no updates, method: clora, settings: {step_size: 0}}
{name: smaller updates, method: clora, settings: {step_size: 0.02}}
{name: larger updates, method: clora, settings: {step_size: 0.1}}
{name: refined, method: clora, settings: {refine_at: [0], refinements: 8}}
{name: cells shared, method: clora, settings: {exclusive: false}}
{name: maps smoothed, method: clora, settings: {smoothed: true}}
{name: masks to the end, method: clora, settings: {mask_until: 1.0}}
{name: isolated, method: clora, settings: {isolate: true}}
{name: branches, method: clora, settings: {fuse: branches, exclusive: false, mask_until: 1.0}}
"""
        "{name: branches without updates, method: clora, settings: {fuse: branches, exclusive: false, mask_until: 1, "
        "step_size: 0}}",
        seeds=(0,),
        baseline="clora",
    ),
    Suite(
        "playground-draft",
        "Scenes, places and seeds that no setting of the draft was chosen by: pairs, one class and three concepts, "
        "without boxes.",
        [*_pairs(HELD_BACK), *_pairs(HELD_BACK_ONE_CLASS), *threes(HELD_BACK_THREES, size=WIDE)],
        WITHOUT_BOXES,
        seeds=(40, 41, 42, 43),
    ),
    Suite(
        "playground-draft-ancestral",
        "The scenes, methods and seeds of playground-draft with new noise in every step.",
        [*_pairs(HELD_BACK), *_pairs(HELD_BACK_ONE_CLASS), *threes(HELD_BACK_THREES, size=WIDE)],
        WITHOUT_BOXES + "\n{name: continues from the draft, method: draft, settings: {restart: never}}",
        seeds=(40, 41, 42, 43),
        scheduler="EulerAncestralDiscreteScheduler",
    ),
    Suite(
        "playground-draft-parts",
        "Each setting of the draft by itself, in scenes that its settings may be chosen by: pairs, one class and three "
        "concepts, without boxes.",
        [*_pairs(TEN), *_pairs(ONE_CLASS), *threes(THREES, size=WIDE)],
        """draft
{name: no bias, method: draft, settings: {reading: scene, bias: 0}}
{name: half of the bias, method: draft, settings: {reading: scene, bias: 0.5}}
{name: twice the bias, method: draft, settings: {reading: scene, bias: 2}}
{name: strips, method: draft, settings: {reading: scene, division: strips}}
{name: texts of regions, method: draft, settings: {reading: regions}}
{name: "texts of regions, nearest", method: draft, settings: {reading: regions, division: nearest}}
{name: no normalisation by region, method: draft, settings: {norm_apart: 0}}""",
        seeds=(10, 11),
        baseline="draft",
    ),
    Suite(
        "playground-threes",
        "Three concepts on a square canvas, in scenes and seeds that no setting was chosen by.",
        threes(HELD_BACK_SQUARES, THIRDS),
        f"merge\n{IN_COLUMNS}\n{FREE_DRAFT}\n{_free('three drafts', 'drafts: 3')}",
        seeds=(40, 41, 42, 43),
    ),
    Suite(
        "playground-threes-parts",
        "Three concepts on a square canvas, in scenes that settings may be chosen by: what a column for each reaches, "
        "and what helps draft without boxes.",
        threes(TRIED_THREES, THIRDS),
        "\n".join(
            [
                FREE_DRAFT,
                IN_COLUMNS,
                _free("three drafts", "drafts: 3"),
                _free("three drafts, further apart", "drafts: 3, spacing: 0.8"),
                _free("six drafts, further apart", "drafts: 6, spacing: 0.8"),
                _free("strips", "division: strips"),
                _free("cells left over", "leftover: 0.15"),
                _free("more cells left over", "leftover: 0.3"),
                _free("texts of regions", "reading: regions, apart: 0"),
                _free("texts of subjects", "reading: subjects, apart: 0"),
                _free("more bias", "bias: 2"),
            ]
        ),
        seeds=(10, 11, 12, 13),
        baseline="draft",
    ),
    Suite(
        "playground-merged-styles",
        "A subject in a style, both LoRAs in one file, merged in every way.",
        [Place((name, STYLE), ground) for name, ground in _one_each(_GROUNDS)],
        f"{MERGES}{{name: np, method: merge, merge: np}}\n{{name: k-lora, method: merge, merge: k-lora}}\n{CALIBRATED}",
        baseline="cat",
        steps=16,
    ),
    Suite(
        "playground-merged-bundles",
        "Three subjects in one file, merged in every way, of which the prompt names one.",
        _bundles(),
        f"{MERGES}{CALIBRATED}",
        baseline="cat",
        steps=16,
    ),
    Suite(
        "playground-merged-pairs",
        "Two subjects in one image, their LoRAs in one file, merged in every way; and that file inside regions.",
        _pairs(TEN, HALVES),
        f"""{MERGES}{CALIBRATED}
{{name: regional, method: regional}}
{{name: "regional, cat", method: regional, merge: cat}}
{{name: "regional, tsv", method: regional, merge: tsv}}
{{name: "regional, ssr", method: regional, merge: ssr}}
{{name: "regional, iteris", method: regional, merge: iteris}}""",
        baseline="cat",
        steps=16,
    ),
    Suite(
        "playground-flux",
        "The transformer of the playground: pairs, two of one class and three concepts, with ordinary LoRAs of its "
        "own.",
        [*_pairs(TEN, HALVES), *_pairs(ONE_CLASS, HALVES), *threes(THREES, THIRDS)],
        f"merge\ntara\nregional\nswitch\ncomposite\n{FREE_DRAFT}",
        model="playground-flux",
    ),
    Suite(
        "playground-flux-draft",
        "The transformer of the playground, in scenes, places and seeds that no setting was chosen by: pairs, one "
        "class and three concepts on a square canvas. regional and one draft get a column for each concept.",
        [*_pairs(HELD_BACK, HALVES), *_pairs(HELD_BACK_ONE_CLASS, HALVES), *threes(HELD_BACK_SQUARES, THIRDS)],
        f"merge\n{IN_COLUMNS}\n{FREE_DRAFT}\n{PUBLISHED}",
        seeds=(40, 41, 42, 43),
        model="playground-flux",
    ),
    *(
        Suite(
            f"playground-flux-{steps}-steps",
            f"The transformer of the playground in {steps} steps: scenes and seeds that no setting was chosen by.",
            _pairs(HELD_BACK, HALVES),
            f"merge\nregional\n{FREE_DRAFT}",
            seeds=(40, 41, 42, 43),
            steps=steps,
            model="playground-flux",
        )
        for steps in (8, 4)
    ),
    Suite(
        "playground-flux-parts",
        "The transformer of the playground: each part of composing alone, in scenes that settings may be chosen by.",
        [*_pairs(TEN, HALVES), *_pairs(ONE_CLASS, HALVES), *threes(TRIED_THREES, THIRDS)],
        PARTS_IN_ONE_SEQUENCE,
        seeds=(10, 11),
        baseline="draft",
        model="playground-flux",
    ),
)


class SceneFile(NamedTuple):
    """A scene that `lora-compose run --scene` reads.

    Attributes:
        name: Name of the file.
        about: A comment at its top.
        place: Concepts, background and boxes.
        kind: Suffix of the LoRAs: "-tara", or nothing.
    """

    name: str
    about: str
    place: Place
    kind: str = ""

    def text(self) -> str:
        """The file."""
        place = self.place
        size = (SIZE, SIZE) if place.boxes and not place.size else place.size
        lines = [*(f"# {line}" for line in textwrap.wrap(self.about, 118)), f"prompt: {place.prompt}"]
        if size:
            lines += [f"width: {size[0]}", f"height: {size[1]}"]
        lines.append("concepts:")
        for number, name in enumerate(place.concepts):
            trigger, class_word = _words(name)
            lines += [f"  - name: {name}", f"    lora: playground:{name}{self.kind}", f"    trigger: {trigger}"]
            lines.append(f"    class_word: {class_word}")
            if place.boxes:
                lines.append(f"    region: {list(place.boxes[number])}")
        return "\n".join([*lines, ""])


def _for_tara(about: str, one: str, other: str, ground: str) -> SceneFile:
    ordinary = (
        f"The LoRAs are those for tara; for merge, playground:{one} and playground:{other} are the ordinary ones."
    )
    return SceneFile(f"{one}-{other}", f"{about} {ordinary}", Place((one, other), ground), "-tara")


SCENES = (
    _for_tara("My cat, and my dog with its top hat.", "cat", "dog", "on a white background"),
    _for_tara("A woman and a man, each from a LoRA of their own.", "mira", "omar", "in a room"),
    _for_tara("A bear with sunglasses, and a robot.", "bear", "robot", "on grass"),
    SceneFile(
        "bear-robot-words",
        "A bear and a robot in their ordinary LoRAs, without boxes. For draft and clora.",
        Place(("bear", "robot"), "on grass"),
    ),
    SceneFile(
        "cat-dog-boxes",
        "The cat and the dog in their ordinary LoRAs, a box each: left, top, right, bottom in pixels.",
        Place(("cat", "dog"), "on a white background", BOXES),
    ),
    SceneFile(
        "two-cats",
        "Two cats, told apart by words alone: a black one, and a gray kitten with a bow. For draft.",
        Place(("cat", "kitten"), "on grass"),
    ),
    SceneFile(
        "three",
        "Three concepts on a wide canvas, each in a box of its own: left, top, right, bottom in pixels.",
        Place(("dog", "mira", "bear"), "on a yellow background", APART[:3], WIDE),
    ),
)


@handle_errors()
def main(out: Annotated[Path, typer.Argument(help="A folder, such as assets.")]) -> None:
    """Writes suites/NAME.yaml and scenes/NAME.yaml."""
    for suite in SUITES:
        write_whole(out / "suites" / f"{suite.name}.yaml", suite.text().encode())
    for scene in SCENES:
        write_whole(out / "scenes" / f"{scene.name}.yaml", scene.text().encode())
    echo(f"{len(SUITES)} suites and {len(SCENES)} scenes in {out}")


if __name__ == "__main__":
    typer.run(main)
