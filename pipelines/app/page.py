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
from pipelines.app.live import LaneBlock, RunState, Update
from pipelines.app.pictures import STYLE, lanes_html, message_html
from pipelines.prompts.schedules import OnSwitch
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
FILE_HEIGHT = 120
"""Pixels of the place where a file is dropped."""
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
        blocks: to be generated; 0 for no end.
    """

    prompt: str
    height: int
    width: int
    blocks: int
    seed: int = 0
    on_switch: OnSwitch = OnSwitch.keep


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
            choices = [switch.value for switch in OnSwitch]
            on_switch = gr.Radio(choices, value=defaults.on_switch.value, label="Memory when the prompt changes")
        with gr.Row():
            names = ("Start", *(("Memory test",) if app.has_memory_test else ()), "Pause", "Go on", "Stop")
            buttons = {name: gr.Button(name) for name in names}
        # What a button answers is apart: it may come after how the video ended, and must not hide that.
        answer, said, stage = gr.HTML(), gr.HTML(), gr.HTML()
        with gr.Row():
            image = gr.File(label="Picture to start with", file_types=["image"], height=FILE_HEIGHT)
            video = gr.File(label="Video to continue", file_types=["video"], height=FILE_HEIGHT)
        form = [prompt, models, seed, steps, height, width, blocks, image, video, on_switch]
        _on_click(buttons["Start"], _starter(app), form, [stage, said])
        if app.has_memory_test:
            _on_click(buttons["Memory test"], _tester(app), [models, seed, steps], [stage, said])
        for name, action in (("Pause", app.pause), ("Go on", app.go_on), ("Stop", app.stop)):
            _on_click(buttons[name], _handler(action), [], answer)
        _add_steering(app, answer)
        _add_files(app, stage, said, answer)
        page.unload(_leaver(app))
    page.queue(max_size=MAX_EVENTS, default_concurrency_limit=None)
    return page


def _on_click(button: gr.Button, handler: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
    """Call a handler when a button is pressed; the button's text is the name of the call for programs."""
    name = button.value.lower().replace(" ", "_")
    button.click(handler, inputs, outputs, api_name=name, show_progress="hidden")


def _add_steering(app: App, answer: gr.HTML) -> None:
    """Prompt switching and forks."""
    with gr.Row():
        prompt = gr.Textbox(label="Another prompt", max_length=app.limits.prompt_characters, scale=3)
        switch = gr.Button("Switch")
        seed = gr.Number(1, label="Seed of the fork", precision=0)
        fork = gr.Button("Fork the first video")
    _on_click(switch, _text_handler(app.switch), [prompt], answer)
    _on_click(fork, _number_handler(app.fork), [seed], answer)


def _add_files(app: App, stage: gr.HTML, said: gr.HTML, answer: gr.HTML) -> None:
    """Downloads of videos and sessions, and sessions that are brought back."""
    with gr.Row():
        number = gr.Number(1, label="Video", precision=0)
        with gr.Column():
            save = gr.Button("Make an mp4")
            keep = gr.Button("Save the session")
        file = gr.File(label="File to download", interactive=False, height=FILE_HEIGHT)
        saved = gr.File(label="Saved session", file_types=[".safetensors"], height=FILE_HEIGHT)
        load = gr.Button("Load the session")
    _on_click(save, _saver(app.save, "the file holds all frames so far"), [number], [file, answer])
    about = "the file holds what goes on after these frames"
    _on_click(keep, _saver(app.save_session, about), [number], [file, answer])
    _on_click(load, _loader(app), [saved], [stage, said])


def _starter(app: App) -> Callable[..., Iterator[tuple[Any, Any]]]:
    names = ("prompt", "models", "seed", "steps", "height", "width", "blocks", "image", "video", "on_switch")

    def start(
        prompt: str,
        models: list[str],
        seed: int,
        steps: int,
        height: int,
        width: int,
        blocks: int,
        image: str | None,
        video: str | None,
        on_switch: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any]]:
        values = (prompt, models, seed, steps, height, width, blocks, image, video, on_switch)
        yield from _shown(app, app.start(_visitor(request), dict(zip(names, values, strict=True))))

    return start


def _tester(app: App) -> Callable[..., Iterator[tuple[Any, Any]]]:
    def test(models: list[str], seed: int, steps: int, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        form = {"models": models, "seed": seed, "steps": steps}
        yield from _shown(app, app.test(_visitor(request), form))

    return test


def _loader(app: App) -> Callable[..., Iterator[tuple[Any, Any]]]:
    def load(file: str | None, request: gr.Request) -> Iterator[tuple[Any, Any]]:
        yield from _shown(app, app.load(_visitor(request), file))

    return load


def _shown(app: App, updates: Iterator[Update]) -> Iterator[tuple[Any, Any]]:
    """What the page shows of a generation: videos, and what is said."""
    shown: dict[int, LaneBlock] = {}
    last: tuple[RunState, str] | None = None
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


def _saver(save: Callable[[str, Any], Path], about: str) -> Callable[..., tuple[str | None, str]]:
    def handle(number: int, request: gr.Request) -> tuple[str | None, str]:
        try:
            path = save(_visitor(request), number)
        except InputError as error:
            return None, message_html(str(error), is_error=True)
        return str(path), message_html(about)

    return handle


def _leaver(app: App) -> Callable[..., None]:
    def leave(request: gr.Request) -> None:
        app.leave(_visitor(request))

    return leave


@contextmanager
def serving(
    page: gr.Blocks, host: str, port: int, open_browser: bool = False, max_upload: str = "100mb"
) -> Iterator[str]:
    """Serve a page while the context lasts.

    Args:
        host: address to listen on; 127.0.0.1 lets nobody else in.
        port: 0 for any that is free.
        max_upload: size of a file that a visitor sends.

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
            max_file_size=max_upload,
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
