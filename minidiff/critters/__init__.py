"""Critters: an endless data set of animals in hats, with captions that are exactly true, and a reader
that says what a picture shows.

:mod:`~minidiff.critters.scene` says what there is, :mod:`~minidiff.critters.captions` puts it into words,
:mod:`~minidiff.critters.drawing` into pictures (of :mod:`~minidiff.critters.outlines`), and
:mod:`~minidiff.critters.data` makes a data set of both. :mod:`~minidiff.critters.reader` looks at
pictures, and :mod:`~minidiff.critters.scores` asks it how well a model follows its prompts.
"""

from minidiff.critters import scene
from minidiff.critters.captions import caption, prompt, vocabulary
from minidiff.critters.data import Critters, Rendering
from minidiff.critters.drawing import draw
from minidiff.critters.reader import AttributeReader, degrade, train_reader
from minidiff.critters.scene import *  # noqa: F403 - what there is, by its own list
from minidiff.critters.scores import accuracy, binding_accuracy, clip_accuracy, evaluate, reader_accuracy

__all__ = [
    *scene.__all__, "AttributeReader", "Critters", "Rendering", "accuracy", "binding_accuracy", "caption",
    "clip_accuracy", "degrade", "draw", "evaluate", "prompt", "reader_accuracy", "train_reader", "vocabulary",
]  # fmt: skip
