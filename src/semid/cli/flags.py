"""Flags of the command line, generated from the option fields of tokenizers and ranking models.

Reading the fields needs the classes, and those need torch. So that ``--help`` and refusals stay
quick, ``flags.json`` holds what was read; `write_flags` makes it again (``make flags``), and a test
compares it with the classes.

Help is plain text in titled sections: Rich's boxes leave the sentences 26 columns of 80.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from semid.cli import staging
from semid.errors import UsageError, nearest_name

FILE = Path(__file__).with_name("flags.json")

SECTIONS = {"kmeans": "K-means", "training": "Training", "network": "Network"}
"""Nested options of tokenizers whose fields are flags of their own; others go by --set."""

RANKING = {
    "data": "semid:RankingDataConfig",
    "features": "semid:CodeFeatures",
    "config": "semid:RankerConfig",
    "training": "semid:TrainOptions",
}
"""Options of ``semid rank`` by the first part of their keys."""

RANKING_NAMES = {
    "data.seed": "data_seed",
    "features.mode": "code_mode",
    **{
        f"features.{name}": ""
        for name in ("levels", "max_rows", "n", "pooling", "rate", "seed", "weight_decay")
    },
    **{f"config.{name}": "" for name in ("fusion", "init_std", "sparse", "unknown_rate")},
}
"""Keys whose flag has another name than their field, or none."""
FIRST = ("levels", "codebook_size")
_SYNONYMS = {"n_codebooks": "levels"}  # parallel codebooks are counted by the flag of levels

_SCALARS = {bool: "bool", int: "int", float: "float", str: "str"}
_TYPES: Any = {"bool": bool, "int": int, "float": float}


@dataclass(frozen=True)
class Flag:
    """One option field as a flag."""

    key: str  # dotted place of the field, such as ``kmeans.max_iter``
    name: str  # of the parameter; empty for a field that has no flag and is given by ``--set``
    type: str  # ``bool``, ``int``, ``float``, ``str``, or one of these with ``s`` for a list
    help: str  # sentence with the default
    choices: tuple[str, ...] = ()  # allowed strings
    section: str = ""  # heading in the help
    tokenizers: tuple[str, ...] = ()  # which tokenizers or models have it
    # Range of the value as `semid.options.Option` declares it, where all that have it agree.
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optional: bool = False  # whether the field may be None, which messages say

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter of a Typer command; None stands for a flag that is not given."""
        # Flags of two words get their name from the parameter's, negations of truth values too.
        declared = typer.Option(
            help=self.help,
            rich_help_panel=self.section,
            metavar="|".join(self.choices) or ("a,b,..." if self.type.endswith("s") else None),
        )
        annotation: Any = Annotated[_TYPES.get(self.type, str) | None, declared]
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, keyword, default=None, annotation=annotation)

    def value(self, text: Any) -> Any:
        """Return the value of what was given."""
        value = split_list(self.name, text, self.type) if self.type.endswith("s") else text
        if self.limits:
            from semid.options import Option

            hint = _TYPES.get(self.type.removesuffix("s"), str)
            hint = hint | None if self.optional else hint
            declared = Option(choices=self.choices, **self.limits)
            for problem in declared.problems(self.key.rpartition(".")[2], value, hint):
                raise UsageError(problem)
        return value


