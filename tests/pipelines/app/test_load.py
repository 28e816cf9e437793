"""Sixteen visitors on loopback, of whom most misbehave: others go on, and memory and sessions come back.

The models are the shipped ones: a session of the hybrid holds 10 MiB. A minute on two cores: with `-m slow`.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from app_world import FORM, limits
from paths import ROOT

from arl2.toyworld.world.scenes import HEIGHT, WIDTH
from pipelines.app.app import App
from pipelines.app.models import HYBRID, models_of
from pipelines.config import InferenceConfig, MemoryConfig, MemoryKind
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.sessions.session import Session

pytest.importorskip("gradio", reason="needs gradio: make app-env")
gradio_client = pytest.importorskip("gradio_client")

BUNDLE = ROOT / "models" / "toyworld"
VISITORS, RUNNING, WAITING = 16, 10, 2
MAX_GROWTH = 64 * 2**20
"""Bytes by which a round may grow the process. RUNNING sessions that were not freed would grow it by 100 MiB."""
VALUES = FORM | {"models": [HYBRID], "steps": 1, "height": HEIGHT, "width": WIDTH, "blocks": 0}
ENDLESS = list(VALUES.values())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[App, str, Path]]:
    from pipelines.app.page import Defaults, build, serving

    config = InferenceConfig(memory=MemoryConfig(MemoryKind.trained, 6, 0))
    pipeline = CausalVideoPipeline.from_pretrained(BUNDLE, checkpoint_path=BUNDLE / "hybrid_75.safetensors")
    bounds = limits(running=RUNNING, waiting=WAITING, pixels=HEIGHT * WIDTH, playback_fps=24)
    with App(models_of(config, pipeline), bounds, tmp_path / "runs") as app:
        page = build(app, Defaults("a red shape", HEIGHT, WIDTH, 4), tmp_path / "gradio")
        with serving(page, "127.0.0.1", 0) as address:
            yield app, address, tmp_path / "runs"


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sessions() -> int:
    """Sessions that something still holds, and with them their memory."""
    gc.collect()
    return sum(type(each) is Session for each in gc.get_objects())


def resident() -> int:
    """Bytes of the process, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def has_frames(job: Any) -> bool:
    return any("data:image/webp" in str(output[0]) for output in job.outputs())


def crowd(app: App, address: str, folder: Path) -> None:
    """One visitor stays; the others send broken input, are refused, or vanish while they generate or wait."""
    clients = [gradio_client.Client(address, verbose=False, download_files=folder) for _ in range(VISITORS)]
    stays = clients[0].submit(*ENDLESS, api_name="/start")
    until(lambda: has_frames(stays))
    others = [each.submit(*ENDLESS, api_name="/start") for each in clients[1 : RUNNING + WAITING]]
    until(lambda: app.places == RUNNING + WAITING and sum(map(has_frames, others)) == RUNNING - 1)
    broken = [each.submit(*["", *ENDLESS[1:]], api_name="/start") for each in clients[RUNNING + WAITING :][:2]]
    refused = [each.submit(*ENDLESS, api_name="/start") for each in clients[RUNNING + WAITING :][2:]]
    assert ["empty" in job.result(60)[1] for job in broken] == [True] * 2
    assert ["limit" in job.result(60)[1] for job in refused] == [True] * 2
    assert app.places == RUNNING + WAITING and sessions() == RUNNING
    with ThreadPoolExecutor(VISITORS) as pool:
        list(pool.map(lambda each: each.close(), clients[1:]))
    until(lambda: app.places == 1)
    before = len(stays.outputs())
    until(lambda: len(stays.outputs()) > before + 3)
    assert "done" in clients[0].predict(api_name="/stop") and "stopped" in stays.result(60)[1]
    clients[0].close()


@pytest.mark.slow
def test_sixteen_visitors_of_whom_most_misbehave_leave_nothing(served: tuple[App, str, Path], tmp_path: Path) -> None:
    app, address, runs = served
    assert sessions() == 0
    before = None
    for _ in range(2):  # the first round brings what is made once: threads, caches of the server and the allocator
        crowd(app, address, tmp_path)
        until(lambda: not app.places and not list(runs.iterdir()))
        until(lambda: sessions() == 0)
        before = resident() if before is None else before
    # What the server has for a connection that is gone goes a little later.
    until(lambda: resident() - before < MAX_GROWTH)
