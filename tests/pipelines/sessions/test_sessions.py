"""Sessions: block by block the video of a stream; switched, forked, saved and continued to the same bits."""

import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from sessions_world import HEIGHT, WIDTH, Pipelines, num_frames
from torch import Tensor

from pipelines.config import MemoryConfig, MemoryKind, SinkKind
from pipelines.generation.blocks import NonFiniteBlockError, VideoBlock
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.sessions.session import Session
from wan.utils.errors import InputError

WINDOW = MemoryConfig(MemoryKind.window, 9, 3)
RED, BLUE = "a red shape", "a blue shape"
BLOCKS = 6
FRAMES = num_frames(3 * BLOCKS)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softmax, full": ({}, {"memory": "full"}),
    "softmax, window and sink": ({}, {"memory": WINDOW}),
    "hybrid, window": ({"layers": (0, 2)}, {"memory": WINDOW}),
    "hybrid, full, fast decoder": ({"layers": (0, 2), "fast": True}, {"memory": "full"}),
    "states alone": ({"layers": (0, 1, 2)}, {"memory": "full"}),
    "states with a window of their own": ({"layers": (0, 2), "local_frames": 2}, {"memory": WINDOW}),
    "averaged sink": ({}, {"memory": MemoryConfig(MemoryKind.window, 7, 2, SinkKind.average, 0.7)}),
    "made anew before every block": ({}, {"memory": MemoryConfig(MemoryKind.window, 6, 0, recompute=True)}),
    "two videos, guided": (
        {"layers": (0,), "guidance_distilled": False},
        {"memory": WINDOW, "guidance_scale": 2.0, "num_videos_per_prompt": 2, "seeds": [5, 6]},
    ),
}


def same(first: Sequence[VideoBlock], second: Sequence[VideoBlock]) -> bool:
    """Whether blocks are equal bit by bit."""
    pairs = list(zip(first, second, strict=True))
    return all(
        a.index == b.index
        and torch.equal(a.latents_BFCHW, b.latents_BFCHW)
        and torch.equal(a.pixels_BTCHW, b.pixels_BTCHW)
        for a, b in pairs
    )


