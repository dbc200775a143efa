"""The model, and how it is opened."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st
from huggingface_hub import constants

from lora_compose.compose.files.paths import is_hub_name
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.generate.defaults import complete
from lora_compose.compose.generate.machine import devices
from lora_compose.compose.page.catalog import OWN, PUBLISHED, KnownModel, cached_models, models_in
from lora_compose.compose.page.open_models import ModelChoice
from lora_compose.compose.page.screen import fields
from lora_compose.compose.page.screen.state import MODELS, PageSession
from lora_compose.compose.page.text import markdown
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.compose.support.savers import SAVERS, Saver, in_order
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.quantising import QUANTISED, check_quantize

_KIND, _NAME, _DTYPE, _DEVICE, _MEMORY = "set.model.kind", "set.model.name", "set.dtype", "set.device", "set.memory"
_BITS, _WEIGHTS = "set.bits", "set.bits.file"
_WHOLE, _FILE = "As it is", "A file of the denoiser"
_FOLDER = "do.model.folder.name"
_OWN = "A folder or a hub repository"
PLACE = "model"
"""The place on the screen that shows why a model was not opened."""
_SHORT = 32  # letters of a model's name that are shown


def model_part(session: PageSession) -> None:
    """The open model, and the fields to open another one."""
    choice = session.model.choice
    show_choice(choice)
    with st.popover(f"Model: **{markdown(_short(choice.model))}**", icon=":material/deployed_code:"):
        labels = {model.source: model.words for model in _known(session)} | {_OWN: _OWN}
        if st.session_state[_KIND] not in labels:  # named by an image, or its folder has gone
            st.session_state[_NAME], st.session_state[_KIND] = st.session_state[_KIND], _OWN
        kind = st.selectbox("Model", list(labels), key=_KIND, format_func=labels.__getitem__, on_change=_named, help=(
            "The playgrounds draw small images, quickly and offline. Each has LoRAs of its own."
        ))  # fmt: skip
        if kind == _OWN:
            st.text_input(
                "Folder as diffusers saves it, .safetensors file, or hub repository",
                key=_NAME,
                on_change=_named,
                placeholder="stable-diffusion-v1-5/stable-diffusion-v1-5",
            )
            supported = dict.fromkeys(family.family for family in ComposePipeline.families)
            st.caption(f"{', '.join(supported)}. Weights are read from safetensors only. A hub repository is "
                       "downloaded first.")  # fmt: skip
        if session.options.local:
            _folders(session)
        left, right = st.columns(2)
        left.selectbox("Precision", [fields.AUTOMATIC, "float32", "float16", "bfloat16"], key=_DTYPE, help=(
            "Automatic: on a CPU and on mps float32; on a GPU float16 for Stable Diffusion, bfloat16 for the others."
        ))  # fmt: skip
        right.selectbox("Device", [fields.AUTOMATIC, *devices()], key=_DEVICE)
        bits = st.selectbox("Fewer bits", [_WHOLE, *QUANTISED, *([_FILE] if session.options.local else [])], key=_BITS,
                            format_func=lambda name: f"{name}: {QUANTISED[name]}" if name in QUANTISED else name,
                            help="Needs less memory; changes images a little. Some need a package, which the message "
                                 "names.")  # fmt: skip
        if bits == _FILE:
            st.text_input("File", key=_WEIGHTS, placeholder="flux1-dev-Q4_K_S.gguf, or .safetensors in fp8")
        st.multiselect("Save memory", list(Saver), key=_MEMORY, help=(
            "Less memory, but slower. Keeping parts on the CPU needs a GPU. Not stored in images: "
            "tiles can change a large image slightly."
        ), format_func=lambda saver: SAVERS[saver][0].upper() + SAVERS[saver][1:])  # fmt: skip
        chosen, is_open = _chosen(), _chosen() == choice and st.session_state[_DTYPE] != fields.AUTOMATIC
        st.button(
            "Open this model", on_click=_open, args=(session, chosen), disabled=is_open or session.working,
            icon=":material/folder_open:",
        )  # fmt: skip
        if session.defaults_told:
            st.caption(f"The model's own: {markdown(session.defaults_told)}.")


def _named() -> None:
    """Another model has a precision of its own."""
    st.session_state[_DTYPE] = fields.AUTOMATIC


def _known(session: PageSession) -> list[KnownModel]:
    """The small models, those on this machine, and a published one of each family that is not.

    A page that is open to other machines does not tell them what is on this one.
    """
    here = _here(tuple(session.model_folders), Path(constants.HF_HUB_CACHE)) if session.options.local else []
    sources = {model.source for model in here}
    return [*OWN, *here, *(model for model in PUBLISHED if model.source not in sources)]


@st.cache_data(show_spinner=False, ttl=60)
def _here(folders: tuple[Path, ...], cache: Path) -> list[KnownModel]:
    models = cached_models(cache)
    for folder in folders:
        with suppress(FileError):  # it has gone since it was added
            models += models_in(folder)
    return models


def _folders(session: PageSession) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input("A folder with models", key=_FOLDER)
        st.button("List its models", key="do.model.folder", on_click=_add_folder, args=(session,))
    for number, folder in enumerate(session.model_folders):
        st.button(f"Forget {markdown(str(folder))}", key=f"do.model.forget.{number}", type="tertiary",
                  icon=":material/close:", on_click=_forget, args=(session, folder))  # fmt: skip


def _add_folder(session: PageSession) -> None:
    session.problems[PLACE] = []
    folder = expanded(st.session_state[_FOLDER].strip()).absolute()
    try:
        if not models_in(folder):
            raise FileError(f"{folder} has no models: expected folders as diffusers saves them, or .safetensors files")
    except FileError as error:
        session.problems[PLACE] = [str(error)]
        return
    session.model_folders = [*dict.fromkeys([*session.model_folders, folder])]


def _forget(session: PageSession, folder: Path) -> None:
    session.model_folders = [other for other in session.model_folders if other != folder]


def show_choice(choice: ModelChoice) -> None:
    """Fills the fields with the open model, where they are empty."""
    st.session_state.setdefault(_KIND, choice.model)
    st.session_state.setdefault(_NAME, "")
    st.session_state.setdefault(_DTYPE, choice.dtype)
    st.session_state.setdefault(_DEVICE, choice.device or fields.AUTOMATIC)
    st.session_state.setdefault(_MEMORY, list(choice.memory))
    named = choice.quantize is None or choice.quantize in QUANTISED
    st.session_state.setdefault(_BITS, (choice.quantize or _WHOLE) if named else _FILE)
    st.session_state.setdefault(_WEIGHTS, "" if named else choice.quantize)


def take_over(session: PageSession, choice: ModelChoice) -> bool:
    """Shows a model that an image names, opens it if it is known here, and returns whether it is open.

    Images are not trusted: another model, or the same one in another precision, is opened, and perhaps downloaded, only
    when the user asks for it. Raises ValueError if it cannot be opened.
    """
    named = choice.quantize is None or choice.quantize in QUANTISED
    known = (choice.model in PLAYGROUNDS and named) or choice == session.model.choice
    if known and choice != session.model.choice:
        session.model = MODELS.open(choice)
    for name in (_KIND, _NAME, _DTYPE, _DEVICE, _MEMORY, _BITS, _WEIGHTS):
        st.session_state.pop(name, None)
    show_choice(choice)
    return known


def _short(model: str) -> str:
    """The last part of a path or a repository's name."""
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name if len(name) <= _SHORT else f"{name[: _SHORT - 3]}..."


