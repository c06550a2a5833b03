"""Data: points, Fashion-MNIST, and any folder of captioned images, in memory or on the disk; :class:`Batches`
of them."""

from minidiff.data import points
from minidiff.data.batches import Batches
from minidiff.data.fashion import fashion_mnist
from minidiff.data.folder import captioned_folder

__all__ = ["Batches", "captioned_folder", "fashion_mnist", "points"]