def split_list(name: str, text: str, kind: str = "strs") -> tuple[Any, ...]:
    """Return the values of a list with commas: ``ints``, ``floats`` or ``strs``."""
    convert: Any = {"ints": int, "floats": float}.get(kind, str)
    try:
        return tuple(convert(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = "whole numbers" if kind == "ints" else "numbers"
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"{flag} '{text}': give {numbers} with commas between") from None


# Reading option fields ----------------------------------------------------------------------


def read_flags(kind: type, prefix: str = "", defaults: Mapping[str, Any] | None = None) -> Any:
    """Yield a flag for every option field of a class, those of nested options among them."""
    from semid.documents import alternatives
    from semid.options import argument_types, declared_options, nested_options

    hints, declared = argument_types(kind), declared_options(kind)
    for field in fields(kind):
        about = declared.get(field.name)
        if about is None or not about.setting:
            continue
        hint, key = hints[field.name], f"{prefix}{field.name}"
        # Fields of nested options are flags of their own, or keys of --set.
        nested = nested_options(hint)
        if nested is not None:
            yield from read_flags(nested, f"{key}.", {**(defaults or {}), **about.nested})
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = (defaults or {}).get(field.name, default)
        types = [_type_name(each) for each in alternatives(hint)]
        kind_name = next((each for each in types if each), "")
        outer, _, inner = key.rpartition(".")
        named = kind_name and (not outer or outer in (*SECTIONS, *RANKING, "options"))
        yield Flag(
            key=key,
            name=(inner or key) if named else "",
            type=kind_name,
            help=f"{about.help.rstrip('.') or field.name}{_default_text(default)}.",
            choices=about.choices,
            section=SECTIONS.get(outer, "Tokenizer"),
            limits=_limits(about) if named else {},
            optional=type(None) in get_args(hint),
        )


def _limits(about: Any) -> dict[str, Any]:
    """Return the range of an `Option` and its name in messages; nothing if it has no limits."""
    limits = {name: getattr(about, name) for name in ("ge", "gt", "le", "lt")}
    limits = {name: value for name, value in limits.items() if value is not None}
    return {**limits, "name": about.name} if limits or about.choices else {}


def _type_name(hint: Any) -> str:
    inner = [each for each in get_args(hint) if each is not Ellipsis]
    if get_origin(hint) is tuple and inner and inner[0] in (int, float, str):
        return f"{_SCALARS[inner[0]]}s"
    return _SCALARS.get(hint, "")


_DEFAULT = re.compile(r" \(default [^()]*(?:\([^()]*\))?[^()]*\)\.$")


def _default_text(default: Any) -> str:
    if default is None or default is MISSING or isinstance(default, Mapping):
        return ""
    if isinstance(default, tuple):
        text = ",".join(map(str, default))
    else:
        text = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
        text = f"{default:g}" if isinstance(default, float) else text
    return f" (default {text})" if text else ""


def _read_kind(command: str, kind: str) -> list[Flag]:
    """Return the flags of a tokenizer (``fit``) or a next-item model (``retrieve``)."""
    if command == "fit":
        from semid.tokenizers.factory import TOKENIZERS

        return list(read_flags(TOKENIZERS.load(kind, flag="--tokenizer")))
    from semid.recommenders.retrieval import MODELS
    from semid.recommenders.retrieval.training import TRAINING
    from semid.training.options import TrainOptions

    model = MODELS.load(kind, flag="--model")
    flags = [replace(flag, section="Model") for flag in read_flags(model.options, "options.")]
    return flags + [*read_flags(TrainOptions, "training.", TRAINING)] * model.trains


def _merged_flags(by_kind: Mapping[str, list[Flag]], title: str) -> list[Flag]:
    """Return the flags of several classes, each once, under ``title`` or who has them."""
    by_key: dict[str, list[tuple[str, Flag]]] = {}
    kinds = list(by_kind)
    for kind, flags in by_kind.items():
        for flag in flags:
            by_key.setdefault(_SYNONYMS.get(flag.key, flag.key), []).append((kind, flag))
    trained = [kind for kind, _ in by_key["training.epochs"]]
    merged = []
    for key, versions in by_key.items():
        owners = [kind for kind, _ in versions]
        # Tokenizers may describe one option in their own words: the most frequent text counts.
        helps = [flag.help for _, flag in versions]
        help_text = max(helps, key=helps.count)
        if len({str(_DEFAULT.findall(text)) for text in helps}) > 1:
            help_text = _DEFAULT.sub(f" (default by {title.lower()}).", help_text)
        flag = versions[0][1]
        section = flag.section
        if section == title and len(owners) <= len(kinds) // 2:
            section = f"Only {', '.join(owners)}"
        elif section == title and owners == trained and title == "Tokenizer":
            section = SECTIONS["training"]
        # An option of few tokenizers goes into a section of theirs, so that the help stays short.
        name = key if flag.key == "n_codebooks" else flag.name
        changed: dict[str, Any] = {"name": name, "help": help_text, "section": section}
        if any((f.limits, f.choices) != (flag.limits, flag.choices) for _, f in versions):
            changed["limits"] = {}
        merged.append(replace(flag, key=key, tokenizers=tuple(owners), **changed))
    order = [title, *SECTIONS.values()]
    merged.sort(
        key=lambda flag: (
            order.index(flag.section) if flag.section in order else len(order),
            flag.section,
            FIRST.index(flag.key) if flag.key in FIRST else len(FIRST),
        )
    )
    return merged


def _rank_flags() -> list[Flag]:
    from semid.recommenders.ranking.training import TRAINING
    from semid.registry import import_target

    titles = {"data": "Data", "features": "Codes", "config": "Model", "training": "Training"}
    flags = []
    for part, target in RANKING.items():
        defaults = TRAINING if part == "training" else None
        for flag in read_flags(import_target(target), f"{part}.", defaults):
            name = RANKING_NAMES.get(flag.key, flag.name)
            flags.append(replace(flag, name=name, section=titles[part]))
    return flags


def write_flags(path: Path = FILE) -> None:
    """Write the flags that the classes have now."""
    from semid.recommenders.retrieval import MODELS
    from semid.serve.limits import ServeOptions
    from semid.tokenizers.factory import TOKENIZERS

    flags = {"fit": [], "rank": _rank_flags(), "retrieve": []}
    for command, title, registry in ("fit", "Tokenizer", TOKENIZERS), ("retrieve", "Model", MODELS):
        by_kind = {kind: _read_kind(command, kind) for kind in sorted(registry.targets)}
        flags[command] = _merged_flags(by_kind, title)
    flags["serve"] = [replace(flag, section="Limits") for flag in read_flags(ServeOptions)]
    rows = {command: [asdict(flag) for flag in each] for command, each in flags.items()}
    lines = {c: ",\n".join(json.dumps(row) for row in each) for c, each in rows.items()}
    blocks = ",\n".join(f'"{command}": [\n{text}\n]' for command, text in lines.items())
    path.write_text(f"{{\n{blocks}\n}}\n", encoding="utf8")


@functools.cache
def known_flags(command: str) -> tuple[Flag, ...]:
    """Return the flags of a command, without importing the classes they come from."""
    if command == "rank-grid":  # a grid has models and codes of its own
        return tuple(
            flag
            for flag in known_flags("rank")
            if not flag.key.startswith("features.") and flag.key != "config.model"
        )
    rows = json.loads(FILE.read_text(encoding="utf8")).get(command, [])  # none yet: made next
    return tuple(
        Flag(**{**row, "choices": tuple(row["choices"]), "tokenizers": tuple(row["tokenizers"])})
        for row in rows
    )


def kind_flags(command: str, *kinds: str) -> dict[str, Flag]:
    """Return the flags of some tokenizers or models by key, importing those of plugins alone."""
    known, flags = known_flags(command), {}
    names = {flag.key: flag.name for flag in known}
    for kind in kinds:
        of_kind = [flag for flag in known if kind in flag.tokenizers]
        for flag in of_kind or _read_kind(command, kind):
            key = _SYNONYMS.get(flag.key, flag.key)
            flags[key] = replace(flag, key=key, name=names.get(key, ""))  # else it goes by --set
    return flags


# Commands -----------------------------------------------------------------------------------


def expand(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Typer command: a function whose docstring has the help of its parameters.

    A parameter that is annotated with a dataclass becomes one flag per field, and
    ``Annotated[dict[str, Any], "COMMAND"]`` becomes the generated flags of that command; the
    function gets a dictionary of those that were given, by key, with what ``--set`` names. A path
    may be a URI: the function gets a path on this machine, see `semid.cli.staging`.
    """
    # Typer reads signatures: the command gets one parameter per flag, made from the groups.
    hints = get_type_hints(function, include_extras=True)
    text, helps = _read_docstring(function)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if is_dataclass(hint):
            inner = get_type_hints(hint, include_extras=True)
            groups[name] = hint
            inner_helps = _read_docstring(hint)[1]
            parameters += [
                _declare(
                    parameter.replace(name=f.name, default=f.default),
                    inner[f.name],
                    inner_helps.get(f.name),
                    getattr(hint, "PANEL", None),
                )
                for f in fields(hint)
            ]
        elif get_origin(hint) is Annotated and isinstance(get_args(hint)[1], str):
            groups[name] = get_args(hint)[1]
            parameters += [flag.parameter for flag in known_flags(groups[name]) if flag.name]
            parameters.append(_SET)
        elif hint is typer.Context:
            parameters.append(parameter.replace(annotation=hint))
        else:
            parameters.append(_declare(parameter, hint, helps.get(name)))
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [each.replace(kind=keyword) for each in parameters]
    paths = {name for name, hint in hints.items() if _kind(hint) in (Path, Path | None)}

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        for name in paths:
            arguments[name] = staging.local(arguments[name], name, function.__name__)
        for name, group in groups.items():
            if isinstance(group, str):
                arguments[name] = given_values(known_flags(group), arguments)
            else:
                arguments[name] = group(**{f.name: arguments.pop(f.name) for f in fields(group)})
        function(**arguments)
        staging.send()

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__doc__ = text
    del command.__wrapped__
    return command


def _kind(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _read_docstring(subject: Any) -> tuple[str, dict[str, str]]:
    """Return the text of a docstring, and the sentences on its arguments or attributes by name."""
    text, *rest = re.split(r"\n\n(?:Args|Attributes):\n", inspect.cleandoc(subject.__doc__ or ""))
    parts = re.split(r"^    (\w+): ", "".join(rest), flags=re.MULTILINE)
    sentences = (" ".join(part.split()) for part in parts[2::2])
    return text, dict(zip(parts[1::2], sentences, strict=True))


def _declare(
    parameter: inspect.Parameter, hint: Any, help_text: str | None, panel: str | None = None
) -> inspect.Parameter:
    """Return a parameter with what Typer needs: required plain ones are positional arguments."""
    kind, *declared = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if declared:
        info = copy.copy(declared[0])
    elif parameter.default is parameter.empty:
        info = typer.Argument(metavar=parameter.name.upper())
    elif kind is bool:  # named, so that it gets no negation
        info = typer.Option(f"--{parameter.name.replace('_', '-')}")
    else:
        info = typer.Option()
    if kind in (Path, Path | None):  # given as text: as a `Path` a URI would lose a slash
        kind = str if kind is Path else str | None
        info.metavar = info.metavar or "PATH"
    info.help = info.help or help_text
    info.rich_help_panel = info.rich_help_panel or panel
    default = parameter.default
    default = str(default) if isinstance(default, Path) else default
    return parameter.replace(annotation=Annotated[kind, info], default=default)


_SET = inspect.Parameter(
    "settings",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other option by its key, with a value of TOML: training.warmup=0.1.",
        ),
    ],
)


def given_values(flags: Sequence[Flag], arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the generated flags out of a command's arguments and return those that were given."""
    # A flag that was not given is None, so that recipes and defaults keep their say.
    values = {}
    for flag in flags:
        value = arguments.pop(flag.name) if flag.name else None
        if value is not None:
            values[flag.key] = flag.value(value)
    for text in arguments.pop("settings") or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set '{text}': give KEY=VALUE, for example kmeans.max_iter=10")
        key = key.strip()
        if key in values:
            raise UsageError(f"{key} is given by its own flag and by --set; give one of them")
        try:
            values[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:  # a bare word is a string
            values[key] = value.strip()
    return values


def are_checked(context: typer.Context, command: str, values: Mapping[str, Any]) -> bool:
    """Whether all values have been checked; those of --set need the classes of the options.

    `Flag.value` checks those with limits, and `RankingDataConfig`, which needs no torch, its own.
    """
    limited = {
        flag.key
        for flag in known_flags(command)
        if flag.limits or flag.type == "bool" or flag.key.startswith("data.")
    } | {"seed", "config.model"}  # any number; checked by name
    return not context.params.get("settings") and set(values) <= limited


def check_keys(command: str, values: Mapping[str, Any], *kinds: str) -> None:
    """Refuse keys that a command, or each of some tokenizers or models of it, does not have."""
    names = {flag.key: flag.name for flag in known_flags(command)}
    keys = kind_flags(command, *kinds) if kinds else names
    for key in values:
        outer = key.partition(".")[0]  # a field such as the encoder of a pipeline takes any keys
        if not {key, outer, _SYNONYMS.get(key)} & keys.keys():
            name = names.get(key)
            flag = f"--{name.replace('_', '-')}" if name else f"--set {key}"
            nearest = "" if key in names else nearest_name(key, list(keys))
            owner = " or ".join(kinds) or f"semid {command}"
            raise UsageError(f"{flag} would change nothing: it is no option of {owner}{nearest}")
