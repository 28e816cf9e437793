"""Every golden case of the reference, through the code that scripts/verify.py runs."""

from pathlib import Path

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file

from arl2.evaluation.golden.run import verify_file, verify_folder
from arl2.evaluation.golden.vectors import Precision
from wan.utils.errors import InputError

CPU = Precision(torch.device("cpu"))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_float32_on_the_cpu(path: Path) -> None:
    for result in verify_file(path, CPU):
        assert result.passed, (result.case, result.failure, result.worst, result.used)
        assert result.compared > 0


@pytest.mark.parametrize("name", ["G1_causal_dit_kv", "G5_hybrid_model"])
def test_float64_is_closer_to_the_reference_than_its_own_rounding(name: str) -> None:
    precision = Precision(torch.device("cpu"), torch.float64)
    assert all(result.used < 0.1 for result in verify_file(GOLDEN / f"{name}.json", precision))


def test_a_wrong_output_fails(tmp_path: Path) -> None:
    for ending in ("json", "safetensors"):
        (tmp_path / f"G7_scheduler.{ending}").write_bytes((GOLDEN / f"G7_scheduler.{ending}").read_bytes())
    tensors = load_file(tmp_path / "G7_scheduler.safetensors")
    tensors["shift5.out.sigmas"][3] += 1e-5
    save_file(tensors, tmp_path / "G7_scheduler.safetensors")
    verdicts = {result.case: result.passed for result in verify_folder(tmp_path, CPU)}
    assert verdicts == {"shift1": True, "shift5": False, "shift8": True}


def test_an_output_that_nobody_computes_fails(tmp_path: Path) -> None:
    for ending in ("json", "safetensors"):
        (tmp_path / f"G7_scheduler.{ending}").write_bytes((GOLDEN / f"G7_scheduler.{ending}").read_bytes())
    tensors = load_file(tmp_path / "G7_scheduler.safetensors")
    save_file(tensors | {"shift5.out.unheard_of": torch.zeros(1)}, tmp_path / "G7_scheduler.safetensors")
    failures = [result.failure for result in verify_folder(tmp_path, CPU) if not result.passed]
    assert failures == ["never computed: shift5.out.unheard_of"]


def test_folders_without_golden_files_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no golden file"):
        list(verify_folder(tmp_path, CPU))
    (tmp_path / "a.json").write_text('{"kind": "something else"}')
    with pytest.raises(InputError, match="kind"):
        list(verify_folder(tmp_path, CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_float32_on_the_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    for result in verify_file(path, Precision(torch.device("cuda"))):
        assert result.passed, (result.case, result.failure, result.worst, result.used)
