"""Diffusion of discrete data, where noise is a mask (chapter 11).

Letters cannot be mixed with Gaussian noise and stay letters. So the forward process hides them: at time t
each token is replaced by a mask with probability t, alone and once for all (Austin et al. 2021, D3PM with an
absorbing
state; Sahoo et al. 2024; Shi et al. 2024). What was not hidden is as it was. A denoiser looks at the rest and
gives, for every place, the probability of every token::

    denoise(x_t) -> log p(x0 at that place | x_t), (B, L, K)

It need not know t: given what is left to see, t says nothing about what is hidden.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MASK = -1
"""The number that stands for a hidden token; tokens are 0 to K - 1."""

Denoise = Callable[[Tensor], Tensor]
"""From tokens (B, L), some of them hidden, to log-probabilities (B, L, K)."""


def mask(x: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of ``q(x_t | x0)``: each token hidden with probability t.

    Args:
        x: tokens (B, L) int64.
        t: times in [0, 1], (B,) or ().
        generator: source of chance.
    """
    hidden = torch.rand(x.shape, generator=generator) < t.reshape(-1, 1)
    return x.masked_fill(hidden, MASK)


def masked_loss(denoise: Denoise, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An estimate of the bound on ``-log p(x)``, in nats for each sequence (Sahoo et al. 2024).

    The cross-entropy of the hidden tokens, over t. For the exact denoiser its mean *is* ``-log p(x)``.

    Args:
        denoise: from tokens to log-probabilities.
        x: tokens (B, L) int64.
        generator: source of times and masks. The times are one in each B-th of [0, 1], moved together.

    Returns:
        (B,); its mean over a batch is the loss to train on.
    """
    n = len(x)
    t = (torch.randperm(n, generator=generator) + torch.rand(1, generator=generator)) / n  # (B,)
    t = t.clamp(min=1e-4)
    x_t = mask(x, t, generator)
    said = denoise(x_t).gather(2, x[:, :, None])[:, :, 0]  # log-probability of the truth, (B, L)
    return -(said * (x_t == MASK)).sum(1) / t


def unmask(
    denoise: Denoise, n: int, length: int, steps: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Sample: start with all hidden, and show some in each step.

    From t to s a hidden token is shown with probability ``(t - s) / t``, drawn from what the denoiser says
    of its
    place. Tokens that are shown in the same step are drawn independently, which is right only as steps grow
    many.

    Args:
        denoise: from tokens to log-probabilities.
        n: sequences.
        length: tokens of each.
        steps: number of steps, of equal length in t.
        generator: source of chance.

    Yields:
        (n, length) int64 after every step; nothing is hidden in the last.
    """
    x = torch.full((n, length), MASK)
    for step in range(steps):
        share = 1 / (steps - step)  # (t - s) / t
        probabilities = denoise(x).exp()  # (n, length, K)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(n, length)
        shown = (torch.rand(x.shape, generator=generator) < share) & (x == MASK)
        x = torch.where(shown, drawn, x)
        yield x


class FiniteLanguage:
    """A language of a few sentences, and what follows from it exactly.

    Args:
        sentences: (N, L) int64, all different, tokens from 0.
        weights: (N,) how often each occurs, scaled to sum to 1.
    """

    def __init__(self, sentences: Tensor, weights: Tensor):
        self.sentences = sentences
        self.log_weights = (weights.double() / weights.double().sum()).log()
        self.tokens = int(sentences.max()) + 1

    def denoise(self, x_t: Tensor) -> Tensor:
        """``log p(x0 at each place | x_t)``: the share of each token among the sentences that fit what is
        seen.

        Args:
            x_t: (B, L) int64, hidden tokens are :data:`MASK`. Where no sentence fits, every token is as
                likely.

        Returns:
            (B, L, K) float64.
        """
        fits = ((x_t[:, None] == self.sentences) | (x_t[:, None] == MASK)).all(2)  # (B, N)
        weights = fits * self.log_weights.exp()
        one_hot = torch.nn.functional.one_hot(self.sentences, self.tokens).double()  # (N, L, K)
        counts = torch.einsum("bn,nlk->blk", weights, one_hot)
        counts = torch.where(fits.any(1)[:, None, None], counts, 1.0)
        return (counts / counts.sum(2, keepdim=True)).log()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` sentences (n, L)."""
        return self.sentences[torch.multinomial(self.log_weights.exp(), n, True, generator=generator)]

    def shares(self, x: Tensor) -> Tensor:
        """The share of each sentence in ``x`` (B, L), (N,); what is no sentence counts nowhere."""
        return (x[:, None] == self.sentences).all(2).double().mean(0)
