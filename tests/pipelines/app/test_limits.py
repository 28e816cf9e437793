"""What a page sends is checked as a whole before anything is computed."""

from typing import Any

import pytest

from pipelines.app.limits import Limits, Request, read_request
from wan.utils.errors import InputError

LIMITS = Limits(prompt_characters=20, pixels=64 * 96, blocks=7, lanes=2)
KNOWN = ("full memory", "window", "hybrid")
FORM: dict[str, Any] = {
    "prompt": " a red ring ",
    "models": ["hybrid", "window"],
    "seed": 1,
    "steps": 0,
    "height": 64,
    "width": 96,
    "blocks": 0,
    "image": None,
    "video": None,
    "on_switch": "keep",
}


def test_a_request_is_read() -> None:
    assert read_request(FORM, LIMITS, KNOWN) == Request("a red ring", ("window", "hybrid"), 1, 64, 96)
    changed = read_request(FORM | {"steps": 2, "blocks": 7}, LIMITS, KNOWN)
    assert (changed.steps, changed.blocks) == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "x" * 21}, "21 characters"),
        ({"prompt": None}, "NoneType"),
        ({"prompt": 5}, "int"),
        ({"models": []}, "no model"),
        ({"models": ["other"]}, "unknown"),
        ({"models": list(KNOWN)}, "at most 2"),
        ({"models": "hybrid"}, "list"),
        ({"models": [["hybrid"]]}, "unknown"),
        ({"models": None}, "NoneType"),
        ({"seed": 2**64}, "seed"),
        ({"seed": None}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"steps": 51}, "steps"),
        ({"steps": True}, "steps"),
        ({"blocks": 8}, "blocks"),
        ({"blocks": float("nan")}, "blocks"),
        ({"height": 65}, "at most 6144"),
        ({"height": 10**9}, "height"),
        ({"width": 8}, "at least 16"),
        ({"image": "/nowhere/picture.png"}, "picture.png"),
        ({"image": __file__}, "test_limits.py"),
        ({"image": 5}, "int"),
        ({"video": "/nowhere/video.mp4"}, "video.mp4"),
        ({"video": __file__}, "test_limits.py"),
        ({"video": 5}, "int"),
        ({"on_switch": "forget"}, "on_switch"),
        ({"on_switch": None}, "on_switch"),
        ({"width": -96, "height": -64}, "height|width"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_request(FORM | change, LIMITS, KNOWN)


@pytest.mark.parametrize("name", FORM)
def test_missing_values_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"no {name}"):
        read_request({key: value for key, value in FORM.items() if key != name}, LIMITS, KNOWN)


def test_limits_have_ranges() -> None:
    with pytest.raises(InputError, match="running"):
        Limits(running=0)
