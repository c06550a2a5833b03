"""Small text encoders, for the tests of chapters 6 to 8."""

import torch
from torch import nn

import minidiff as md

CAPTIONS = ["a cat in a top hat, on a green background", "two black dogs", "Hat"]


def encode(encoder: md.TextEncoder, captions: list[str]) -> md.Condition:
    """Through the door and on."""
    return encoder(encoder.ids(captions))


def small() -> md.TextEncoder:
    torch.manual_seed(2)
    return md.TextEncoder.from_captions(CAPTIONS, dim=32, layers=1, max_length=12)


def model_with(encoder: md.TextEncoder) -> md.Diffusion:
    torch.manual_seed(3)
    net = md.MLP(2, 32, 1, condition_dim=32)
    nn.init.normal_(net.last.weight)
    return md.Diffusion(net, md.Cosine(), "v", encoder)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def row(condition: md.Condition, i: int) -> md.Condition:
    """Caption i without its padding."""
    return md.Condition(condition.tokens[i][condition.mask[i]], condition.mask[i], condition.pooled[i])