def take(session: Session, count: int) -> list[VideoBlock]:
    return [session.next() for _ in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_a_saved_session_goes_on_as_an_unbroken_one(name: str, pipelines: Pipelines, tmp_path: Path) -> None:
    kind, options = CASES[name]
    pipeline, options = pipelines(**kind), {"seeds": [3], **options}
    unbroken = list(pipeline.stream(RED, FRAMES, **options))
    session = pipeline.session(RED, FRAMES, **options)
    assert same(take(session, 4), unbroken[:4]), "one loop makes both"
    session.save(tmp_path / "held.safetensors")
    fork, other = session.fork(), session.fork(seeds=[7, 8][: len(options["seeds"])])
    assert same(list(session), unbroken[4:]) and session.is_finished, "it is not changed by what is made of it"
    assert same(list(pipeline.load_session(tmp_path / "held.safetensors")), unbroken[4:])
    assert same(list(fork), unbroken[4:])
    assert not same(list(other), unbroken[4:])


def test_another_process_goes_on(pipelines: Pipelines, tmp_path: Path) -> None:
    pipeline = pipelines(layers=(0, 2))
    pipeline.save_pretrained(tmp_path / "model")
    session = CausalVideoPipeline.from_pretrained(tmp_path / "model").session(RED, FRAMES, seeds=[3], memory=WINDOW)
    take(session, 4)
    session.save(tmp_path / "held.safetensors")
    program = (
        "import sys, torch; from safetensors.torch import save_file; from pathlib import Path\n"
        "from pipelines.generation.pipeline import CausalVideoPipeline\n"
        "folder = Path(sys.argv[1]); torch.set_num_threads(int(sys.argv[2]))\n"
        "session = CausalVideoPipeline.from_pretrained(folder / 'model').load_session(folder / 'held.safetensors')\n"
        "pixels = torch.cat([block.pixels_BTCHW for block in session], dim=1)\n"
        "save_file({'pixels': pixels.contiguous()}, folder / 'rest.safetensors')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    rest = torch.cat([block.pixels_BTCHW for block in session], dim=1)
    assert torch.equal(load_file(tmp_path / "rest.safetensors")["pixels"], rest)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_given_frames_and_single_frames(after: int, pipelines: Pipelines, tmp_path: Path) -> None:
    """Blocks of one latent frame; before the first, decoded given frames wait to be handed out."""
    pipeline = pipelines(layers=(1,), frames_per_block=1)
    video = torch.rand(1, num_frames(3), 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options: dict[str, Any] = {"video": video, "seeds": [3], "memory": "full"}
    unbroken = list(pipeline.stream(RED, num_frames(8), **options))
    session = pipeline.session(RED, num_frames(8), **options)
    assert same(take(session, after), unbroken[:after])
    session.save(tmp_path / "held.safetensors")
    assert same(list(pipeline.load_session(tmp_path / "held.safetensors")), unbroken[after:])
    assert same(list(session.fork()), unbroken[after:])


def test_a_picture_and_given_noise_are_kept(pipelines: Pipelines, tmp_path: Path) -> None:
    pipeline = pipelines()
    noise = torch.randn(1, 9, 16, 2, 4, generator=torch.Generator().manual_seed(0))
    picture = torch.rand(1, 1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    options: dict[str, Any] = {"image": picture, "latents": noise, "seeds": [3]}
    unbroken = list(pipeline.stream(RED, num_frames(9), **options))
    for after in (0, 1):
        session = pipeline.session(RED, num_frames(9), **options)
        take(session, after)
        session.save(tmp_path / "held.safetensors")
        assert same(list(pipeline.load_session(tmp_path / "held.safetensors")), unbroken[after:])


def test_a_video_that_goes_through_the_steps_again(pipelines: Pipelines, tmp_path: Path) -> None:
    pipeline = pipelines()
    video = torch.rand(1, num_frames(9), 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    session = pipeline.session(RED, num_frames(9), video=video, strength=0.5, seeds=[3])
    take(session, 1)
    session.save(tmp_path / "held.safetensors")
    assert same(list(pipeline.load_session(tmp_path / "held.safetensors")), list(session))


@pytest.mark.parametrize("on_switch", ["keep", "recompute"])
@pytest.mark.parametrize("name", ["softmax, full", "softmax, window and sink", "hybrid, window", "states alone"])
def test_a_switch_is_part_of_what_is_saved(name: str, on_switch: str, pipelines: Pipelines, tmp_path: Path) -> None:
    kind, options = CASES[name]
    pipeline, options = pipelines(**kind), {"seeds": [3], "on_switch": on_switch, **options}
    scheduled = list(pipeline.stream([(0, RED), (13, BLUE)], FRAMES, **options))
    session = pipeline.session(RED, FRAMES, **options)
    assert same(take(session, 4), scheduled[:4])
    session.switch(BLUE)
    for path in ("right after.safetensors", "later.safetensors"):
        session.save(tmp_path / path)
        loaded, fork = pipeline.load_session(tmp_path / path), session.fork()
        assert same(take(loaded, 1), take(fork, 1))
        assert same([session.next()], scheduled[session._video.index - 1 : session._video.index])
    assert same(take(loaded, 0), []) and loaded.is_finished
    plain = list(pipeline.stream(RED, FRAMES, seeds=[3], memory=options["memory"]))
    assert same(plain[:4], scheduled[:4]) and not same(plain[4:5], scheduled[4:5])
    # What is still to come of a schedule is saved too.
    waiting = pipeline.session([(0, RED), (12, BLUE)], FRAMES, **options)
    take(waiting, 2)
    waiting.save(tmp_path / "waiting.safetensors")
    assert same(list(pipeline.load_session(tmp_path / "waiting.safetensors")), scheduled[2:])


@pytest.mark.parametrize("on_switch", ["keep", "recompute"])
def test_a_switch_before_the_first_block_is_a_run_with_that_prompt(on_switch: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(layers=(0, 2))
    options: dict[str, Any] = {"seeds": [3], "memory": WINDOW}
    session = pipeline.session(RED, FRAMES, on_switch=on_switch, **options)
    session.switch(BLUE)
    assert same(take(session, 4), list(pipeline.stream(BLUE, FRAMES, **options))[:4])
    by_embeddings = pipeline.session(RED, FRAMES, **options)
    by_embeddings.switch(prompt_embeds=pipeline.encode_prompt(BLUE))
    assert same(take(by_embeddings, 1), list(pipeline.stream(BLUE, FRAMES, **options))[:1])


def memory_of(session: Session) -> dict[str, Tensor]:
    return dict(session._video.memory.snapshot().tensors)


@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_recomputing_under_the_same_prompt_changes_nothing(layers: tuple[int, ...], pipelines: Pipelines) -> None:
    """As long as no frame has left the window; and of states never, since they go on from one of their own."""
    pipeline = pipelines(layers=layers)
    wide = MemoryConfig(MemoryKind.window, 18, 3)
    session = pipeline.session(RED, seeds=[3], memory=wide, on_switch="recompute")
    take(session, 5)
    session._video.remember()
    before = {name: value.clone() for name, value in memory_of(session).items()}
    session.switch(RED)
    for name, value in memory_of(session).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)
    session.switch(BLUE)
    after = memory_of(session)
    assert any(not torch.allclose(value, before[name], rtol=1e-2, atol=1e-2) for name, value in after.items())


def test_recomputing_is_what_a_run_under_the_new_prompt_would_remember(pipelines: Pipelines) -> None:
    """A long video in a small window: sink and window hold the keys of a clean pass over their latents alone."""
    pipeline = pipelines()
    session = pipeline.session(RED, seeds=[3], memory=WINDOW, on_switch="recompute")
    latents = torch.cat([block.latents_BFCHW for block in take(session, 5)], dim=1)
    session.switch(BLUE)
    model = pipeline.transformer
    text = model.embed_text(pipeline.encode_prompt(BLUE))
    from arl2.rollout import remember_block

    memory = model.memory_for(latents, 9, 3)
    for start in (0, 12):
        with torch.no_grad():
            remember_block(model, latents[:, start : start + 3], text, memory, start)
    expected = memory.snapshot().tensors
    for name, value in memory_of(session).items():
        assert torch.equal(value, expected[name]), name


def test_a_session_is_checked_and_closed(pipelines: Pipelines, tmp_path: Path) -> None:
    pipeline = pipelines()
    with pipeline.session(RED, num_frames(6), seeds=[3]) as session:
        assert session.memory_bytes == session._video.memory.num_bytes and session.next_frame == 0
        take(session, 2)
        with pytest.raises(InputError, match="has all its 2 blocks"):
            session.next()
        for wrong, words in (((), "give a prompt or"), ((["a", "a"],), "2 prompts for 1 videos"), (("",), "is empty")):
            with pytest.raises(InputError, match=words):
                session.switch(*wrong)
        with pytest.raises(InputError, match="2 seeds for 1 videos"):
            session.fork(seeds=[1, 2])
    for use in (
        session.next,
        session.fork,
        lambda: session.save(tmp_path / "x.safetensors"),
        lambda: session.switch("a"),
    ):
        with pytest.raises(InputError, match="the session is closed"):
            use()
    session.close()
    hooked = pipeline.session(RED, num_frames(6), callback_on_step_end=lambda *_: None)
    with pytest.raises(InputError, match="callback_on_step_end cannot be saved"):
        hooked.save(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="on_switch 'forget' is unknown: give keep or recompute"):
        pipeline.session(RED, num_frames(6), on_switch="forget")
    for memory, words in (
        (MemoryConfig(MemoryKind.window, 10, 3), "whole blocks of 3 frames"),
        (MemoryConfig(MemoryKind.window, 7, 2, SinkKind.average, 0.7), "does not go with this memory"),
    ):
        with pytest.raises(InputError, match=words):
            pipeline.session(RED, memory=memory, on_switch="recompute")


def test_a_session_that_broke_goes_on_nowhere(pipelines: Pipelines, tmp_path: Path) -> None:
    pipeline = pipelines()
    session = pipeline.session(RED, num_frames(9), seeds=[3])
    session.next()
    session.switch(prompt_embeds=torch.full((1, 3, pipeline.transformer.config.text_dim), torch.nan))
    for _ in range(2):
        with pytest.raises(NonFiniteBlockError, match="text embedding"):
            session.next()
    with pytest.raises(NonFiniteBlockError):
        session.save(tmp_path / "x.safetensors")


@pytest.mark.parametrize("on_switch", ["keep", "recompute"])
def test_what_is_let_go_of_is_free_at_once(on_switch: str, pipelines: Pipelines) -> None:
    """No circle of references holds a memory: recorded passes of the next video want that of the last."""
    pipeline = pipelines(layers=(0, 2))
    session = pipeline.session(RED, FRAMES, seeds=[3], memory=WINDOW, on_switch=on_switch)
    session.next()
    fork = session.fork()
    memories = [weakref.ref(each._video.memory) for each in (session, fork)]
    session.close()
    del fork
    assert [memory() for memory in memories] == [None, None]
