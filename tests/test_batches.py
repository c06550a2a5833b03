"""Batches: each picture once an epoch, with its own caption of that epoch."""

import itertools

import torch

from minidiff.data import Batches

IMAGES = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1).expand(7, 3, 2, 2)


def first(batches: Batches, n: int) -> list[tuple[list[int], list[str]]]:
    """The first n batches: which pictures, and what is said."""
    return [
        (((x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist(), said)
        for x0, said in itertools.islice(batches, n)
    ]


def test_every_picture_comes_with_its_caption_of_the_epoch():
    batches = Batches(IMAGES, lambda index, epoch: f"{index} in {epoch}", 3)
    for k, (pictures, said) in enumerate(first(batches, 6)):
        assert said == [f"{picture} in {k // 2}" for picture in pictures]  # 2 batches of 3 out of 7


def test_no_picture_comes_twice_in_an_epoch_and_the_order_is_another_each_time():
    pictures = [shown for shown, _ in first(Batches(IMAGES, [""] * 7, 3), 40)]
    epochs = [one + two for one, two in zip(pictures[::2], pictures[1::2], strict=True)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert {picture for epoch in epochs for picture in epoch} == set(range(7))  # who is left out changes


def test_only_captions_that_say_something_follow_as_negative():
    batches = Batches(
        IMAGES, ["true"] * 7, 7, negative_caption=lambda index, _: "" if index % 2 else f"not {index}"
    )
    for pictures, said in first(batches, 3):
        assert said == ["true"] * 7 + [f"not {picture}" for picture in pictures if picture % 2 == 0]
