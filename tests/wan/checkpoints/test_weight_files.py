"""Files that are no weights, or hold more than weights: each is called what it is, in one line, and nothing runs."""

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.checkpoints.loading import (
    as_state_dict,
    fingerprint_of,
    fingerprint_of_file,
    load_strict,
    read_folder,
    read_weights,
)
from wan.checkpoints.pickles import Opaque
from wan.checkpoints.saving import write_pickle, write_safetensors
from wan.checkpoints.tensors import own_storage, require_finite, require_floating, require_one_type_per_role
from wan.utils.errors import CheckpointError

WEIGHTS = ("a.safetensors", "a.pt", "a.pth")
ONE = {"a": torch.ones(2)}


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    message = str(error.value)
    assert message.isprintable() and str(path) in message
    return message


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git-LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (b'{"error": "Repository not found"}', "a JSON text"),
        (b"Invalid username or password.", "a text file"),
        (b"", "an empty file"),
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
        (b"\x1f\x8b\x08" + bytes(64), "a gzip archive"),
        (bytes(200), "damaged"),
    ],
)
def test_what_is_no_weight_file_is_called_what_it_is(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert words in message_of(path)


def test_a_file_under_the_other_format_s_name(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pt")
    assert "rename it to end in .safetensors" in message_of(tmp_path / "a.pt")
    torch.save(ONE, tmp_path / "b.pt")
    (tmp_path / "b.pt").rename(tmp_path / "b.safetensors")
    assert "rename it to end in .pt" in message_of(tmp_path / "b.safetensors")


@pytest.mark.parametrize("kept", [20, 60, -1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_file_that_was_cut(name: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(ONE, path) if path.suffix == ".safetensors" else torch.save(ONE, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged or incomplete" in message_of(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_data_beside_tensors_is_read_and_not_built(zipped: bool, tmp_path: Path) -> None:
    data = {
        "args": argparse.Namespace(rate=np.float64(0.1), folder=Path("/data"), when=datetime.date(2026, 1, 1)),
        "step": np.int64(7),
        "order": np.arange(3),
        "random": np.random.get_state(),
    }
    torch.save({"generator": ONE} | data, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "a.pt")
    assert torch.equal(read["generator"]["a"], ONE["a"])
    for name in ("args", "step", "order"):
        assert isinstance(read[name], Opaque) and not vars(read[name])
    assert type(read["args"]).__name__ == "argparse.Namespace"


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (exec, "exec"), (Path.touch, "getattr"), (open, "open")],
)
def test_code_in_a_pickle_does_not_run_and_is_named(function: Any, name: str, zipped: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    argument = f"touch {ran}" if function is os.system else f"__import__('pathlib').Path('{ran}').touch()"
    torch.save(
        {"generator": ONE, "x": Runs(function, argument)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    message = message_of(tmp_path / "a.pt")
    assert name in message and "could run code" in message and "weights_only" not in message
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({1: torch.ones(1)}, "the name 1 is of type int, not text: give"),
        ({("a", 1): torch.ones(1)}, "of type tuple, not text"),
        ({None: torch.ones(1)}, "of type NoneType, not text"),
        ({"model": {"a": torch.ones(1)}}, "'model' is a dict"),
        ({"a": [1.0]}, "'a' is a list"),
        ({"a": np.ones(2)}, "'a' is a numpy"),
    ],
)
def test_a_dictionary_of_other_things_is_refused_by_name(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=words):
        as_state_dict(read_weights(tmp_path / "a.pt"), "a.pt")


INDEX = "m.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[]", "a JSON list"),
        ("null", "a JSON NoneType"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": null}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "outside its folder"),
        ('{"weight_map": {"a": "three.safetensors"}}', "lacks the shard three.safetensors"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "'a' is given twice"),
        ('{"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}', "lacks c"),
        ('{"weight_map": {"a": "one.safetensors"}}', "against the index, b"),
        ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "one.safetensors holds"),
    ],
)
def test_a_damaged_index_of_shards(index: str, words: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=words) as error:
        read_weights(tmp_path / INDEX)
    assert str(error.value).isprintable()


def test_a_folder_with_two_sets_of_weights_is_refused(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "m.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    with pytest.raises(CheckpointError, match="holds both"):
        read_folder(tmp_path, ("m.safetensors", INDEX))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.ones(2).to(torch.complex64), "complex64"),
        (lambda: torch.ones(2).to(torch.int8), "int8"),
        (lambda: torch.ones(2).to(torch.uint16), "uint16"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(2) > 0, "bool"),
        (lambda: torch.ones(2).to_sparse(), "sparse_coo"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]), "a nested tensor, not a dense"),
    ],
)
def test_tensors_that_are_no_weights_are_refused_by_name_and_type(make: Callable[[], Tensor], words: str) -> None:
    value = make()
    for check in (require_floating, own_storage, require_one_type_per_role):
        with pytest.raises(CheckpointError, match=f"a.pt: x is .*{words}"):
            check({"ok": torch.ones(1), "x": value}, "a.pt")
    with pytest.raises(CheckpointError, match=words):
        load_strict(nn.Linear(2, 1, bias=False), {"weight": value}, "a.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused_and_large_sums_are_not(dtype: torch.dtype) -> None:
    large = torch.full((4096,), torch.finfo(dtype).max, dtype=dtype)
    require_finite({"large": large, "none": torch.zeros(0, dtype=dtype), "one": torch.ones((), dtype=dtype)}, "a.pt")
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = large.clone()
        spoilt[17] = value
        with pytest.raises(CheckpointError, match="x has 1 of 4096 values NaN or infinite"):
            require_finite({"large": large, "x": spoilt}, "a.pt")


def test_tensors_that_share_memory_get_memory_of_their_own(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {
        "a": base,
        "b": base,
        "c": base[2:6],
        "d": base[4:8],
        "e": torch.ones(1).expand(3, 2),
        "f": base.view(3, 4).T,
    }
    owned = own_storage(state, "a.pt")
    assert all(torch.equal(owned[name], state[name]) and owned[name].is_contiguous() for name in state)
    write_safetensors(tmp_path / "a.safetensors", owned)  # which refuses shared memory
    owned["a"].zero_()
    assert all(owned[name].any() for name in "bcdef")


def test_types_of_one_role_must_agree() -> None:
    def state(**others: torch.dtype) -> dict[str, Tensor]:
        names = [f"blocks.{b}.{part}" for b in range(3) for part in ("q.weight", "q.bias", "modulation")]
        names += ["head.head.weight", "head.head.bias", "head.modulation"]
        named = {name.replace("_", "."): dtype for name, dtype in others.items()}
        return {
            name: torch.ones(
                2, 2, dtype=next((dtype for end, dtype in named.items() if name.endswith(end)), torch.float32)
            )
            for name in names
        }

    require_one_type_per_role(state(), "a.pt")
    require_one_type_per_role(state(modulation=torch.bfloat16), "a.pt")
    # Matrices narrower than biases, as some converters leave them, everywhere.
    require_one_type_per_role(state(weight=torch.bfloat16), "a.pt")
    for odd in ("blocks.1.q.bias", "blocks.2.modulation", "head.modulation", "head.head.weight", "head.head.bias"):
        spoilt = state()
        spoilt[odd] = spoilt[odd].half()
        with pytest.raises(CheckpointError, match=rf"a.pt: .*{odd} is float16"):
            require_one_type_per_role(spoilt, "a.pt")


def test_files_get_the_umask_s_mode_and_a_pt_says_nothing_of_the_machine(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_pickle(tmp_path / "a.pt", {"generator": ONE})
        write_safetensors(tmp_path / "a.safetensors", ONE)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path
    assert os.uname().nodename.encode() not in (tmp_path / "a.pt").read_bytes()


def test_a_fingerprint_that_is_stored_keeps_its_value() -> None:
    weights = {"blocks.2": torch.arange(6.0), "blocks.10": torch.ones(2, 3)}
    turned = dict(reversed(weights.items()))
    assert fingerprint_of(weights) == "c078c2182beb9d79" and fingerprint_of(turned) == "7609d892f253a7f9"
    assert fingerprint_of_file(weights) == fingerprint_of_file(turned) == "7609d892f253a7f9"


def test_what_an_index_does_not_account_for_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"):
        save_file({name: torch.ones(2)}, tmp_path / name)
    index = {
        "metadata": {},
        "weight_map": {f"a-0000{n}-of-00002.safetensors": f"a-0000{n}-of-00002.safetensors" for n in (1, 2)},
    }
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    read_weights(tmp_path / "a.safetensors.index.json")
    assert not caplog.records
    save_file(ONE, tmp_path / "a-00003-of-00003.safetensors")
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index | {"weights_map": {}}))
    assert len(read_weights(tmp_path / "a.safetensors.index.json")) == 2
    first, second = (record.getMessage() for record in caplog.records)
    assert "unknown entries weights_map" in first and "a-00003-of-00003.safetensors" in second
