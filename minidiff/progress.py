"""What the command says while it works, all of it on standard error: how far it is, how long it will take,
and what a user should know. Standard output is for results.
"""

import sys
from collections import Counter
from time import monotonic
from typing import Any

from tqdm import tqdm

LONG = 60.0
"""From so many seconds on, work is announced."""
MEASURED = 2.0
"""For so many seconds the work is measured before it is announced."""
DELAY = 0.5
"""For so many seconds no bar is shown: work that is over at once, or refused, needs none."""
MOST_OF_A_KIND = 5
"""So many warnings of a kind are shown."""


def say(text: str) -> None:
    """Print a line, above a bar if there is one, and once, however many processes run."""
    from minidiff.training import processes  # what it brings is not needed to print a bar

    if processes().is_main_process:
        tqdm.write(text, file=sys.stderr)


def duration(seconds: float) -> str:
    """About how long that is, in words: "40 s", "12 min", "3 h", "12 days".

    Args:
        seconds: 0 or more.
    """
    for size, unit, most in ((1, "s", 100), (60, "min", 100), (3600, "h", 48)):
        if seconds / size < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"


class Bar(tqdm):
    """A bar, where standard error is a terminal. Where it is a file, a pipe or a terminal, one line says how
    long the work will take if it takes more than a minute, after two seconds of it.

    The first update only starts the clock: what happens before it, such as reading weights, is not the work.

    Args:
        total: updates there will be.
        desc: what is done, such as "64 images"; begins the bar and stands in the line.
        quiet: show nothing at all, as all processes do but one.
        options: those of ``tqdm.tqdm``, such as ``initial`` and ``unit``.
    """

    def __init__(self, *, total: int, desc: str = "", quiet: bool = False, **options: Any):
        # None is tqdm's word for: unless it is a terminal. Then it counts nothing, so we count.
        options = {"disable": True if quiet else None, "delay": DELAY, **options}
        super().__init__(total=total, desc=desc, file=sys.stderr, **options)
        self.what, self.left, self.announced = desc, total - options.get("initial", 0), quiet
        self.done, self.clock = 0.0, 0.0

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more, and announce long work, once."""
        now, n = monotonic(), n or 0
        self.left -= n
        if not self.clock:
            self.clock = now
        else:
            self.done += n
            if not self.announced and self.done and now - self.clock >= MEASURED:
                self.announced = True
                if (seconds := (now - self.clock) / self.done * self.left) >= LONG:
                    say(f"about {duration(seconds)} for {self.what}; Ctrl-C stops")
        return super().update(n)


class RunningMean:
    """Exponential mean of the numbers it is called with, without a bias towards the first.

    The first would keep a weight of 0.98^n, and the loss of an untrained network is many times that of
    the next steps. Dividing by the sum of all weights, 1 - 0.98^n, lets each number count as much as its
    age says (Kingma & Ba 2015, section 3).
    """

    def __init__(self, keep: float = 0.98):
        self.keep, self.total, self.weight = keep, 0.0, 0.0

    def __call__(self, value: float) -> float:
        """Take one more number; the mean of all so far."""
        self.total = self.keep * self.total + (1 - self.keep) * value
        self.weight = self.keep * self.weight + (1 - self.keep)
        return self.total / self.weight


class FewOfAKind:
    """Prints warnings on a line of their own, above a bar if there is one, and of a kind the first five: a
    folder may have thousands of captions that are too long. A kind is what stands before the first colon."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, message: Warning | str, *_: Any) -> None:
        """Show a warning, as :func:`warnings.showwarning` is called."""
        kind, *rest = str(message).split(":", 1)
        self.seen[kind] += 1
        if self.seen[kind] <= MOST_OF_A_KIND or not rest:
            more = " (more of this kind are not shown)" if self.seen[kind] == MOST_OF_A_KIND and rest else ""
            tqdm.write(f"warning: {message}{more}", file=sys.stderr)
