"""Values of options: what a flag, a variable or the settings file may say, and how it is refused."""

from __future__ import annotations

import math
from typing import Any

import click

__all__ = ["AmountType", "ExitType", "KeepType", "LookType", "PriceType", "ShareType", "SharesType", "WholeType",
           "Written"]  # fmt: skip


class Written(click.ParamType):  # type: ignore[type-arg] # generic since click 8.5 only
    """Numbers or words: ``written`` says which, for the settings file, where both are values of their own."""

    written = ""


class KeepType(Written):
    """A share over 0 and up to 1, "auto", or "all" (None)."""

    name = "R|auto|all"
    written = 'a share such as 0.35, "auto" or "all"'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str | None:
        if value is None or value == "all":
            return None
        if value == "auto":
            return "auto"
        try:
            share = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a share such as 0.35 nor 'auto' or 'all'.", param, ctx)
        if not (math.isfinite(share) and 0 < share <= 1):
            hint = f" For {share:g} % write {share / 100:g}." if 1 < share <= 100 else ""
            self.fail(f"{value!r} is not a share over 0 and up to 1.{hint}", param, ctx)
        return share


class LookType(KeepType):
    """A share over 0 and up to 1, or "all" (None)."""

    name = "R|all"
    written = 'a share such as 0.35, or "all"'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str | None:
        if value == "auto":
            self.fail("'auto' goes by what the guide looks at; give a share such as 0.35, or 'all'.", param, ctx)
        return super().convert(value, param, ctx)


class ExitType(Written):
    """A score from 0 to 1, "always" (0) or "off"."""

    name = "T|off|always"
    written = 'a score such as 0.9, "off" or "always"'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value in ("off", "always"):
            return "off" if value == "off" else 0.0
        try:
            score = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a score such as 0.9 nor 'off' or 'always'.", param, ctx)
        if not 0 <= score <= 1:
            self.fail(f"{value!r} is not a score from 0 to 1.", param, ctx)
        return score


class PriceType(Written):
    """Tokens from 0 up, "off" (0) or "auto"."""

    name = "auto|off|X"
    written = 'a number of tokens, "auto" or "off"'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value in ("auto", "off"):
            return "auto" if value == "auto" else 0.0
        try:
            price = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of tokens such as 40 nor 'auto' or 'off'.", param, ctx)
        if not (math.isfinite(price) and price >= 0):
            self.fail(f"{value!r} is not a number of tokens from 0 up.", param, ctx)
        return price


class WholeType(click.types.IntParamType):
    """A whole number within bounds."""

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if number < self.low or (self.high is not None and number > self.high):
            upto = f" to {self.high}" if self.high is not None else " up"
            self.fail(f"{value!r} is not a whole number from {self.low}{upto}.", param, ctx)
        return number


class ShareType(click.types.FloatParamType):
    """A share over 0 and under 1."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not 0 < number < 1:
            self.fail(f"{value!r} is not a share over 0 and under 1.", param, ctx)
        return number


class SharesType(Written):
    """Shares over 0 and up to 1, with commas between."""

    name = "R,R,..."
    written = 'a share such as 0.35, or several as "0.64,0.35"'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(KeepType().convert(part.strip(), param, ctx) for part in str(value).split(","))
        if not all(isinstance(share, float) for share in found):
            self.fail(f"{value!r} holds other things than shares such as 0.35.", param, ctx)
        return found  # type: ignore[return-value]


class AmountType(click.types.FloatParamType):
    """A finite number from 0 up."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not (math.isfinite(number) and number >= 0):
            self.fail(f"{value!r} is not a number from 0 up.", param, ctx)
        return number
