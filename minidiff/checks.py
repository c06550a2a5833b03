"""What doors ask of a number: whole, and in range."""

import math
import operator
from typing import Any

SEEDS = 2**63
"""Seeds are smaller than this."""

Size = int | tuple[int, int]
"""Of pictures: one number for height and width, or (height, width)."""


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


def sides(size: Any, multiple: int = 1) -> tuple[int, int]:
    """(height, width) of a :data:`Size`.

    Args:
        size: one whole number, or two.
        multiple: of which each side is a multiple.

    Raises:
        ValueError: a side is not whole, below 1 or no multiple, or there are more than two.
    """
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size = {size!r}: give one number, or (height, width)")
    height, width = (whole("size", side, -SEEDS) for side in pair)
    if min(height, width) < multiple or height % multiple or width % multiple:
        near = [max(1, -(-side // multiple)) * multiple for side in (height, width)]
        both = height == width
        shown, better = (f"{h}" if both else f"{h}x{w}" for h, w in ((height, width), near))
        raise ValueError(f"size = {shown}: use a multiple of {multiple} for each side, such as {better}")
    return height, width


def read_size(text: str) -> Size:
    """The :data:`Size` that a user wrote: "64" for both sides, or "48x96", height x width.

    Raises:
        ValueError: it is neither.
    """
    try:
        numbers = [int(side) for side in text.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--size {text}: give a number such as 64, or height x width such as 48x96")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
