"""Command lines: the same flags with the same meaning everywhere, their types, ranges and defaults from declarations.

Flags are written with underscores; dashes are understood too, and so are former names. Abbreviations are refused. Of a
flag or setting that is given twice the last counts, and the log says so. Entry points that read a config take its
settings as `key=value` as well; a flag and a setting that contradict one another are an error.
"""

import argparse
import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from enum import Enum
from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pipelines.console.commands import PROGRAM, in_words_of_console, running
from pipelines.console.shipped import find_shipped
from pipelines.dtypes import DTYPES
from pipelines.yaml_files import resolve
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, Choices, IsPath, Seed, declaration, declarations, declared, shown, typed, wanted

log = logging.getLogger(__name__)

_SETTING = re.compile(r"[A-Za-z_][\w.]*=")
_UNSET: Any = object()
_GROUPS = {
    "input": ("--config", "settings", "--data_path", "--prompt", "--image", "--i2v", "--video", "--strength"),
    "model": (
        *("--checkpoint_path", "--model_folder", "--use_ema", "--lora", "--hybrid_layers", "--lora_rank"),
        *("--lora_alpha", "--ffn_lora_all_layers", "--size"),
    ),
    "results": (
        *("--output_folder", "--output_file", "--metrics_folder", "--json", "--yaml", "--pictures"),
        *("--again", "--prune"),
    ),
    "device": ("--device", "--dtype"),
}
_GROUP_OF = {flag: title for title, flags in _GROUPS.items() for flag in flags}
"""Where the help lists flags that several programs have."""
_is_asked_for_parser: ContextVar[bool] = ContextVar("is_asked_for_parser", default=False)
SceneSeed = Annotated[int, Bounds(0, 2**40)]
"""What scenes of the toy world are drawn from: scene n of a set has the seed's successor n."""


class _ParserFound(BaseException):
    """Carries the parser of an entry point out of it."""

    def __init__(self, parser: "Parser") -> None:
        super().__init__()
        self.parser = parser


def parser_of(main: Callable[[], int]) -> "Parser":
    """The parser of an entry point, which parses its command line before it does anything else.

    Raises:
        ValueError: it parses none.
    """
    token = _is_asked_for_parser.set(True)
    try:
        unwrap(main)()
    except _ParserFound as found:
        return found.parser
    finally:
        _is_asked_for_parser.reset(token)
    raise ValueError(f"{main} parses no command line")


class _Store(argparse.Action):
    """Stores a value."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        _store(namespace, self, values)


class _StoreConstant(argparse.Action):
    """Stores the constant of a flag without a value."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, const: Any = True, default: Any = False, **options: Any
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, default=default, **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        _store(namespace, self, self.const)


class _Switch(argparse.Action):
    """Stores true for --name and false for --no_name."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        names = [name for flag in option_strings for name in (flag, f"--no_{flag[2:]}")]
        super().__init__(names, dest, nargs=0, **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        _store(namespace, self, not str(option_string).startswith("--no_"))


def _store(namespace: argparse.Namespace, action: argparse.Action, value: Any) -> None:
    given: dict[str, Any] = vars(namespace).setdefault("given", {})
    former = given.get(action.dest, value)
    if former != value:
        log.warning("--%s is given twice, %s and %s: the last counts", action.dest, shown(former), shown(value))
    given[action.dest] = value
    setattr(namespace, action.dest, value)


class _Collect(argparse.Action):
    """Stores the values of a flag that may be given several times, in order."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        given: dict[str, Any] = vars(namespace).setdefault("given", {})
        given[self.dest] = [*given.get(self.dest, []), *values]
        setattr(namespace, self.dest, given[self.dest])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)


