"""Fingerprints of weights: every value counts, and parts add up to the whole."""

import torch

from wan.checkpoints.loading import checksum, digest_of, fingerprint_of

MODULUS = 2**64


def test_sums_of_parts_make_the_sum_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, shape in (
        (torch.bfloat16, (7, 3)),
        (torch.float32, (5,)),
        (torch.float16, (11, 1, 5)),
        (torch.float64, (3, 2)),
    ):
        value = torch.randn(shape, generator=generator).to(dtype)
        row = value[0].numel() * value.element_size()
        for cut in range(shape[0] + 1):
            parts = checksum(value[:cut]), checksum(value[cut:], cut * row)
            assert sum(map(int, parts)) % MODULUS == int(checksum(value)) % MODULUS, (dtype, shape, cut)


def test_a_part_at_another_place_has_another_sum() -> None:
    value = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    assert len({int(checksum(value, first)) for first in (0, 4, 8, 24)}) == 4


def test_the_digest_is_of_names_types_shapes_and_sums() -> None:
    state = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    assert digest_of(state, [int(checksum(value)) for value in state.values()]) == fingerprint_of(state)
    assert fingerprint_of({"a": torch.ones(4), "b": torch.zeros(3)}) != fingerprint_of(state)
    assert fingerprint_of({}) == digest_of({}, [])
