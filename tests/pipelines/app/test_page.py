"""The page itself, served on loopback and driven as a browser would drive it."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from app_world import FORM, HEIGHT, WIDTH, limits, models
from PIL import Image

from pipelines.app.app import App
from pipelines.app.models import HYBRID
from pipelines.media.video import count_frames

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

ALONE = list((FORM | {"models": [HYBRID]}).values())
IMAGE, VIDEO = (list(FORM).index(name) for name in ("image", "video"))
ENDLESS = list((FORM | {"models": [HYBRID], "blocks": 0}).values())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[App, str, Path]]:
    from pipelines.app.page import Defaults, build, serving

    folder = tmp_path_factory.mktemp("page")
    with App(models(), limits(running=2, waiting=4, playback_fps=60), folder / "runs") as app:
        page = build(app, Defaults("a red shape", HEIGHT, WIDTH, 4), folder / "gradio")
        with serving(page, "127.0.0.1", 0) as address:
            yield app, address, folder / "runs"


@pytest.fixture
def client(served: tuple[App, str, Path], tmp_path: Path) -> Iterator[Any]:
    client = new_client(served[1], tmp_path)
    yield client
    client.close()
    until(lambda: not served[0].places)


def new_client(address: str, folder: Path) -> Any:
    return gradio_client.Client(address, verbose=False, download_files=folder)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_frames(job: Any) -> bool:
    return any("data:image/webp" in str(output[0]) for output in job.outputs())


def test_the_page_loads_nothing_from_elsewhere(served: tuple[App, str, Path]) -> None:
    page = httpx.get(served[1]).text
    theme = httpx.get(served[1] + "theme.css").text.replace("http://www.w3.org/2000/svg", "")  # a name
    names = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="([^"]*)"', page)
    assert names and not [name for name in names if "//" in name.replace(served[1], "")]
    assert theme and "http" not in theme
    assert httpx.get(served[1] + "config").json()["analytics_enabled"] is False


def test_a_visitor_generates_steers_and_downloads(client: Any) -> None:
    job = client.submit(*ENDLESS, api_name="/start")
    until(lambda: has_frames(job))
    assert "done" in client.predict(api_name="/pause")
    assert "done" in client.predict("a blue shape", api_name="/switch")
    assert "done" in client.predict(5, api_name="/fork_the_first_video")
    assert "empty" in client.predict("", api_name="/switch")
    assert "done" in client.predict(api_name="/go_on")
    until(lambda: "fork with seed 5" in str(job.outputs()[-1]) and "a blue shape" in str(job.outputs()[-1]))
    first, _ = client.predict(1, api_name="/make_an_mp4")
    kept, _ = client.predict(2, api_name="/save_the_session")
    assert "done" in client.predict(api_name="/stop")
    assert "stopped" in job.result()[1]
    second, _ = client.predict(2, api_name="/make_an_mp4")
    assert all(count_frames(Path(file)) > 0 for file in (first, second))
    none, message = client.predict(3, api_name="/make_an_mp4")
    assert none is None and "no video 3" in message
    job = client.submit(gradio_client.handle_file(kept), api_name="/load_the_session")
    until(lambda: has_frames(job))
    assert "saved session" in str(job.outputs()[-1]) and "done" in client.predict(api_name="/stop")


def test_bad_input_is_a_message_and_the_next_start_works(client: Any, tmp_path: Path) -> None:
    for place, value, message in ((0, "", "empty"), (1, [], "no model"), (4, 10**9, "height"), (5, 31, "multiple")):
        form = [*ALONE[:place], value, *ALONE[place + 1 :]]
        assert message in client.submit(*form, api_name="/start").result()[1]
    picture = tmp_path / "picture.png"
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(picture)
    for place, name in ((IMAGE, "text.png"), (VIDEO, "text.mp4")):
        (tmp_path / name).write_text("no picture")
        broken = gradio_client.handle_file(tmp_path / name)
        job = client.submit(*ALONE[:place], broken, *ALONE[place + 1 :], api_name="/start")
        assert name in job.result()[1]
    for image in (None, gradio_client.handle_file(picture)):
        job = client.submit(*ALONE[:IMAGE], image, *ALONE[IMAGE + 1 :], api_name="/start")
        assert "finished" in job.result()[1] and has_frames(job)


def test_a_page_that_closes_in_the_middle_leaves_nothing(served: tuple[App, str, Path], tmp_path: Path) -> None:
    app, address, runs = served
    stays, goes = (new_client(address, tmp_path) for _ in range(2))
    jobs = [each.submit(*ENDLESS, api_name="/start") for each in (stays, goes)]
    until(lambda: all(map(has_frames, jobs)))
    goes.close()
    until(lambda: app.places == 1 and len(list(runs.iterdir())) == 1)
    before = len(jobs[0].outputs())
    until(lambda: len(jobs[0].outputs()) > before + 2)
    stays.close()
    until(lambda: not app.places and not list(runs.iterdir()))


def test_another_session_sees_nothing_of_it(served: tuple[App, str, Path], client: Any, tmp_path: Path) -> None:
    job = client.submit(*ALONE, api_name="/start")
    job.result()
    other = new_client(served[1], tmp_path)
    assert "start first" in other.predict(1, api_name="/make_an_mp4")[1]
    assert "start first" in other.predict(api_name="/stop")
    other.close()
