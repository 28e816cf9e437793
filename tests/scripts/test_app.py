"""The command line of the live page; `tests/pipelines/app` has the page itself."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
from paths import ROOT

from pipelines.app.limits import Limits
from pipelines.generation.arguments import plan_run

CONFIG = ROOT / "configs" / "toyworld" / "inference.yaml"


def status(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", ["app.py", "--config", str(CONFIG), *map(str, flags)])
    found = import_module("app").main()
    assert isinstance(found, int)
    return found


def test_the_config_bounds_what_the_page_offers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    app = import_module("app")
    given = ["--config", str(CONFIG), "--running", "3", "--num_output_frames", "42", "fps=8", "--device", "cpu"]
    arguments = app.app_parser().parse_args(given)
    assert (arguments.host, arguments.port, arguments.open_browser) == ("127.0.0.1", 7860, False)
    arguments.output_folder = tmp_path
    limits = app.limits_of(arguments, plan_run(arguments, lambda _: []).config)
    assert limits == Limits(running=3, waiting=8, pixels=64 * 96, blocks=14, given_frames=165, playback_fps=8)


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "pipelines.app.page", raising=False)
    assert status(monkeypatch) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the app needs gradio, and gradio is missing: pip install -e '.[demo]'"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hybrid_checkpoint", "nowhere.pt"), "no checkpoint at nowhere.pt"),
        (("--port", 70000), "--port"),
        (("--running", 0), "--running"),
        (("--checkpoint_path", "nowhere.pt"), "no checkpoint at nowhere.pt"),
    ],
)
def test_bad_flags_are_named_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert status(monkeypatch, *flags) == 2
    assert message in capsys.readouterr().err
