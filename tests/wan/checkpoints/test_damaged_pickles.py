"""A bit that flipped in a `.pt` is found by the checksums inside, and what is no regular file is not waited for."""

import os
from pathlib import Path

import pytest
import torch

from pipelines.feasibility import StoredModel
from wan.checkpoints.loading import read_weights
from wan.checkpoints.saving import write_pickle
from wan.utils.errors import CheckpointError


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_flipped_bit_is_found(tmp_path: Path, place: float) -> None:
    path = tmp_path / "a.pt"
    write_pickle(path, {name: torch.randn(300, 40) for name in "abc"})
    read_weights(path)
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"damaged.*download it again"):
        read_weights(path)


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    for read in (StoredModel.at, read_weights):
        with pytest.raises(CheckpointError):
            read(tmp_path / "a.pt")
