"""Files that are whole or not there: two writers, dead writers, modes, long names, full disks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from abandoned import abandoned
from paths import ROOT
from safetensors import safe_open

from wan.checkpoints.saving import write_pickle, write_safetensors
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import (
    atomic_folder,
    atomic_path,
    content_hash,
    read_json,
    remove_all_abandoned,
    temporary_path,
    write_json,
    write_text,
)

STATE = {"a": torch.arange(40_000.0), "b": torch.ones(3, 2).T}


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first", "the one that ends last"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_dead_processes_left_is_removed_and_what_others_write_stays(tmp_path: Path) -> None:
    dead, dead_folder = abandoned(tmp_path / "a"), abandoned(tmp_path / "a")
    dead.write_text("half")
    (dead_folder / "inner").mkdir(parents=True)
    alive = temporary_path(tmp_path / "a")
    elsewhere = tmp_path / ".a.otherhost-1-0.part"
    other = abandoned(tmp_path / "ab")
    for path in (alive, elsewhere, other):
        path.write_text("not ours")
    write_text(tmp_path / "a", "whole")
    assert set(tmp_path.iterdir()) == {tmp_path / "a", alive, elsewhere, other}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_get_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "a.safetensors", STATE)
        write_pickle(tmp_path / "a.pt", STATE)
        write_json(tmp_path / "a.json", {})
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            torch.save({}, folder / "inner" / "a.pt")
            (folder / "inner" / "a.pt").chmod(0o600)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_folder_takes_the_place_of_an_old_one_or_leaves_it(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "third").write_text("")
        raise ZeroDivisionError
    assert [path.name for path in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a b'\n*[0]"])
def test_any_name_that_the_file_system_takes_can_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "content")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
import resource, signal, sys, torch
from pathlib import Path
from wan.checkpoints.saving import write_pickle, write_safetensors
from wan.utils.errors import InputError
from wan.utils.files import write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
folder, state = Path({str(tmp_path)!r}), {{"a": torch.zeros(40_000)}}
for write in (
    lambda: write_safetensors(folder / "a.safetensors", state),
    lambda: write_pickle(folder / "a.pt", state),
    lambda: write_json(folder / "a.json", ["x" * 9000]),
):
    try:
        write()
    except InputError as error:
        assert str(error).startswith("cannot write") and "\\n" not in str(error), error
    else:
        raise SystemExit("written")
print("done")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "done\n", done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_record_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "a.json", CheckpointError)
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_record_and_a_folder_in_its_place_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="cannot read"):
            read_json(path)
        with pytest.raises(InputError, match="cannot read"):
            content_hash(path)


def test_a_hash_tells_content_apart(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
    a, b, c = (content_hash(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 32


def test_many_writers_of_one_folder_take_turns(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            with atomic_folder(tmp_path / "model") as folder:
                (folder / "a").write_text(str(number))
                (folder / "b").write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert (tmp_path / "model" / "a").read_text() == (tmp_path / "model" / "b").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_pickle_is_the_same_whoever_writes_it(tmp_path: Path) -> None:
    for name in ("one.pt", "another.pt"):
        write_pickle(tmp_path / name, STATE)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


def test_safetensors_are_the_same_in_every_process(tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from wan.checkpoints.saving import write_safetensors
state = {name: torch.arange(3.0) + number for number, name in enumerate("bac")}
metadata = {"format": "pt", "zeta": '{"ü": [1, 2]}', "alpha": "x", "beta": 'quoted "y"\\n'}
write_safetensors(Path(sys.argv[1]), state, metadata)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number in range(3):
        command = [sys.executable, "-c", program, str(tmp_path / f"{number}.safetensors")]
        subprocess.run(command, check=True, env=environment)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata()["zeta"] == '{"ü": [1, 2]}'
        assert torch.equal(file.get_tensor("a"), torch.arange(3.0) + 1)


def test_a_folder_is_cleared_of_all_that_the_dead_left(tmp_path: Path) -> None:
    abandoned(tmp_path / "a").write_text("half")
    abandoned(tmp_path / "b").mkdir()
    alive = temporary_path(tmp_path / "c")
    alive.write_text("")
    remove_all_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [alive]


def test_a_pointer_in_the_place_of_a_record_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(InputError, match="is a Git-LFS pointer, which stands for the file: run `git lfs pull`"):
        read_json(tmp_path / "config.json")
