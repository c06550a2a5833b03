"""Masks as noise: against enumeration, where everything can be counted."""

import math
from itertools import product

import pytest
import torch

from minidiff.masking import MASK, FiniteLanguage, mask, masked_loss, unmask

SENTENCES = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 1, 1], [2, 0, 1], [2, 1, 2]])
WEIGHTS = torch.tensor([4.0, 1.0, 2.0, 2.0, 1.0])


@pytest.fixture
def language() -> FiniteLanguage:
    return FiniteLanguage(SENTENCES, WEIGHTS)


def test_each_token_is_hidden_with_probability_t():
    x = torch.arange(3).repeat(4000, 20)[:, :40]
    x_t = mask(x, torch.linspace(0, 1, 4000), torch.Generator().manual_seed(0))
    hidden = (x_t == MASK).double()
    assert hidden.mean(1)[:1].item() == 0
    assert hidden.mean(1)[-1].item() == 1
    assert hidden[1000:3000].mean().item() == pytest.approx(0.5, abs=0.01)
    assert hidden[:1000].mean().item() == pytest.approx(0.125, abs=0.01)
    assert (x_t[x_t != MASK] == x[x_t != MASK]).all()
    both = (hidden[:, 0] * hidden[:, 1]).mean()  # independent: the mean of t²
    assert both.item() == pytest.approx(1 / 3, abs=0.02)


def test_the_posterior_counts_sentences(language):
    """Given a first token 2, two sentences are left, of weights 2 and 1."""
    probabilities = language.denoise(torch.tensor([[2, MASK, MASK]])).exp()[0]
    assert probabilities[0].tolist() == [0, 0, 1]
    assert probabilities[1].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert probabilities[2].tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    nothing = language.denoise(torch.tensor([[1, 0, MASK]])).exp()[0]
    assert nothing[2].tolist() == pytest.approx([1 / 3] * 3)


def test_with_the_exact_denoiser_the_bound_is_the_likelihood(language):
    """The mean over all masks, by enumeration, integrated over t by hand."""
    for sentence, weight in zip(SENTENCES, WEIGHTS, strict=True):
        exact = 0.0
        for hidden in product([False, True], repeat=3):
            m = sum(hidden)
            if m == 0:
                continue
            # Integral of t^(m-1) (1-t)^(3-m) over [0, 1]: a Beta function.
            integral = math.factorial(m - 1) * math.factorial(3 - m) / math.factorial(3)
            x_t = sentence.masked_fill(torch.tensor(hidden), MASK)[None]
            said = language.denoise(x_t)[0].gather(1, sentence[:, None])[:, 0]
            exact -= integral * float(said[torch.tensor(hidden)].sum())
        assert exact == pytest.approx(-float((weight / WEIGHTS.sum()).log()), abs=1e-5)


def test_the_loss_estimates_the_entropy(language):
    x = language.sample(200_000, torch.Generator().manual_seed(0))
    p = WEIGHTS / WEIGHTS.sum()
    found = masked_loss(language.denoise, x, torch.Generator().manual_seed(1)).mean().item()
    assert found == pytest.approx(-(p * p.log()).sum().item(), rel=0.01)


def test_a_worse_denoiser_pays(language):
    x = language.sample(50_000, torch.Generator().manual_seed(0))

    def blurred(x_t):
        return (0.5 * language.denoise(x_t).exp() + 0.5 / 3).log()

    worse = masked_loss(blurred, x, torch.Generator().manual_seed(1)).mean()
    assert worse > masked_loss(language.denoise, x, torch.Generator().manual_seed(1)).mean() + 0.3


def test_many_steps_sample_the_language_and_one_step_does_not(language):
    exact = (WEIGHTS / WEIGHTS.sum()).double()
    gaps = {}
    for steps in (1, 4, 64):
        *_, x = unmask(language.denoise, 40_000, 3, steps, torch.Generator().manual_seed(0))
        assert (x != MASK).all()
        shares = language.shares(x)
        gaps[steps] = float((shares - exact).abs().sum() / 2 + (1 - shares.sum()) / 2)
    assert gaps[64] < 0.02 < gaps[4] < gaps[1]
    # In one step every place is drawn alone: the product of the marginals, (0, 1, 2) with 0.5 * 0.7 * 0.5.
    *_, x = unmask(language.denoise, 40_000, 3, 1, torch.Generator().manual_seed(0))
    assert language.shares(x)[0].item() == pytest.approx(0.5 * 0.7 * 0.5, abs=0.01)


def test_half_of_the_tokens_are_shown_in_the_first_of_two_steps(language):
    first, last = unmask(language.denoise, 10_000, 3, 2, torch.Generator().manual_seed(0))
    assert (first == MASK).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (last[first != MASK] == first[first != MASK]).all()
