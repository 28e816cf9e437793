"""Captions of scenes from a small closed vocabulary, with or without the answers of the memory probe."""

import re
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from arl2.toyworld.world.long_scenes import NUM_SIDES, LongScenes
from arl2.toyworld.world.scenes import COLOURS, KINDS, SHAPES, WALLS, SceneBatch, Scenes, draw_integer

INFORMATIVE_FRACTION = 0.5

Option = TypeVar("Option")

_NOUNS = (("shape", "shapes"), ("object", "objects"))
_VERBS = (("slides", "slide"), ("moves", "move"), ("glides", "glide"), ("rolls", "roll"), ("goes", "go"))
# {who}, {verb} and {wall} are filled in; of {a|b} one object takes the first, two take the second.
_WALL_TEMPLATES = (
    "{who} {verb} behind {wall} and {comes|come} out again",
    "{who} {verb} behind {wall} and {comes|come} out on the other side",
    "{who} {verb} behind {wall} and {appears|appear} again",
    "{who} {is|are} hidden behind {wall} and {comes|come} out again",
)
_TEMPLATES = {
    "occlusion": _WALL_TEMPLATES,
    "binding": _WALL_TEMPLATES,
    "bounce": (
        "{who} {bounces|bounce} off the sides",
        "{who} {verb} from side to side",
        "{who} {verb} around and {bounces|bounce} off the sides",
    ),
    "leave": (
        "{who} {leaves|leave} the frame and {returns|return}",
        "{who} {verb} out of the frame and {comes|come} back",
    ),
}
# Of the words above alone, since the text encoder knows no others.
_LONG_TEMPLATES = (
    "{who} {comes|come} out from behind the wall and {goes|go} back",
    "{who} {verb} out from behind the wall and back again",
    "{who} {is|are} hidden behind the wall and {comes|come} out again and again",
)
_ARTICLES = ("a", "an", "the", "two")
_PLACES = "above and below"


def _words() -> set[str]:
    templates = " ".join(template for kind in _TEMPLATES.values() for template in kind)
    words = set(re.findall(r"\w+", templates)) - {"who", "verb"}
    return words.union(*_NOUNS, *_VERBS, _ARTICLES, _PLACES.split(), COLOURS, SHAPES, WALLS)


VOCABULARY = tuple(sorted(_words()))
"""All words of captions; there is no punctuation."""
ANSWERS = frozenset(COLOURS) | frozenset(SHAPES)


def names_answer(caption: str) -> bool:
    """Returns whether a caption names a colour or shape, which captions of the memory probe must not do."""
    return not ANSWERS.isdisjoint(caption.lower().split())


def caption_scenes(scenes: Scenes, informative: bool | Tensor | None = None) -> list[str]:
    """Make captions of scenes, each a function of the scene's seed and of `informative`.

    Args:
        scenes: a batch of B scenes.
        informative: whether to name colours and shapes, one for all or [B], bool; None names them for half of the
            scenes, by seed. An informative caption of two objects also says which is above.
    """
    seeds = scenes.seed
    informative = _informative(scenes, informative)
    choices = {name: draw_integer(seeds, f"caption {name}", 2**20).tolist() for name in ("who", "verb", "wall", "text")}
    objects = zip(scenes.colour.tolist(), scenes.shape.tolist(), scenes.exists.sum(1).tolist(), strict=True)
    captions = []
    for row, ((colours, shapes, number), kind, wall, named) in enumerate(
        zip(objects, scenes.kind.tolist(), scenes.wall.tolist(), informative.tolist(), strict=True)
    ):
        choice = {name: values[row] for name, values in choices.items()}
        who = _name(colours[:number], shapes[:number]) if named else _pick(_NOUNS, choice["who"])[number - 1]
        if not named:
            who = f"{'two' if number == 2 else _article(who)} {who}"
        template = _agree(_pick(_TEMPLATES[KINDS[kind]], choice["text"]), number)
        the_wall = _pick(("the wall", f"the {tuple(WALLS)[wall]} wall"), choice["wall"])
        captions.append(template.format(who=who, verb=_pick(_VERBS, choice["verb"])[number - 1], wall=the_wall))
    return captions


def caption_long_scenes(scenes: LongScenes, informative: bool | Tensor | None = None) -> list[str]:
    """Make captions of scenes of the long world in the same vocabulary.

    Args:
        scenes: a batch of B scenes.
        informative: see `caption_scenes`. An informative caption names the objects of the upper half from left to
            right, then those of the lower one; others say at most whether there are one, two or more.
    """
    choices = {name: draw_integer(scenes.seed, f"caption {name}", 2**20).tolist() for name in ("who", "verb", "text")}
    exists, colours, shapes = (values.tolist() for values in (scenes.exists, scenes.colour, scenes.shape))
    captions = []
    for row, named in enumerate(_informative(scenes, informative).tolist()):
        choice = {name: values[row] for name, values in choices.items()}
        number = min(sum(exists[row]), 2)
        if named:
            who = _name_by_half(exists[row], colours[row], shapes[row])
        else:
            who = _pick(_NOUNS, choice["who"])[number - 1]
            who = f"{_article(who)} {who}" if number == 1 else f"two {who}" if sum(exists[row]) == 2 else who
        template = _agree(_pick(_LONG_TEMPLATES, choice["text"]), number)
        captions.append(template.format(who=who, verb=_pick(_VERBS, choice["verb"])[number - 1]))
    return captions


def _informative(scenes: SceneBatch, informative: bool | Tensor | None) -> Tensor:
    """Whether each caption names colours and shapes, [B], bool."""
    if informative is None:
        return draw_informative(scenes.seed, INFORMATIVE_FRACTION)
    if isinstance(informative, bool):
        return torch.full_like(scenes.seed, informative, dtype=torch.bool)
    return informative


def draw_informative(seeds: Tensor, fraction: float) -> Tensor:
    """Draw whether the caption of each seed names colours and shapes, [B], bool: a fraction does, in thousandths."""
    return draw_integer(seeds, "informative", 1000) < 1000 * fraction


def _name_by_half(exists: Sequence[bool], colours: Sequence[int], shapes: Sequence[int]) -> str:
    """Names of the objects of a scene of the long world; halves are named where both have some."""
    halves = []
    for first, place in ((0, "above"), (NUM_SIDES, "below")):
        slots = [slot for slot in range(first, first + NUM_SIDES) if exists[slot]]
        if slots:
            halves.append((" and ".join(_name([colours[slot]], [shapes[slot]]) for slot in slots), place))
    return halves[0][0] if len(halves) == 1 else " and ".join(f"{names} {place}" for names, place in halves)


def _pick(options: Sequence[Option], choice: int) -> Option:
    return options[choice % len(options)]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _name(colours: Sequence[int], shapes: Sequence[int]) -> str:
    names = [f"{tuple(COLOURS)[colour]} {SHAPES[shape]}" for colour, shape in zip(colours, shapes, strict=True)]
    names = [f"{_article(name)} {name}" for name in names]
    return names[0] if len(names) == 1 else f"{names[0]} above and {names[1]} below"


def _agree(template: str, number: int) -> str:
    """Select the singular or plural forms of a template."""
    return re.sub(r"{(\w+)\|(\w+)}", lambda forms: forms[number], template)
