"""Data sets: drawn critters, alone and in twos, points, Fashion-MNIST, and any folder of captioned images."""

from minidiff.data import critters, duo, points
from minidiff.data.batches import Batches
from minidiff.data.critters import Critters
from minidiff.data.duo import Duo
from minidiff.data.fashion import fashion_mnist
from minidiff.data.folder import captioned_folder
from minidiff.data.reader import AttributeReader

__all__ = [
    "AttributeReader", "Batches", "Critters", "Duo", "captioned_folder", "critters", "duo",
    "fashion_mnist", "points",
]  # fmt: skip
