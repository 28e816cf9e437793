"""MkDocs hook: the pages of commands and settings, generated from the entry points and the typed configs."""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

CONFIGS = {
    "Generation": (
        "pipelines.config",
        "InferenceConfig",
        "`inference.py`, `scripts/generate_latents.py`, `scripts/app.py` and others",
    ),
    "Stage 1": ("pipelines.training.config", "Stage1Config", "`train_stage1.py`"),
    "Stage 2": ("pipelines.training.config", "Stage2Config", "`train_stage2.py`"),
    "Layer gates": ("pipelines.training.config", "GatesConfig", "`scripts/select_layers.py --method gates`"),
    "Benchmark": ("pipelines.benchmark.cases", "BenchmarkConfig", "`scripts/benchmark.py`"),
}
"""Title of a section to module and class of its settings, and to what reads them."""
SEE = re.compile(r"see `([\w.]+)`")
ATTRIBUTES = re.compile(r"^Attributes.*:$")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, content in (("commands", commands_page()), ("settings", settings_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def commands_page() -> str:
    """Every entry point with its `--help`."""
    from pipelines.console.commands import COMMANDS

    command = [sys.executable, __file__, *sorted(command.script for command in COMMANDS.values())]
    helps = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    parts = ["# Commands", "Every entry point with its `--help`. Run them from the repository's root.", ""]
    for name, text in helps.items():
        parts += [f"## {name}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(parts)


def print_helps(scripts: list[str]) -> None:
    """Print the `--help` of scripts, by name, as JSON."""
    helps = {}
    for script in scripts:
        sys.argv = [script, "--help"]
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            runpy.run_path(script, run_name="__main__")
        helps[script] = text.getvalue()
    json.dump(helps, sys.stdout)


def settings_page() -> str:
    """Every setting of every config: type and range, default, meaning."""
    parts = [
        "# Settings",
        "Settings of the YAML files in `configs/`. Each can also be given on the command line as `key=value`, nested "
        "ones as `outer.inner=value`. Unknown names, wrong types and values out of range are errors before anything "
        "is loaded.",
    ]
    for title, (module, name, used_by) in CONFIGS.items():
        kind = getattr(importlib.import_module(module), name)
        parts += [
            "",
            f"## {title}",
            "",
            f"Read by {used_by}.",
            "",
            "| setting | takes | default | meaning |",
            "|---|---|---|---|",
        ]
        parts += ["| " + " | ".join(cells) + " |" for cells in setting_rows(kind, "")]
    return "\n".join(parts) + "\n"


def setting_rows(kind: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows of the table of a config, those of nested settings included."""
    from wan.utils.ranges import declarations, declared, wanted

    meanings = meanings_of(kind)
    for field in dataclasses.fields(kind):
        if field.name not in declarations(kind):
            continue
        hint = declarations(kind)[field.name]
        inner = declared(hint).kind
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            yield from setting_rows(inner, f"{prefix}{field.name}.")
            continue
        yield f"`{prefix}{field.name}`", cell(wanted(hint)), default_of(field), cell(meanings.get(field.name, ""))


def default_of(field: "dataclasses.Field[Any]") -> str:
    """The default of a setting, as YAML writes it."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "must be given"
    return f"`{json.dumps(value if isinstance(value, int | float | str | list | None) else str(value))}`"


def meanings_of(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of its fields."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            meanings |= attributes_of(base)
    return meanings


def attributes_of(kind: type) -> dict[str, str]:
    """The section "Attributes" of a class; a text "see `module.Class`" is replaced by what that class says."""
    lines = (kind.__doc__ or "").splitlines()
    start = next((n for n, line in enumerate(lines) if ATTRIBUTES.match(line.strip())), len(lines))
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in lines[start + 1 :]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= 4:
            break
        named = re.match(r" {8}([\w, ]+): (.+)", line)
        if named and indent == 8:
            names = [name.strip() for name in named[1].split(",")]
            texts |= dict.fromkeys(names, named[2])
        elif line.strip() and names:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return {name: followed(name, text) for name, text in texts.items()}


def followed(name: str, text: str) -> str:
    """The text of an attribute, or of the one that it refers to."""
    see = SEE.match(text)
    if see is None or "." not in see[1]:
        return text
    module, _, leaf = see[1].rpartition(".")
    try:
        target = getattr(importlib.import_module(module), leaf)
    except (ImportError, AttributeError):
        return text
    return meanings_of(target).get(name, text) if isinstance(target, type) else text


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|").strip()


if __name__ == "__main__":
    print_helps(sys.argv[1:])
