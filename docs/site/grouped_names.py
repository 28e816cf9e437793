"""Griffe extension: a docstring's line "a, b: text" documents a and b."""

import re
from typing import Any

from griffe import Extension, Object

GROUPED = re.compile(r"^(\s+)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$")


class GroupedNames(Extension):
    """Splits grouped names before docstrings are parsed."""

    def on_object(self, *, obj: Object, **others: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)


def split_names(text: str) -> str:
    """The docstring with a line of its own for every name; lines that continue an entry follow the last one."""
    lines: list[str] = []
    pending: tuple[list[str], list[str], str] | None = None  # names, lines of the text, indent

    def flush() -> None:
        nonlocal pending
        if pending is not None:
            names, body, indent = pending
            for name in names:
                lines.extend([f"{indent}{name}: {body[0]}", *body[1:]])
            pending = None

    for line in text.splitlines():
        grouped = GROUPED.match(line)
        deeper = pending is not None and len(line) - len(line.lstrip()) > len(pending[2]) and line.strip()
        if deeper and pending is not None:
            pending[1].append(line)
            continue
        flush()
        if grouped is None:
            lines.append(line)
        else:
            pending = grouped[2].split(", "), [grouped[3]], grouped[1]
    flush()
    return "\n".join(lines)
