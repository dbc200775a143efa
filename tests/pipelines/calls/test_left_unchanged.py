"""A call leaves nothing behind however it ends, and no other call disturbs it."""

import sys
import threading

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from components import EVERYTHING, FAMILIES, State, random_lora, seeded
from composing import (
    BOXED,
    UPDATES,
    StoppedError,
    compose,
    far_apart,
    latents_of,
    raise_at_step,
    run,
    same_bits,
    with_concepts,
)
from lora_compose.pipelines.families import ComposePipeline
from pairs import in_pairs, slow_but


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("merge", StoppedError),
        pytest.param("composite", StoppedError, marks=pytest.mark.slow),
        (UPDATES, KeyboardInterrupt),
        ("tara", None),
    ],
)
def test_nothing_is_left_after_a_call_however_it_ends(pipe, load_concepts, write_lora, method, error):
    load_concepts(pipe, "cat", targets=EVERYTHING, size=0.1)
    text = random_lora(pipe.text_encoder, 5, targets=("q_proj", "v_proj", "fc1"))
    pipe.load_concept(write_lora("dog", unet=random_lora(pipe.unet, 1), text_encoder=text), trigger="zwx")
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    pipe.unet.down_blocks[0].requires_grad_(False)
    pipe.unet.up_blocks[1].train()
    pipe.text_encoder.requires_grad_(False)
    before = State(pipe)
    arguments = {"method": method, "concepts": [BOXED[0], BOXED[1].model_copy(update={"trigger": "zwx"})]}
    if error is None:
        compose(pipe, **arguments)
    else:
        with pytest.raises(error):
            compose(pipe, **arguments, **raise_at_step(error))
    before.assert_unchanged()


PARTS = [
    ("sd", "text_encoder"), ("sd", "unet"), ("sd", "vae"), ("sdxl", "text_encoder_2"),
    pytest.param("sdxl", "vae", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("family", "part", "method"), in_pairs(PARTS, ["tara", "composite"]))
def test_nothing_is_left_when_a_model_fails(composer, method, part):
    calls = []

    def fail(module, inputs):
        calls.append(module)
        if len(calls) == 2 or part in ("vae", "text_encoder_2"):
            raise StoppedError

    model = composer.vae.decoder if part == "vae" else getattr(composer, part)
    handle = model.register_forward_pre_hook(fail)
    before = State(composer)
    with pytest.raises(StoppedError):
        compose(composer, method=method, output_type="np")
    before.assert_unchanged()
    handle.remove()
    calls.clear()
    assert torch.isfinite(latents_of(composer, method=method)).all()


def test_a_call_does_not_touch_the_latents_it_is_given(composer):
    latents = torch.randn(1, 4, 16, 16, generator=seeded())
    copy = latents.clone()
    latents_of(composer, latents=latents)
    assert torch.equal(latents, copy)


@pytest.mark.parametrize("family", slow_but(["sd"], FAMILIES))
@pytest.mark.parametrize("failing", [False, True])
def test_calls_with_concepts_leave_plain_calls_as_they_were(composer, plain_pipe, failing):
    if failing:
        with pytest.raises(StoppedError):
            compose(composer, **raise_at_step(StoppedError))
    else:
        assert far_apart(latents_of(composer), run(plain_pipe).images)
    assert same_bits(run(composer).images, run(plain_pipe).images)


def test_pipelines_that_share_a_model_keep_their_concepts_apart(composer, load_concepts):
    other = ComposePipeline.from_pipe(composer)
    other.set_progress_bar_config(disable=True)
    assert other.concepts == {}
    load_concepts(other, "bear")
    here, there = {"prompt": "a sks cat", "concepts": ["cat"]}, {"prompt": "a xlo bear", "concepts": ["bear"]}
    alone = latents_of(composer, **here), latents_of(other, **there)
    assert far_apart(*alone)
    for _ in range(2):
        assert torch.equal(latents_of(composer, **here), alone[0])
        assert torch.equal(latents_of(other, **there), alone[1])
    with pytest.raises(ValueError, match="unknown concept 'cat'"):
        compose(other, **here)


@pytest.mark.parametrize(("threaded", "shared"), [(False, False), (True, True)])
def test_a_second_call_is_refused_while_the_first_one_runs_and_does_not_disturb_it(composer, threaded, shared):
    second = ComposePipeline.from_pipe(composer) if shared else composer
    if shared:
        with_concepts(second)
    second.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 3.0}
    expected = latents_of(composer, **arguments)
    messages = []

    def other_call():
        try:
            compose(second, guidance_scale=1.0)
        except RuntimeError as error:
            messages.append(str(error))

    def callback(pipe, step, timestep, tensors):
        if threaded:
            thread = threading.Thread(target=other_call)
            thread.start()
            thread.join()
        else:
            other_call()
        return tensors

    assert torch.equal(latents_of(composer, callback_on_step_end=callback, **arguments), expected)
    assert len(messages) == 2
    assert all("making another image" in message for message in messages)
    assert torch.equal(latents_of(second, **arguments), expected)


