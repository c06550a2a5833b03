"""Data sets: drawn critters, points, Fashion-MNIST, and any folder of captioned images."""

from minidiff.data import critters, points
from minidiff.data.batches import Batches
from minidiff.data.critters import Critters
from minidiff.data.fashion import fashion_mnist
from minidiff.data.folder import captioned_folder
from minidiff.data.reader import AttributeReader

__all__ = [
    "AttributeReader", "Batches", "Critters", "captioned_folder", "critters", "fashion_mnist", "points",
]  # fmt: skip
