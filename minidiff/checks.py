"""What doors ask of a number: whole, and in range."""

import math
import operator
from typing import Any

SEEDS = 2**63
"""Seeds are smaller than this."""


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number of any kind (Python's, NumPy's, a tensor of shape ()) as Python's, in range.

    Args:
        name: what the number is called in the message.
        value: the number.
        least: smallest allowed.
        most: largest allowed; None for no bound.

    Raises:
        ValueError: it is not whole, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} = {value!r}: use a whole number") from error
    if number < least:
        raise ValueError(f"{name} = {number}: use at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} = {number}: use at most {most}")
    return number


def positive(name: str, value: float) -> float:
    """A number above 0 that is finite.

    Raises:
        ValueError: it is not.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value:g}: it must be positive and finite")
    return value


def seed_number(seed: Any, count: int = 1) -> int:
    """A seed from which ``count`` may be counted on.

    Raises:
        ValueError: it is not whole, negative, or too large for torch.
    """
    return whole("seed", seed, 0, SEEDS - count)
