"""What all verbs of the command line share."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


WIDEST = 110  # columns of a sentence, however wide the terminal is
BESIDE = re.compile(r"(?P<example> +\S.*?) {2,}(?P<remark>\S.*)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that say nothing. Sentences fill the terminal; indented lines, such as examples,
    stay as they are written where they fit."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for sentences, found in groupby(text.splitlines(), lambda line: bool(line) and not line.startswith(" ")):
            group = list(found)
            lines += textwrap.wrap(" ".join(group), min(width, WIDEST)) if sentences else _fitted(group, width)
        return "\n".join(indent + line for line in lines)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _fitted(lines: Iterable[str], width: int) -> Iterator[str]:
    """Indented lines; what stands beside an example is put below it where both do not fit into one."""
    for line in lines:
        beside = BESIDE.fullmatch(line) if len(line) > width else None
        yield from (beside["example"], f"      {beside['remark']}") if beside else (line,)


def add_verb(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
    more: str = "",
) -> argparse.ArgumentParser:
    """Adds `rotquant NAME`, which calls `run` with its arguments.

    Args:
        summary: one line without a full stop; examples: command lines; more: what else its --help says.
    """
    description = f"{summary[0].upper()}{summary[1:]}." + (f"\n\n{more}" if more else "")
    added = verbs.add_parser(
        name, help=summary, description=description, epilog=f"examples:\n  {examples}", formatter_class=Help
    )
    added.set_defaults(run=run)
    added.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return added


def positive(text: str) -> int:
    """A number of an argument, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
