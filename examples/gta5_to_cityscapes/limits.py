"""Ranges of numeric settings, written as their types: `Count`, `Positive`, `Weight`, `Fraction`."""

import math
from typing import Annotated, NamedTuple, get_type_hints


class Range(NamedTuple):
    """The values that a number may have, both ends included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        """Return the words of an error message."""
        return f"in [0, {self.high}]" if self.high < math.inf else f"of at least {self.low}"


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Weight = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


def check_limits(group: object) -> None:
    """Raise a ValueError if a number of a group of settings is out of its range."""
    for name, hint in get_type_hints(type(group), include_extras=True).items():
        value = getattr(group, name)
        for limit in getattr(hint, "__metadata__", ()):
            if isinstance(limit, Range) and not limit.low <= value <= limit.high:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected a number {limit}, got {value}")
