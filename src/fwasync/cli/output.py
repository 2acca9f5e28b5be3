"""What commands print: tables and lists of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fwasync.cli.recorded import REPORT

__all__ = ("print_files", "print_table", "shown")

_FILES = (REPORT, "metrics.jsonl", "checkpoints.jsonl", "config.json")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    for row in [columns, *rows]:
        cells = [cell.ljust(widths[0]) if index == 0 else cell.rjust(widths[index]) for index, cell in enumerate(row)]
        print(f"  {'   '.join(cells)}".rstrip())


def print_files(directory: Path) -> None:
    """Print which files a run has left."""
    print("The run:")
    for name in _FILES:
        if (directory / name).exists():
            print(f"  {directory / name}")


def shown(text: str) -> str:
    """Text on one line, whatever a model may have said."""
    printable = "".join(character if character.isprintable() else "·" for character in text)
    return printable or "(nothing)"
