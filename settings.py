"""A program's settings as one frozen dataclass: every field is a flag, with its default, its bounds
and its help in one line.

    @dataclass(frozen=True)
    class Config:
        recipe: str = "toy"                                           the first field: the name of a set of defaults
        batch: int = setting(32, "pairs in a step", least=1)          --batch 16

`from_command_line` turns a command line into such an object; whatever is wrong with it is one line,
after the usage, and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


def setting(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field with its help and what its value must keep to: least <= value, above < value < below,
    one of `choices`.
    """
    bounds = {">=": least, ">": above, "<": below}
    kept = {sign: bound for sign, bound in bounds.items() if bound is not None}
    return dataclasses.field(
        default=default, metadata={"help": text, "bounds": kept, "choices": tuple(choices)}
    )


def check_bounds(settings: DataclassInstance) -> None:
    """ValueError that names the first setting outside its bounds or choices."""
    for field in dataclasses.fields(settings)[1:]:
        value, bounds, choices = (
            getattr(settings, field.name),
            field.metadata["bounds"],
            field.metadata["choices"],
        )
        if choices and value not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            limits = bounds if isinstance(value, float) else {"<": 2**31} | bounds
            holds = {">=": operator.ge, ">": operator.gt, "<": operator.lt}
            if not (
                math.isfinite(value)
                and all(holds[sign](value, bound) for sign, bound in limits.items())
            ):
                words = " and ".join(f"{sign} {bound}" for sign, bound in limits.items())
                raise ValueError(f"{field.name} must be {words or 'finite'}, got {value}")


def listed(settings: Mapping[str, Any]) -> str:
    """Settings as one line: name and value, comma by comma."""
    return ", ".join(
        f"{name} {' '.join(value) if isinstance(value, tuple) else value}"
        for name, value in settings.items()
    )


def from_command_line(
    kind: type[Settings],
    recipes: Mapping[str, Mapping[str, Any]],
    arguments: Sequence[str],
    program: str,
    text: str,
    check: Callable[[Settings], Settings],
) -> Settings:
    """The settings that a command line asks for: the recipe's, then the flags', then as `check`
    returns them.

    text: what --help says of the program. Wrong usage, or a ValueError of `check`, is said in one
    line, after the usage, and exits with code 2.
    """
    fields = dataclasses.fields(kind)
    parser = argparse.ArgumentParser(
        description=text,
        usage=f"{program} [recipe] [--setting value ...]; --help lists the settings",
        epilog="recipes: "
        + "; ".join(f"{name}: {listed(defaults)}" for name, defaults in recipes.items()),
        allow_abbrev=False,
    )
    parser.add_argument(
        fields[0].name,
        nargs="?",
        choices=recipes,
        default=fields[0].default,
        help="default: %(default)s",
    )
    for field in fields[1:]:
        shown = f"; default {field.default}" if field.default not in ("", (), False) else ""
        options: dict[str, Any] = {
            "help": field.metadata["help"] + shown,
            "default": argparse.SUPPRESS,
        }
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            options |= {"nargs": "+", "metavar": "SOURCE"}
        else:
            options |= {
                "type": type(field.default),
                "metavar": type(field.default).__name__.upper(),
            }
        parser.add_argument(f"--{field.name}", **options)
    flags = {
        "--help",
        *(f"--{prefix}{field.name}" for field in fields[1:] for prefix in ("", "no-")),
    }
    for (
        word
    ) in arguments:  # argparse would take the unknown flag's value for the recipe, and blame that
        if word.startswith("--") and word.split("=")[0] not in flags:
            parser.error(f"unknown setting {word.split('=')[0]}")
    found = vars(parser.parse_args(arguments))
    given = {
        key: tuple(value)
        if isinstance(value, list)
        else os.path.expanduser(value)
        if isinstance(value, str)
        else value
        for key, value in found.items()
    }  # a shell leaves the ~ of --out=~/run
    try:
        settings = kind(**{**recipes[found[fields[0].name]], **given})
        check_bounds(settings)
        return check(settings)
    except ValueError as error:
        parser.error(str(error))