def test_a_plain_call_on_a_model_that_is_composing_is_refused_and_the_image_is_not_harmed(composer):
    alone = latents_of(composer)

    def call_plainly(pipe, step, timestep, tensors):
        with pytest.raises(RuntimeError, match="making another image right now"):
            run(pipe)
        return tensors

    assert torch.equal(latents_of(composer, callback_on_step_end=call_plainly), alone)
    run(composer)


def shared_with(pipe):
    """Another pipeline with the same models, and a scheduler of its own."""
    other = with_concepts(ComposePipeline.from_pipe(pipe))
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)


@pytest.mark.parametrize("elsewhere", [lambda work: work(), in_a_thread])
def test_a_call_with_concepts_is_refused_while_a_plain_one_runs_and_does_not_disturb_it(
    composer, plain_pipe, elsewhere
):
    second, messages = shared_with(composer), []

    def other_call():
        try:
            compose(second)
        except RuntimeError as error:
            messages.append(str(error))

    def callback(pipe, step, timestep, tensors):
        elsewhere(other_call)
        return {}

    found = run(composer, callback_on_step_end=callback)
    assert same_bits(found.images, run(plain_pipe).images)
    assert len(messages) == 2
    assert all("making another image right now" in message for message in messages)
    compose(second)


def test_plain_calls_share_a_model(composer, plain_pipe):
    second, images = shared_with(composer), []

    def callback(pipe, step, timestep, tensors):
        in_a_thread(lambda: images.append(run(second).images))
        return {}

    images.append(run(composer, callback_on_step_end=callback).images)
    assert len(images) == 3
    assert all(same_bits(image, run(plain_pipe).images) for image in images)


@pytest.mark.parametrize("call", [run, compose])
def test_a_model_is_claimed_until_the_image_is_decoded_and_free_after_an_error(composer, call):
    second, refused = shared_with(composer), []

    def compose_more(module, inputs):
        with pytest.raises(RuntimeError, match="making another image"):
            compose(second)
        refused.append(module)
        raise StoppedError

    handle = composer.vae.decoder.register_forward_pre_hook(compose_more)
    with pytest.raises(StoppedError):
        call(composer, output_type="np")
    handle.remove()
    assert len(refused) == 1
    compose(second, output_type="np")
    run(composer)


class InterruptedAt:
    """Raises KeyboardInterrupt at the nth line of some files that runs; each of them once."""

    def __init__(self, line):
        self.line, self.seen = line, set()

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith(("attention/claims.py", "attention/install.py", "gradients.py")):
            return None
        if event == "line" and (here := (frame.f_code, frame.f_lineno)) not in self.seen:
            self.seen.add(here)
            if len(self.seen) == self.line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.slow
def test_ctrl_c_at_any_line_leaves_nothing_behind(composer):
    before, line, done = State(composer), 1, False
    while not done:
        trace = InterruptedAt(line)
        sys.settrace(trace)
        try:
            compose(composer, concepts=BOXED, method=UPDATES, num_inference_steps=1, guidance_scale=3.0)
        except KeyboardInterrupt:
            assert len(trace.seen) == line
        finally:
            sys.settrace(None)
        done = len(trace.seen) < line
        before.assert_unchanged()
        line += 1
    assert line > 100, "the loop ended because nothing was left to interrupt"
    compose(composer)
