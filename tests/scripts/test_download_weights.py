"""Downloads from a hub on this machine: what is needed and no more, resumed where cut, and every failure in a line."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest
from paths import ROOT

download_weights = import_module("download_weights")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WAN = "Wan-AI/Wan2.1-T2V-1.3B"
CAUSAL_FORCING = "zhuhz22/Causal-Forcing"
Headers = dict[str, str]
TOKENIZER = "google/umt5-xxl/tokenizer.json"


class Hub(ThreadingHTTPServer):
    """A model hub with small files.

    Attributes:
        repositories: name of repository -> name of file -> content.
        fetched: (file, first byte) of every download.
        cuts: how many more downloads end half way.
        down: whether every request is answered with 503.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        wan_files = ("config.json", "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth")
        wan_files += ("Wan2.1_VAE.pth", TOKENIZER, "LICENSE.txt", "README.md", "assets/logo.png", "x/config.json")
        forcing_files = ("chunkwise/causal_forcing.pt", "framewise/causal_forcing.pt", "chunkwise/longvideo.pt")
        self.repositories = {
            WAN: {name: name.encode() * 100 for name in wan_files},
            CAUSAL_FORCING: {name: name.encode() * 100_000 for name in forcing_files},
        }
        self.fetched: list[tuple[str, int]] = []
        self.cuts = 0
        self.down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        for repository, files in self.server.repositories.items():
            if self.server.down:
                return self.send(503)
            if path.startswith(f"/api/models/{repository}/tree/"):
                return self.send_json([self.entry(name, data) for name, data in files.items()])
            if path in (f"/api/models/{repository}", f"/api/models/{repository}/revision/main"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                return self.send_json({"id": repository, "sha": COMMIT, "siblings": siblings, "private": False})
            name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
            if name in files:
                return self.send_file(name, files[name])
        return self.send(404, {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def send_json(self, page: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(page).encode())

    def send_file(self, name: str, data: bytes) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.server.fetched.append((name, first))
        self.send(206 if first else 200, headers, data[first:], is_file=True)

    def send(self, status: int, headers: Headers | None = None, body: bytes = b"", is_file: bool = False) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            cut = is_file and self.server.cuts > 0
            self.server.cuts -= cut
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def download(monkeypatch: pytest.MonkeyPatch, folder: Path, endpoint: str, *what: str) -> int:
    arguments = ["download_weights.py", "--folder", str(folder), "--endpoint", endpoint, "--what", *what]
    monkeypatch.setattr(sys, "argv", arguments)
    return download_weights.main()


def files_below(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[0] != ".cache"}


def test_the_files_that_are_needed_arrive_whole_and_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(monkeypatch, tmp_path, hub.url, "wan", "causal-forcing") == 0
    wan, checkpoints = tmp_path / "wan_models" / "Wan2.1-T2V-1.3B", tmp_path / "checkpoints"
    assert files_below(wan) == set(hub.repositories[WAN]) - {"README.md", "assets/logo.png", "x/config.json"}
    assert files_below(checkpoints) == {"chunkwise/causal_forcing.pt", "framewise/causal_forcing.pt"}
    for folder, repository in ((wan, WAN), (checkpoints, CAUSAL_FORCING)):
        for name in files_below(folder):
            assert (folder / name).read_bytes() == hub.repositories[repository][name]
    output = capsys.readouterr().out
    assert f"{WAN} is in {wan}\n" in output and f"{CAUSAL_FORCING} is in {checkpoints}\n" in output
    hub.fetched.clear()
    assert download(monkeypatch, tmp_path, hub.url, "wan", "causal-forcing") == 0
    assert not hub.fetched


def test_a_dropped_connection_is_taken_up_where_it_broke(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub
) -> None:
    name = "chunkwise/causal_forcing.pt"
    data = os.urandom(24_000_000)  # the client writes, and so goes on at, multiples of 10 MiB
    hub.repositories[CAUSAL_FORCING] = {name: data}
    hub.cuts = 1
    assert download(monkeypatch, tmp_path, hub.url, "causal-forcing") == 0
    assert (tmp_path / "checkpoints" / name).read_bytes() == data
    assert hub.fetched == [(name, 0), (name, 10 * 2**20)]


def test_a_second_run_fetches_what_is_not_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub) -> None:
    assert download(monkeypatch, tmp_path, hub.url, "causal-forcing") == 0
    hub.fetched.clear()
    chunkwise, framewise = (
        tmp_path / "checkpoints" / f"{kind}wise" / "causal_forcing.pt" for kind in ("chunk", "frame")
    )
    chunkwise.unlink()
    framewise.write_bytes(framewise.read_bytes()[:1000])
    os.utime(framewise, (2e9, 2e9))  # the client trusts a file for a second after it fetched it
    assert download(monkeypatch, tmp_path, hub.url, "causal-forcing") == 0
    assert sorted(hub.fetched) == [("chunkwise/causal_forcing.pt", 0), ("framewise/causal_forcing.pt", 0)]
    assert framewise.read_bytes() == hub.repositories[CAUSAL_FORCING]["framewise/causal_forcing.pt"]


def test_a_full_disk_is_seen_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = sum(len(data) for name, data in hub.repositories[WAN].items() if name.count("/") != 1)
    needed -= len(hub.repositories[WAN]["README.md"])
    usage = download_weights.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download_weights.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    assert download(monkeypatch, tmp_path, hub.url, "wan") == 2
    assert "free some space" in capsys.readouterr().err and not hub.fetched
    monkeypatch.setattr(download_weights.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert download(monkeypatch, tmp_path, hub.url, "wan") == 0
    monkeypatch.setattr(download_weights.shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert download(monkeypatch, tmp_path, hub.url, "wan") == 0, "what is there needs no space"


def test_what_cannot_be_fetched_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(endpoint: str, what: str) -> str:
        assert download(monkeypatch, tmp_path, endpoint, what) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "the hub has no Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in error(hub.url, "wan-diffusers")
    for endpoint in ("http://127.0.0.1:9", "localhost", "http://no-such-host.invalid", "http://["):
        assert "cannot fetch" in error(endpoint, "wan"), endpoint
    hub.repositories[CAUSAL_FORCING] = {"README.md": b"moved"}
    assert "look there" in error(hub.url, "causal-forcing")
    (tmp_path / "wan_models").write_text("a file where the folder should go")
    assert "cannot fetch" in error(hub.url, "wan")
    assert download(monkeypatch, tmp_path, hub.url) == 2


def test_a_hub_that_fails_half_way_is_not_a_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    genuine = download_weights.needed_files

    def needed_files(*arguments: object) -> dict[str, int]:
        files = genuine(*arguments)
        hub.down = True
        return files

    monkeypatch.setattr(download_weights, "needed_files", needed_files)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("so that the folder is not empty")
    assert download(monkeypatch, tmp_path, hub.url, "causal-forcing") == 2
    assert "whole files are kept" in capsys.readouterr().err


def test_the_endpoint_may_come_from_the_environment(tmp_path: Path, hub: Hub) -> None:
    command = [sys.executable, "scripts/download_weights.py", "--what", "wan", "--folder", str(tmp_path)]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{WAN} is in " in result.stdout and "HTTP Request" not in result.stdout + result.stderr
    assert (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B" / TOKENIZER).is_file()
