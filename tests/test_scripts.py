"""Scripts that move weights: converting between formats, drawing random models, and downloading from a (fake) hub."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from models import HYBRID, tiny_model

from arl2.checkpoint import save_generator
from arl2.model import HybridWanModel
from pipelines.text_to_video import CausalVideoPipeline
from wan.formats import read_transformer

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
convert_checkpoint = import_module("convert_checkpoint")
download_weights = import_module("download_weights")
make_random_model = import_module("make_random_model")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def call(monkeypatch: pytest.MonkeyPatch, script: object, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    return script.main()


def test_a_checkpoint_goes_round_the_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model(HYBRID, torch.float32)
    model.save_pretrained(tmp_path / "a")
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / "b.pt") == 0
    flags = ("--config", tmp_path / "a", "--lora_alpha", HYBRID.lora_alpha)
    assert call(monkeypatch, convert_checkpoint, tmp_path / "b.pt", tmp_path / "c.safetensors", *flags) == 0
    assert call(monkeypatch, convert_checkpoint, tmp_path / "c.safetensors", tmp_path / "d", *flags) == 0
    names = torch.load(tmp_path / "b.pt", weights_only=True)["generator"]
    assert "model.blocks.0.self_attn.lora_q_A" in names and "model.blocks.0.ffn.0.linear.weight" in names
    again = HybridWanModel.from_pretrained(tmp_path / "d")
    assert again.hybrid == model.hybrid
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / "e.pt", "--merge_ffn_lora") == 0
    merged = read_transformer(tmp_path / "e.pt").state
    assert "blocks.0.ffn.0.weight" in merged and not any("ffn.0.lora" in name for name in merged)


def test_conversions_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_generator(tiny_model(dtype=torch.float32), tmp_path / "a.pt")
    for arguments, message in (
        ((tmp_path / "a.pt", tmp_path / "b.pt"), "--config or --size"),
        ((tmp_path / "a.pt", tmp_path / "a.pt"), "exists"),
        ((tmp_path / "none.pt", tmp_path / "b.pt"), "no checkpoint"),
        ((tmp_path / "a.pt", tmp_path / "b.pt", "--size", "1.3B"), "does not fit"),
    ):
        assert call(monkeypatch, convert_checkpoint, *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b.pt").exists()


def test_random_models_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ("--size", "toy", "--folder", tmp_path / "m", "--layout", "diffusers", "--device", "cpu")
    assert call(monkeypatch, make_random_model, *flags, "--hybrid_layers", 1, 2) == 0
    assert CausalVideoPipeline.from_pretrained(tmp_path / "m").transformer.hybrid.layers == (1, 2)
    assert call(monkeypatch, make_random_model, "--size", "toy", "--folder", tmp_path / "n") == 2


class FakeHub(BaseHTTPRequestHandler):
    """The parts of a model hub that a download needs, for one repository of small files."""

    repository = download_weights.SOURCES["causal-forcing"].repository
    files = {"chunkwise/causal_forcing.pt": b"weights " * 50, "README.md": b"not needed", "LICENSE": b"free"}  # noqa: RUF012
    fetched: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        if path.startswith(f"/api/models/{self.repository}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send(json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
            return
        if path.startswith(f"/api/models/{self.repository}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            page = {"id": self.repository, "sha": COMMIT, "siblings": siblings, "private": False}
            self._send(json.dumps(page).encode(), {"Content-Type": "application/json"}, body)
            return
        name = path.removeprefix(f"/{self.repository}/resolve/{COMMIT}/")
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = self.files[name]
        if body:
            self.fetched.append(name)
        self._send(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    FakeHub.fetched.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_downloads_fetch_what_is_needed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: str) -> None:
    flags = ("--what", "causal-forcing", "--folder", tmp_path, "--endpoint", hub)
    assert call(monkeypatch, download_weights, *flags) == 0
    target = tmp_path / "checkpoints" / "chunkwise" / "causal_forcing.pt"
    assert target.read_bytes() == FakeHub.files["chunkwise/causal_forcing.pt"]
    assert sorted(FakeHub.fetched) == ["LICENSE", "chunkwise/causal_forcing.pt"]
    assert not (tmp_path / "checkpoints" / "README.md").exists()
    assert call(monkeypatch, download_weights, *flags) == 0
    assert len(FakeHub.fetched) == 2


def test_downloads_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--folder", tmp_path, "--endpoint")
    assert call(monkeypatch, download_weights, "--what", "wan", *flags, hub) == 2
    assert "the hub has no Wan-AI" in capsys.readouterr().err
    assert call(monkeypatch, download_weights, "--what", "causal-forcing", *flags, "http://127.0.0.1:9") == 2
    assert "cannot fetch" in capsys.readouterr().err
    usage = download_weights.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(download_weights.shutil, "disk_usage", lambda path: usage)
    assert call(monkeypatch, download_weights, "--what", "causal-forcing", *flags, hub) == 2
    assert "free some space" in capsys.readouterr().err
