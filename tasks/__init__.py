"""The benchmark: its tasks, metrics, judges and reports."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


def published(name: str) -> str:
    """A text of tasks/prompts/, which stands there word for word as it was published. The newline
    at the file's end is not part of it.
    """
    path = Path(__file__).parent / "prompts" / f"{name}.txt"
    return path.read_text(encoding="utf-8").removesuffix("\n")


def read_each(
    rows: Iterable[tuple[str, Any]], make: Callable[[dict[str, Any]], Made], task: str = ""
) -> Iterator[tuple[str, Made]]:
    """(file:line, what `make` makes of the row) of each of sources.read_rows' rows.

    ValueError names file:line, and the task, of the first that cannot be read.
    """
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            made = make(row)
        except ValueError as error:
            where = f"{place}: {task}" if task else place
            raise ValueError(f"{where}: {error}") from error
        yield place, made