class Parser(argparse.ArgumentParser):
    """The parser of every entry point.

    Args:
        description: of the programme.
        kind: dataclass whose fields flags set; see `add_setting`.
        reads_config: whether there is `--config` with a YAML file of `kind`, and `key=value` settings.
        config: the default of `--config`; it must be given without one.
        aliases: former names of flags to those of today.
    """

    def __init__(
        self,
        description: str | None,
        kind: type | None = None,
        *,
        reads_config: bool = False,
        config: Path | None = None,
        config_help: str = "YAML file, see configs/",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        command = running.get()
        prog = None if command is None else f"{PROGRAM} {command.name}"
        super().__init__(prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        actions: dict[str | None, type[argparse.Action]] = {None: _Store, "store": _Store, "collect": _Collect}
        for name, action in (actions | {"store_true": _StoreConstant, "switch": _Switch}).items():
            self.register("action", name, action)
        self._kind, self._reads_config = kind, reads_config
        self._aliases = dict(aliases or {})
        self._paths: dict[str, str] = {}
        if reads_config:
            self._aliases["--config_path"] = "--config"
            given = {"required": True} if config is None else {"default": config}
            self.add_argument(
                "--config", type=as_path, metavar="FILE", help=_about(config_help, default=config), **given
            )
            self.add_argument(
                "settings", nargs="*", metavar="key=value", help="any setting of the config, in the place of the file's"
            )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As argparse's; flags that several programs have stand in the same group of the help everywhere."""
        title = _GROUP_OF.get(names[0])
        if title is None:
            return super().add_argument(*names, **options)
        return self.add_argument_group(title).add_argument(*names, **options)

    def add_argument_group(self, title: str) -> "argparse._ArgumentGroup":  # type: ignore[override]
        """The group of a title, a new one where there is none."""
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else super().add_argument_group(title)

    def add_setting(
        self,
        flag: str,
        field: str,
        help: str,
        *,
        group: "argparse._ArgumentGroup | None" = None,
        const: Any = _UNSET,
        shows_default: bool = True,
        repeatable: bool = False,
    ) -> None:
        """Add a flag that sets a field of the config; type, range and default are the field's.

        Args:
            field: its dotted name, such as "memory.window_frames".
            shows_default: whether the help ends with the field's default; not for what the help says otherwise.
            const: what a flag without a value sets.
            repeatable: whether a flag of a list may be given several times.
        """
        assert self._kind is not None
        hint = declaration(self._kind, field)
        self._paths[flag[2:]] = field
        add = (group or self).add_argument
        default = None if self._reads_config else field_default(self._kind, field)
        shown_default = field_default(self._kind, field) if shows_default else None
        unless = " unless the config sets it" if self._reads_config else ""
        if const is not _UNSET:
            add(flag, action="store_true", const=const, default=None, help=_about(help))
        elif declared(hint).kind is bool:
            add(flag, action="switch", default=default, help=_about(help, default=shown_default, unless=unless))
        else:
            about = _about(help, hint, shown_default, unless)
            options = value_options(hint, flag) | ({"action": "collect", "nargs": "+"} if repeatable else {})
            add(flag, default=default, help=about, **options)

    def default_of(self, field: str) -> Any:
        """The default of a field of the config, by its dotted name."""
        assert self._kind is not None
        return field_default(self._kind, field)

    def add_value(
        self, flag: str, hint: Any, help: str, *, group: "argparse._ArgumentGroup | None" = None, **options: Any
    ) -> None:
        """Add a flag that is no setting of a config, with its declaration."""
        about = _about(help, hint, options.get("default"))
        (group or self).add_argument(flag, help=about, **(value_options(hint, flag) | options))

    def add_seed(self, help: str = "of all random numbers", default: int = 0) -> None:
        """Add --seed."""
        self.add_value("--seed", Seed, help, default=default, metavar="N")

    def add_device(self, dtypes: Sequence[str] | None = tuple(DTYPES)) -> None:
        """Add --device, and --dtype with its choices unless they are None."""
        group = self.add_argument_group("device")
        group.add_argument("--device", help="cpu, cuda or cuda:N; by default the GPU if there is one")
        if dtypes is not None:
            about = "by default bfloat16 on a GPU and float32 on a CPU"
            group.add_argument("--dtype", choices=list(dtypes), help=about)

    def format_help(self) -> str:
        """As argparse's; under `arl2` it names commands in the place of scripts."""
        return in_words_of_console(super().format_help())

    def error(self, message: str) -> Any:
        """Raise the error of a command line.

        Raises:
            InputError: always.
        """
        # A declaration's message names the flag itself.
        message = re.sub(r"^argument [^:]+: (?=--)", "", message)
        raise InputError(f"{message}{'' if message.endswith('?') else ';'} --help lists all flags")

    def parse_args(  # type: ignore[override]  # argparse declares overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse as argparse does, strictly.

        Returns:
            the namespace, with `settings` (the `key=value` texts) and `flags` (values by the dotted names of their
            fields).

        Raises:
            InputError: something that cannot be understood.
        """
        if _is_asked_for_parser.get():
            raise _ParserFound(self)
        flags, settings = self._apart(list(sys.argv[1:] if args is None else args))
        parsed, extras = super().parse_known_args(flags, namespace)
        # Positional settings that argparse took are those without "=".
        for extra in (*(getattr(parsed, "settings", None) or []), *extras):
            what = f"{shown(extra)} is no setting: give key=value" if self._reads_config else f"unexpected {extra}"
            self.error(what)
        given = dict(getattr(parsed, "given", {}))
        parsed.settings = settings
        if self._reads_config:
            parsed.config = find_shipped(parsed.config)
        names = [setting.partition("=")[0].strip() for setting in settings]
        for name in names:
            self._refuse_flag_as_setting(name)
        for name in {name for name in names if names.count(name) > 1}:
            log.warning("%s= is given more than once: the last counts", name)
        parsed.flags = {self._paths[name]: value for name, value in given.items() if name in self._paths}
        return parsed

    def _apart(self, arguments: list[str]) -> tuple[list[str], list[str]]:
        """Flags under their names of today with their values, and `key=value` settings wherever they stand."""
        flags: list[str] = []
        settings: list[str] = []
        action: argparse.Action | None = None
        taken = 0
        for index, argument in enumerate(arguments):
            if argument == "--":  # from here on nothing is a flag
                rest = arguments[index + 1 :]
                known = [one for one in rest if self._reads_config and _SETTING.match(one)]
                return [*flags, "--", *(one for one in rest if one not in known)], settings + known
            if argument.startswith("--"):
                name, equals, value = argument.partition("=")
                name = self._current(name)
                flags.append(name + equals + value)
                action, taken = self._option_string_actions[name], len(equals)
            elif self._reads_config and _SETTING.match(argument) and not _takes(action, taken):
                settings.append(argument)
            else:
                flags.append(argument)
                taken += 1
        return flags, settings

    def _refuse_flag_as_setting(self, name: str) -> None:
        """Say of a `key=value` whose key is a flag and no setting what to give in its place.

        Raises:
            InputError: it is one.
        """
        assert self._kind is not None
        hints = declarations(self._kind)
        known = {*hints, *(former for hint in hints.values() for former in declared(hint).former)}
        flag = self._aliases.get(f"--{name}", f"--{name}")
        if name in known or flag not in self._option_string_actions:
            return
        field = self._paths.get(flag[2:])
        cure = f"it is a flag, give {flag}" if field is None else f"give {field}=value"
        self.error(f"unknown setting {shown(name)}: {cure}")

    def _current(self, name: str) -> str:
        """A flag's name of today."""
        with_underscores = "--" + name[2:].replace("-", "_")
        for one in (name, with_underscores):
            one = self._aliases.get(one, one)
            if one in self._option_string_actions:
                return one
        if self._kind is not None and self._reads_config:
            field = _field_called(self._kind, with_underscores[2:])
            if field is not None:
                self.error(f"unknown flag {name}: it is a setting, give {field}=value")
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        longer = [flag for flag in known if flag.startswith(with_underscores)]
        near = longer or _nearest(with_underscores, known)
        self.error(f"unknown flag {name}" + (f": did you mean {' or '.join(near[:3])}?" if near else ""))
        raise AssertionError


def _nearest(flag: str, known: Sequence[str]) -> list[str]:
    """The flag that was most likely meant, if any: one that begins with the same word goes before one that looks so."""
    close = difflib.get_close_matches(flag, known, n=len(known))
    word = flag.split("_")[0]
    return sorted(close, key=lambda one: one.split("_")[0] != word)[:1]


def _field_called(kind: type, name: str) -> str | None:
    """The dotted name of a config's field by that name, or by its last part where no other field has the same."""
    paths = _field_paths(kind)
    found = [path for path in paths if path == name] or [path for path in paths if path.split(".")[-1] == name]
    return found[0] if len(found) == 1 else None


def _field_paths(kind: type, prefix: str = "") -> list[str]:
    paths = []
    for name, hint in declarations(kind).items():
        inner = declared(hint).kind
        is_group = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        paths += _field_paths(inner, f"{prefix}{name}.") if is_group else [f"{prefix}{name}"]
    return paths


def _takes(action: argparse.Action | None, taken: int) -> bool:
    """Whether a flag that has `taken` values takes a next one that looks like key=value."""
    if action is None or action.nargs == 0:
        return False
    if action.nargs in ("*", "+"):
        return action.type is None and "=" in str(action.metavar)
    return taken < (1 if action.nargs in (None, "?") else int(action.nargs))


def value_options(hint: Any, flag: str) -> dict[str, Any]:
    """The options of `add_argument` for a declaration."""
    kind = declared(hint).kind
    if get_origin(kind) is list:
        element = get_args(kind)[0]
        return value_options(element, flag) | {"nargs": "*"}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"type": reader(hint, flag), "metavar": "{" + ",".join(member.value for member in kind) + "}"}
    choices = [rule.names for rule in declared(hint).rules if isinstance(rule, Choices)]
    if choices:
        return {"type": reader(hint, flag), "metavar": "{" + ",".join(choices[0]) + "}"}
    is_path = kind is Path or any(isinstance(rule, IsPath) for rule in declared(hint).rules)
    return {"type": reader(hint, flag), "metavar": "PATH" if is_path else {int: "N", float: "X"}.get(kind, "TEXT")}


def reader(hint: Any, flag: str) -> Callable[[str], Any]:
    """What turns a flag's text into its declared type."""
    is_number = declared(hint).kind in (int, float)

    def read(text: str) -> Any:
        if is_number and not text.strip():
            raise argparse.ArgumentTypeError(f"{flag} is empty: give {wanted(hint)}")
        try:
            return typed(hint, resolve(text) if is_number else text, flag)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def as_path(text: str) -> Path:
    """A path from the command line."""
    try:
        value: Path = typed(Path, text, "path")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def as_input(text: str) -> Path:
    """A path from the command line that is read: of the working directory, or else of what ships, `find_shipped`."""
    return find_shipped(as_path(text))


def field_default(kind: type, field: str) -> Any:
    """The default of a field by its dotted name."""
    *outer, last = field.split(".")
    for name in outer:
        kind = declared(declarations(kind)[name]).kind
    (found,) = (one for one in dataclasses.fields(kind) if one.name == last)
    if found.default_factory is not dataclasses.MISSING:
        return found.default_factory()
    return None if found.default is dataclasses.MISSING else found.default


def _about(text: str, hint: Any = None, default: Any = None, unless: str = "") -> str:
    """A flag's help with its range and default, and when that does not count."""
    is_text = hint is None or declared(hint).kind in (str, Path)
    parts = [] if is_text else [wanted(hint).removesuffix(", or null")]
    parts += [f"default {shown(default)}{unless}"] if default not in (None, []) else []
    return (f"{text} ({'; '.join(parts)})" if parts else text).replace("%", "%%")
