"""Published models: every layout of this architecture loads by itself, and every other is refused with the reason."""

from pathlib import Path

import pytest
import torch
from published import LAYOUTS, REFUSED, Layout, pickled, stored, wrapped
from tiny_models import TINY, tiny_model

from arl2.checkpoint import build_hybrid, read_generator
from arl2.model import HybridSettings
from wan.checkpoints.formats import read_transformer
from wan.checkpoints.loading import StateDict
from wan.utils.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def state() -> StateDict:
    return {name: value.detach().clone() for name, value in tiny_model(dtype=torch.float32).state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_published_layout_loads_by_itself(layout: Layout, state: StateDict, tmp_path: Path) -> None:
    weights = read_generator(tmp_path / "no model folder is read", layout.write(state, tmp_path))
    assert weights.causal is layout.causal
    model, report = build_hybrid(weights, dict(TINY), HybridSettings(), dtype=None, device=CPU)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys() and not report.untrained
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_something_else_is_refused_with_the_reason(name: str, state: StateDict, tmp_path: Path) -> None:
    write, words = REFUSED[name]
    path = write(state, tmp_path)
    with pytest.raises(CheckpointError, match=words) as error:
        read_transformer(path)
    assert str(error.value).isprintable() and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_floating_type_load(dtype: torch.dtype, state: StateDict, tmp_path: Path) -> None:
    narrow = {name: value.to(dtype) for name, value in state.items()}
    for file in (
        pickled({"generator_ema": wrapped(narrow)}, tmp_path / "a.pt"),
        stored(narrow, tmp_path / "b.safetensors"),
    ):
        model, _ = build_hybrid(read_transformer(file), dict(TINY), HybridSettings(), dtype=torch.float32, device=CPU)
        for name, value in model.state_dict().items():
            assert torch.equal(value, narrow[name].float())


def test_the_average_is_taken_on_request_or_where_it_is_alone(state: StateDict, tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in state.items()}
    both = pickled({"generator": wrapped(state), "generator_ema": wrapped(average)}, tmp_path / "both.pt")
    alone = pickled({"generator_ema": wrapped(average)}, tmp_path / "alone.pt")
    first = pickled({"generator": wrapped(state)}, tmp_path / "first.pt")
    name = "head.head.weight"
    for file, use_ema, expected in ((both, False, state), (both, True, average), (alone, False, average)):
        assert torch.equal(read_transformer(file, use_ema).state[name], expected[name])
    assert torch.equal(read_transformer(alone, use_ema=True).state[name], average[name])
    with pytest.raises(CheckpointError, match="has 'generator' but no 'generator_ema': drop use_ema"):
        read_transformer(first, use_ema=True)


def test_names_that_collide_without_their_wrappers_are_refused(state: StateDict, tmp_path: Path) -> None:
    twice = wrapped(state) | wrapped({"head.head.bias": state["head.head.bias"]}, "module.model.{}")
    with pytest.raises(CheckpointError, match="several entries have one name"):
        read_transformer(pickled(twice, tmp_path / "a.pt"))
