"""Critters: an endless data set of animals in hats, with captions that are exactly true, and a reader
that says what a picture shows.

:mod:`~minidiff.critters.scene` says what there is, :mod:`~minidiff.critters.captions` puts it into words,
:mod:`~minidiff.critters.drawing` into pictures (of :mod:`~minidiff.critters.outlines`), and
:mod:`~minidiff.critters.data` makes a data set of both. :mod:`~minidiff.critters.reader` looks at
pictures, and :mod:`~minidiff.critters.scores` asks it how well a model follows its prompts.
"""

from minidiff.critters.captions import caption, prompt, vocabulary
from minidiff.critters.data import Critters, Rendering
from minidiff.critters.drawing import draw
from minidiff.critters.reader import AttributeReader, degrade, train_reader
from minidiff.critters.scene import (
    ANIMALS,
    ATTRIBUTES,
    BACKGROUNDS,
    EXCHANGES,
    FURS,
    HAT_COLORS,
    HATS,
    HELD_OUT,
    OWN_FUR,
    PAIR_ATTRIBUTES,
    Critter,
    Scene,
    exchange,
    furs,
    labels,
    sample_critter,
    sample_scene,
    words,
)
from minidiff.critters.scores import accuracy, binding_accuracy, clip_accuracy, evaluate, reader_accuracy

__all__ = [
    "ANIMALS", "ATTRIBUTES", "BACKGROUNDS", "EXCHANGES", "FURS", "HATS", "HAT_COLORS", "HELD_OUT",
    "OWN_FUR", "PAIR_ATTRIBUTES", "AttributeReader", "Critter", "Critters", "Rendering", "Scene",
    "accuracy", "binding_accuracy", "caption", "clip_accuracy", "degrade", "draw", "evaluate",
    "exchange", "furs", "labels", "prompt", "reader_accuracy", "sample_critter", "sample_scene",
    "train_reader", "vocabulary", "words",
]  # fmt: skip
