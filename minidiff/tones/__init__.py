"""Tones: an endless data set of short sounds, with captions that are exactly true, and ears that say what a
sound is.

:mod:`~minidiff.tones.sound` says what there is, :mod:`~minidiff.tones.captions` puts it into words,
:mod:`~minidiff.tones.synthesis` into waves, and :mod:`~minidiff.tones.data` makes a data set of both.
:mod:`~minidiff.tones.hearing` measures pitch and hears the rest, and :mod:`~minidiff.tones.scores` asks it
how well a model follows its prompts.
"""

from minidiff.tones import sound
from minidiff.tones.captions import caption, prompt, vocabulary
from minidiff.tones.data import Tones
from minidiff.tones.hearing import Heard, cents, hear, log_spectrum, pitch
from minidiff.tones.scores import evaluate, hearing_accuracy, shares
from minidiff.tones.sound import *  # noqa: F403 - what there is, by its own list
from minidiff.tones.synthesis import play

__all__ = [
    *sound.__all__, "Heard", "Tones", "caption", "cents", "evaluate", "hear", "hearing_accuracy",
    "log_spectrum", "pitch", "play", "prompt", "shares", "vocabulary",
]  # fmt: skip
