"""Help texts in sections, for one tokenizer or model if the command names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from semid.cli.flags import kind_flags, known_flags, split_list

CHOOSERS = {"fit": "tokenizer", "retrieve": "model"}
"""Commands whose help shows the flags of one tokenizer or model, and the flag that names it."""


class OptionsCommand(TyperCommand):
    """A command whose help has sections, and for ``--tokenizer`` or ``--model`` what applies."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the arguments, since ``--help`` is handled before the others are read."""
        ctx.meta["semid.arguments"] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections; required arguments and the command's own options come first."""
        flags, kind, command = {}, None, self.name or ""
        if command in CHOOSERS:
            flags = {flag.name: flag for flag in known_flags(command) if flag.name}
            chooser = f"--{CHOOSERS[command]}"
            kind = _option_value(ctx.meta.get("semid.arguments", []), chooser)
        applies = None if kind in (None, "all") else kind_flags(command, *split_list("", kind))
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if applies is not None and parameter.name in flags:
                if flags[parameter.name].key not in applies:
                    continue
                only = flags[parameter.name].section.startswith("Only")
                section = CHOOSERS[command].capitalize() if only else None
            else:
                section = None
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            is_argument = parameter.param_type_name == "argument"
            default = "Arguments" if is_argument else "Options"
            section = section or getattr(parameter, "rich_help_panel", None) or default
            sections.setdefault(section, []).append(record)
        if applies is not None:
            sections["More, by --set KEY=VALUE"] = [
                (flag.key, flag.help) for flag in applies.values() if not flag.name
            ]
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


def _option_value(arguments: Sequence[str], name: str) -> str | None:
    for place, argument in enumerate(arguments):
        if argument == name and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None
