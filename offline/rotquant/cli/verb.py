"""What all verbs of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

RAW = argparse.RawDescriptionHelpFormatter
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Help(argparse.ArgumentDefaultsHelpFormatter, RAW):
    """Shows defaults, but not those that say nothing; leaves the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


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
