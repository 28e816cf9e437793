"""The page, in Gradio: components, and the handlers that hand what visitors do to `App`.

The page loads nothing from other hosts: fonts and scripts are those of the gradio package, which is told to send no
statistics. Nothing else imports gradio.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.app.app import App
from pipelines.app.limits import MAX_STEPS
from pipelines.app.live import LaneBlock, RunState
from pipelines.app.pictures import STYLE, lanes_html, message_html
from wan.utils.errors import InputError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise InputError(f"the app needs gradio, and {error.name} is missing: pip install -e '.[demo]'") from error

MAX_EVENTS = 256
"""Clicks of all visitors that wait to be handled."""
CACHE_SECONDS = (300, 1800)
"""How often gradio looks for old copies of downloads, and how old they may become."""
HEARTBEAT_SECONDS = "2"
"""Time after which the server notices at the latest that a page's connection is gone."""
MAX_UPLOAD = "20mb"
"""Size of a picture's file."""
SAID = {
    RunState.running: "generating",
    RunState.paused: "paused",
    RunState.finished: "finished",
    RunState.stopped: "stopped",
}


@dataclass(frozen=True)
class Defaults:
    """What the page shows at first.

    Attributes:
        blocks: length of a video; 0 for no end.
    """

    prompt: str
    height: int
    width: int
    blocks: int
    seed: int = 0


def build(app: App, defaults: Defaults, folder: Path) -> gr.Blocks:
    """The page of an app.

    Args:
        folder: for gradio's copies of downloads.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read by components and by the server
    os.environ["GRADIO_HEARTBEAT_INTERVAL"] = HEARTBEAT_SECONDS
    limits = app.limits
    with gr.Blocks(title="ARL² live", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown("# ARL² live\n" + "\n".join(f"- **{each.name}**: {each.about}" for each in app.models.values()))
        with gr.Row():
            prompt = gr.Textbox(defaults.prompt, label="Prompt", max_length=limits.prompt_characters, scale=3)
            models = gr.CheckboxGroup(list(app.models), value=list(app.models), label="Models, from the same noise")
        with gr.Row():
            seed = gr.Number(defaults.seed, label="Seed", precision=0)
            steps = gr.Slider(0, MAX_STEPS, 0, step=1, label="Steps per block (0: the model's own)")
            height = gr.Number(defaults.height, label="Height", precision=0)
            width = gr.Number(defaults.width, label="Width", precision=0)
            blocks = gr.Slider(0, limits.blocks, defaults.blocks, step=1, label="Blocks (0: no end)")
        with gr.Row():
            buttons = {name: gr.Button(name) for name in ("Start", "Pause", "Go on", "Stop")}
        said, stage = gr.HTML(), gr.HTML()
        image = gr.File(label="Picture to start with", file_types=["image"], height=90)
        form = [prompt, models, seed, steps, height, width, blocks, image]
        buttons["Start"].click(_starter(app), form, [stage, said], api_name="start", show_progress="hidden")
        for name, action in (("Pause", app.pause), ("Go on", app.go_on), ("Stop", app.stop)):
            event = {"api_name": name.lower().replace(" ", "_"), "show_progress": "hidden"}
            buttons[name].click(_handler(action), [], said, **event)
        _add_steering(app, said)
        page.unload(_leaver(app))
    page.queue(max_size=MAX_EVENTS, default_concurrency_limit=None)
    return page


def _add_steering(app: App, said: gr.HTML) -> None:
    """Prompt switching, forks and downloads."""
    with gr.Row():
        prompt = gr.Textbox(label="Another prompt", max_length=app.limits.prompt_characters, scale=3)
        switch = gr.Button("Switch")
        seed = gr.Number(1, label="Seed of the fork", precision=0)
        fork = gr.Button("Fork the first video")
    switch.click(_text_handler(app.switch), [prompt], said, api_name="switch", show_progress="hidden")
    fork.click(_number_handler(app.fork), [seed], said, api_name="fork", show_progress="hidden")
    with gr.Row():
        number = gr.Number(1, label="Video", precision=0)
        save = gr.Button("Make an mp4 of what is there")
        file = gr.File(label="mp4", interactive=False)
    save.click(_saver(app), [number], [file, said], api_name="save", show_progress="hidden")


def _starter(app: App) -> Callable[..., Iterator[tuple[Any, Any]]]:
    names = ("prompt", "models", "seed", "steps", "height", "width", "blocks", "image")

    def start(
        prompt: str,
        models: list[str],
        seed: int,
        steps: int,
        height: int,
        width: int,
        blocks: int,
        image: str | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any]]:
        values = (prompt, models, seed, steps, height, width, blocks, image)
        shown: dict[int, LaneBlock] = {}
        last: tuple[RunState, str] | None = None
        updates = app.start(_visitor(request), dict(zip(names, values, strict=True)))
        try:
            for update in updates:
                shown |= {block.lane: block for block in update.blocks}
                text = update.message or SAID.get(update.state, "")
                is_news = (update.state, text) != last and bool(text)
                last = (update.state, text) if is_news else last
                said = message_html(text, update.state is RunState.failed) if is_news else gr.skip()
                yield lanes_html(list(shown.values()), app.limits.playback_fps) if update.blocks else gr.skip(), said
        finally:
            updates.close()  # type: ignore[attr-defined]  # a generator

    return start


def _visitor(request: gr.Request) -> str:
    """The key of a browser session.

    Raises:
        InputError: the caller has none.
    """
    if not request.session_hash:
        raise gr.Error("this call has no session: send a session_hash")
    return str(request.session_hash)


def _told(action: Callable[[], None]) -> str:
    """Do what a button asks for; bad input becomes a message."""
    try:
        action()
    except InputError as error:
        return message_html(str(error), is_error=True)
    return message_html("done")


def _handler(action: Callable[[str], None]) -> Callable[..., str]:
    def handle(request: gr.Request) -> str:
        return _told(lambda: action(_visitor(request)))

    return handle


def _text_handler(action: Callable[[str, Any], None]) -> Callable[..., str]:
    def handle(text: str, request: gr.Request) -> str:
        return _told(lambda: action(_visitor(request), text))

    return handle


def _number_handler(action: Callable[[str, Any], None]) -> Callable[..., str]:
    def handle(number: int, request: gr.Request) -> str:
        return _told(lambda: action(_visitor(request), number))

    return handle


def _saver(app: App) -> Callable[..., tuple[str | None, str]]:
    def save(number: int, request: gr.Request) -> tuple[str | None, str]:
        try:
            path = app.save(_visitor(request), number)
        except InputError as error:
            return None, message_html(str(error), is_error=True)
        return str(path), message_html("the file holds all frames so far")

    return save


def _leaver(app: App) -> Callable[..., None]:
    def leave(request: gr.Request) -> None:
        app.leave(_visitor(request))

    return leave


@contextmanager
def serving(page: gr.Blocks, host: str, port: int, open_browser: bool = False) -> Iterator[str]:
    """Serve a page while the context lasts.

    Args:
        host: address to listen on; 127.0.0.1 lets nobody else in.
        port: 0 for any that is free.

    Yields:
        the page's address.

    Raises:
        InputError: the port is taken, or the address is none of this machine.
    """
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            inbrowser=open_browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            max_threads=MAX_EVENTS,
            css=STYLE,
        )
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error}): give another --port or --host") from error
    try:
        yield address
    finally:
        page.close(verbose=False)


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])
