"""Initial values of new parameters: what a layer built whole would have, without its large parameters."""

import pytest
import torch
from tiny_models import TINY

from arl2 import initial_values as module
from arl2.initial_values import DrawsOfOneSeed, initial_values
from arl2.model import HybridWanModel

EVERYTHING = {"hybrid_layers": [0], "lora_rank": 3, "lora_alpha": 6.0, "ffn_lora": "all"}
LAYERS = 5


def new_layer() -> HybridWanModel:
    return HybridWanModel(**(TINY | {"num_layers": 1}), **EVERYTHING)


@pytest.mark.parametrize("chunk", [1 << 18, 7])
def test_values_equal_those_of_a_layer_built_whole(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    with torch.device("meta"):
        new = new_layer().hybrid_parameter_names()
    monkeypatch.setattr(module, "_CHUNK", chunk)
    names = [name.replace("blocks.0.", f"blocks.{layer}.") for layer in (4, 1, 2) for name in new]
    values = initial_values(new_layer, names, LAYERS, seed=3)
    assert values.keys() == set(names)
    for layer in (4, 1, 2):
        torch.manual_seed(3 * LAYERS + layer)
        whole = new_layer().state_dict()
        for name in new:
            assert torch.equal(values[name.replace("blocks.0.", f"blocks.{layer}.")], whole[name]), name


def test_large_parameters_take_no_memory_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    with DrawsOfOneSeed(0, largest=64):
        layer = torch.nn.Linear(9, 11)
    assert layer.weight.is_meta and not layer.bias.is_meta
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(0)
    assert torch.equal(torch.nn.Linear(9, 11).bias, layer.bias)
