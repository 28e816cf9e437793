"""docs/diffusers_walkthrough.py runs, and what it shows of wrong calls is one line each."""

import runpy

import pytest
import torch
from paths import ROOT


def test_the_walkthrough_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    found = runpy.run_path(str(ROOT / "docs" / "diffusers_walkthrough.py"))
    answers = found["answers"]
    assert len(answers) >= (32 if torch.accelerator.is_available() else 35)
    assert all(answer and "\n" not in answer for answer in answers.values())
    assert "is distilled" in answers["guidance of a distilled model"]
    assert "step 3 timestep" in capsys.readouterr().out
