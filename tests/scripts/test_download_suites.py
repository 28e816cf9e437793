"""Downloads of suites from a server on this machine: checked, whole or not at all, and every failure in a line."""

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest

from pipelines.evaluation.suite_files import KNOWN, read_suite

download_suites = import_module("download_suites")
INFO = "/Vchitect/VBench/master/vbench/VBench_full_info.json"
NAMES = "/Vchitect/VBench/master/prompts/all_dimension.txt"
LONG = "/guandeh17/Self-Forcing/main/prompts/vbench/all_dimension_extended.txt"
MOVIES = "/facebookresearch/MovieGenBench/main/benchmark/MovieGenVideoBench.txt"
LONG_MOVIES = "/guandeh17/Self-Forcing/main/prompts/MovieGenVideoBench_extended.txt"


class Host(ThreadingHTTPServer):
    """A host of files.

    Attributes:
        files: content by path.
        fetched: paths that were asked for.
        failures: how many more answers are 503.
        cuts: how many more answers end early.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        prompts = [f"prompt {number}" for number in range(KNOWN["vbench"].count or 0)]
        flickers = {"prompt 1", "prompt 2"}
        info = [
            {"prompt_en": prompt, "dimension": ["temporal_flickering" if prompt in flickers else "color"]}
            for prompt in prompts
        ]
        movies = [f"film {number}" for number in range(KNOWN["moviegen"].count or 0)]
        movies[-1] = movies[0]
        texts = {
            INFO: json.dumps(info),
            NAMES: "\n".join(reversed(prompts)),
            LONG: "\n".join(f"{prompt}, at length" for prompt in reversed(prompts)),
            MOVIES: "\n".join(movies),
            LONG_MOVIES: "\n".join(f"{number}, at length" for number in range(len(movies))),
        }
        self.files = {path: text.encode() for path, text in texts.items()}
        self.fetched: list[str] = []
        self.failures = self.cuts = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        self.server.fetched.append(self.path)
        content = self.server.files.get(self.path)
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        elif content is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            cut, self.server.cuts = self.server.cuts > 0, max(self.server.cuts - 1, 0)
            self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(download_suites, "PAUSE_SECONDS", 0.0)
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def download(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*flags: str) -> int:
        fixed = ["--output_folder", str(tmp_path / "suites"), "--endpoint", host.url]
        monkeypatch.setattr(sys, "argv", ["download_suites.py", *fixed, *flags])
        status: int = download_suites.main()
        return status

    return run


def test_suites_are_fetched_and_read(
    download: Callable[..., int], host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download() == 0
    folder = tmp_path / "suites"
    assert "vbench: 946 prompts, 4770 videos" in capsys.readouterr().out
    suite = read_suite("vbench", folder)
    assert suite.entries[1].extended == "prompt 1, at length" and suite.entries[1].samples == 25
    assert suite.entries[5].samples == 5 and read_suite("vbench-long", folder).entries == suite.entries
    films = read_suite("moviegen", folder).entries
    assert len(films) == 1002 and films[0].extended == "0, at length" and films[0].samples == 1
    page = json.loads((folder / "vbench" / "source.json").read_text())
    told = page["files"]["all_dimension.txt"]
    assert told["sha256"] == hashlib.sha256(host.files[NAMES]).hexdigest() and told["url"] == host.url + NAMES
    assert "Apache-2.0" in page["licence"]
    host.fetched.clear()
    assert download("--suite", "vbench") == 0 and not host.fetched, "what is there is kept"
    assert download("--suite", "vbench", "--again") == 0 and host.fetched == [INFO, NAMES, LONG]


@pytest.mark.parametrize("kind", ["failures", "cuts"])
def test_a_connection_that_fails_is_tried_again(kind: str, download: Callable[..., int], host: Host) -> None:
    setattr(host, kind, 2)
    assert download("--suite", "moviegen") == 0
    assert host.fetched == [MOVIES] * 3 + [LONG_MOVIES]


def _change(path: str, change: Callable[[bytes], bytes | None]) -> Callable[[Host], None]:
    def apply(host: Host) -> None:
        content = change(host.files.pop(path))
        if content is not None:
            host.files[path] = content

    return apply


FAULTS: dict[str, tuple[Callable[[Host], None], str]] = {
    "a file that is gone": (_change(LONG, lambda content: None), "answers 404"),
    "a host that is down": (lambda host: setattr(host, "failures", 99), "answers 503"),
    "a connection that always ends": (lambda host: setattr(host, "cuts", 99), "cannot fetch"),
    "a page in place of a list": (_change(INFO, lambda content: b"<html>log in</html>"), "not valid JSON"),
    "another list": (_change(INFO, lambda content: b'{"a": 1}'), "VBench_full_info.json"),
    "fewer prompts": (_change(INFO, lambda content: json.dumps(json.loads(content)[1:]).encode()), "lists 945 prompts"),
    "a line too many": (_change(LONG, lambda content: content + b"\nmore"), "has 947 lines"),
    "other prompts": (_change(NAMES, lambda content: content.replace(b"prompt 7\n", b"x\n")), "is not among"),
    "a file without end": (
        _change(INFO, lambda content: b" " * (download_suites.MAX_BYTES + 1)),
        "is larger than 8 MiB",
    ),
    "bytes": (_change(NAMES, lambda content: b"\xff\xfe\xfa" + content), "all_dimension.txt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_left_of_what_is_not_right(
    fault: str, download: Callable[..., int], host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = FAULTS[fault]
    spoil(host)
    assert download("--suite", "vbench") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and ".part" not in error, error
    assert list((tmp_path / "suites").iterdir()) == []


def test_what_was_there_stays_when_a_new_one_fails(
    download: Callable[..., int], host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download("--suite", "vbench") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "suites" / "vbench").iterdir()}
    host.files[LONG] = b"one line"
    assert download("--suite", "vbench", "--again") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "suites" / "vbench").iterdir()} == before
    (tmp_path / "suites" / "vbench" / "all_dimension.txt").write_text("one line")
    assert download("--suite", "vbench") == 2
    assert "line by line they must be the same prompts" in capsys.readouterr().err, (
        "a damaged one is not kept in silence"
    )


def test_without_a_network_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(download_suites, "PAUSE_SECONDS", 0.0)
    for endpoint, words in (
        ("http://127.0.0.1:9", "check the network; without one, fetch the file elsewhere"),
        ("file:///etc", "is no address of the web"),
    ):
        with pytest.raises(download_suites.InputError, match=words):
            download_suites.fetch(f"{endpoint}/passwd")