def _chosen() -> ModelChoice:
    kind, device, bits = (st.session_state[name] for name in (_KIND, _DEVICE, _BITS))
    return ModelChoice(
        st.session_state[_NAME].strip() if kind == _OWN else kind,
        ModelChoice.dtype if st.session_state[_DTYPE] == fields.AUTOMATIC else st.session_state[_DTYPE],
        None if device == fields.AUTOMATIC else device,
        in_order(st.session_state[_MEMORY]),
        {_WHOLE: None, _FILE: st.session_state[_WEIGHTS].strip()}.get(bits, bits),
    )


def open_first(session: PageSession) -> None:
    """Opens the model that the page was started with; why it cannot be opened is shown."""
    show_choice(session.model.choice)
    st.session_state[_KIND], st.session_state[_DTYPE] = session.options.model, fields.AUTOMATIC
    _open(session, replace(session.model.choice, model=session.options.model))


def _open(session: PageSession, choice: ModelChoice) -> None:
    session.problems[PLACE] = []
    before = session.model
    try:
        if not choice.model:
            raise ValueError("Name a model: a folder, a .safetensors file, or a hub repository.")
        _check_allowed(session, choice.model)
        if choice.quantize is not None and choice.quantize not in QUANTISED:
            _check_allowed(session, choice.quantize)
        check_quantize(choice.quantize)
        asked: dict[str, Any] = {} if st.session_state[_DTYPE] == fields.AUTOMATIC else {"dtype": choice.dtype}
        run, told = complete(Run(scene=Scene(prompt="-"), model=choice.model, device=choice.device, **asked))
        session.model = MODELS.open(replace(choice, dtype=run.dtype))
        cleared = fields.clear_example(session)
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # offloading needs a device, accelerate says so
        session.problems[PLACE] = [str(error)]
        return
    st.session_state[_DTYPE], session.defaults_told = run.dtype, told.removeprefix("by default ")
    if session.model.defaults != before.defaults or cleared:  # else the user may have chosen them
        st.session_state[fields.STEPS], st.session_state[fields.GUIDANCE] = session.model.defaults
    if fields.size() == before.size:  # the user has not chosen another one
        fields.resize(session, session.model.size)


def _check_allowed(session: PageSession, model: str) -> None:
    given = model in (*PLAYGROUNDS, session.options.model)
    if session.options.local or given or (is_hub_name(model) and not expanded(model).exists()):
        return
    raise ValueError("This page is open to other machines, so files on this one cannot be opened from here; use a hub "
                     "repository.")  # fmt: skip
