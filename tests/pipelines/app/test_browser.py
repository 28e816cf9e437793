"""The page of the toy world in a real browser: opened, started, steered, downloaded from, and closed in the middle.

Screenshots go to the folder that ARL2_SCREENSHOTS names, or to the test's own.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from pipelines.media.video import count_frames

pytest.importorskip("gradio", reason="needs gradio: make app-env")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make install")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREEN = {"width": 1280, "height": 900}
START_SECONDS, WAIT_SECONDS = 60, 30
FIRST_PICTURE_SECONDS = 10
"""Seconds until the first picture: 2 are wanted on two idle cores, and a machine that runs other tests is slower."""


@dataclass
class Served:
    """An app that runs as a process.

    Attributes:
        runs: folder of the recordings of all generations.
    """

    address: str
    runs: Path
    process: "subprocess.Popen[str]"

    def is_free(self) -> bool:
        """Whether no generation holds anything."""
        return not list(self.runs.glob("*"))


def until(holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Start the app as `make app` does, with its files in a folder."""
    bundle = ("--hybrid_checkpoint", "models/toyworld/hybrid_75.safetensors", "--device", "cpu", "--port", "0")
    command = [sys.executable, "scripts/app.py", "--config", "configs/toyworld/inference.yaml", *bundle]
    environment = os.environ | {"TMPDIR": str(folder), "COLUMNS": "200"}
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True)
    try:

        def address() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"the page is at (http://\S+);", log.read_text())
            return found and found[1]

        until(lambda: address() is not None, START_SECONDS)
        (runs,) = folder.glob("arl2-app-*")
        yield Served(str(address()), runs / "runs", process)
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(served: Served, browser: Any) -> Iterator[Any]:
    """The page, open; what it asks of other hosts fails the test, as do errors of its scripts."""
    context = browser.new_context(viewport=SCREEN, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_SECONDS)
    asked, broken = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(served.address)
    yield page
    context.close()
    assert not broken
    assert not [url for url in asked if not url.startswith((served.address, "data:", "blob:"))]
    until(served.is_free)


@pytest.fixture
def keep(page: Any, tmp_path: Path) -> Callable[[str], None]:
    """Keeps a screenshot of the whole page under a name."""
    folder = Path(os.environ.get("ARL2_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: page.screenshot(path=folder / f"{name}.png", full_page=True)


def click(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def says(page: Any, text: str) -> None:
    """Wait for a message of the page."""
    page.locator(".arl2-note, .arl2-error").filter(has_text=text).first.wait_for()


def lane(page: Any, number: int) -> Any:
    return page.locator(".arl2-lane").nth(number - 1)


def frames_shown(page: Any, number: int) -> int:
    found = re.search(r"(\d+) frames", lane(page, number).inner_text())
    assert found
    return int(found[1])


def set_blocks(page: Any, blocks: int) -> None:
    page.get_by_label("number input for Blocks").fill(str(blocks))


def save(page: Any, button: str, name: str, path: Path) -> Path:
    """Download what a button makes of the first video."""
    click(page, button)
    with page.expect_download() as download:
        page.locator(f'a[download^="{name}"]').first.click()
    download.value.save_as(path)
    return path


def send(page: Any, place: str, path: Path) -> None:
    """Drop a file where the page takes one, and wait until it is there."""
    block = page.locator(".block").filter(has_text=place)
    block.locator("input[type=file]").set_input_files(path)
    block.get_by_text(path.stem).first.wait_for()


def test_a_visit(page: Any, keep: Callable[[str], None], tmp_path: Path) -> None:
    keep("opened")
    set_blocks(page, 3)
    begin = time.monotonic()
    click(page, "Start")
    lane(page, 1).locator("img").wait_for()
    assert time.monotonic() - begin < FIRST_PICTURE_SECONDS
    says(page, "finished")
    assert [frames_shown(page, number) for number in (1, 2, 3)] == [33] * 3
    keep("side by side")

    page.get_by_label("Prompt", exact=True).fill("")
    click(page, "Start")
    says(page, "the prompt is empty")
    assert page.locator(".arl2-error").count() == 1
    page.get_by_label("Prompt", exact=True).fill("a red ring moves behind the wall and comes out again")

    page.get_by_label("full memory").uncheck()
    page.get_by_label("equal window").uncheck()
    set_blocks(page, 0)
    click(page, "Start")
    lane(page, 1).filter(has_text="a red ring").wait_for()
    page.get_by_label("Another prompt").fill("a blue square bounces off the sides")
    click(page, "Switch")
    lane(page, 1).filter(has_text="a blue square").wait_for()
    page.get_by_label("Seed of the fork").fill("7")
    click(page, "Fork the first video")
    lane(page, 2).filter(has_text="fork with seed 7").wait_for()
    keep("switched and forked")
    click(page, "Pause")
    says(page, "paused")
    counts = [frames_shown(page, number) for number in (1, 2)]
    time.sleep(0.5)
    assert counts == [frames_shown(page, number) for number in (1, 2)]
    click(page, "Go on")
    until(lambda: frames_shown(page, 2) > counts[1])
    click(page, "Stop")
    says(page, "stopped")
    page.get_by_label("Video", exact=True).fill("2")
    file = save(page, "Make an mp4", "video-2", tmp_path / "video.mp4")
    # One block may have been computed, and not be shown, when it was stopped.
    assert 0 <= count_frames(file) - frames_shown(page, 2) <= 12


def test_a_memory_test(page: Any, keep: Callable[[str], None]) -> None:
    click(page, "Memory test")
    lane(page, 1).locator(".arl2-back").wait_for()
    says(page, "finished")
    found = [lane(page, number).locator(".arl2-verdict").all_inner_texts() for number in (1, 2, 3)]
    assert [len(verdicts) for verdicts in found] == [1] * 3
    assert found[0][0].startswith("right: ") and found[1][0].startswith("gone: ")
    keep("memory test")


def test_a_video_and_a_session_are_continued(page: Any, keep: Callable[[str], None], tmp_path: Path) -> None:
    page.get_by_label("full memory").uncheck()
    page.get_by_label("equal window").uncheck()
    set_blocks(page, 2)
    click(page, "Start")
    says(page, "finished")
    assert frames_shown(page, 1) == 21
    send(page, "Video to continue", save(page, "Make an mp4", "video-1", tmp_path / "given.mp4"))
    set_blocks(page, 0)
    page.get_by_label("recompute").check()
    click(page, "Start")
    lane(page, 1).filter(has_text="45 frames").wait_for()  # those of the file, and two blocks
    session = save(page, "Save the session", "session-1", tmp_path / "kept.safetensors")
    click(page, "Stop")
    says(page, "stopped")
    send(page, "Saved session", session)
    click(page, "Load the session")
    lane(page, 1).filter(has_text="saved session").wait_for()
    page.get_by_label("Another prompt").fill("a blue square bounces off the sides")
    click(page, "Switch")
    lane(page, 1).filter(has_text="a blue square").wait_for()
    keep("continued")
    click(page, "Stop")
    says(page, "stopped")


def test_closed_in_the_middle(page: Any, served: Served) -> None:
    set_blocks(page, 0)
    page.get_by_label("full memory").uncheck()
    click(page, "Start")
    lane(page, 2).locator("img").wait_for()
    assert not served.is_free()
    page.close()
    until(served.is_free)
