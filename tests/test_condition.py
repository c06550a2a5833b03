import pytest
import torch
from networks import (
    D,
    T,
    condition,
    randn,
)

import minidiff as md

# --- Condition -------------------------------------------------------------------------------------


def test_drop_removes_tokens_and_vector_of_the_marked_samples_only():
    full = condition()
    dropped = full.drop(torch.tensor([False, True, False]))
    assert dropped.mask.sum(1).tolist() == [3, 0, 1]
    assert (dropped.pooled[1] == 0).all()
    for i in (0, 2):
        assert torch.equal(dropped.pooled[i], full.pooled[i])
        assert torch.equal(dropped.mask[i], full.mask[i])


def test_expand_gives_every_sample_the_one_condition():
    one = md.Condition(*(part[1:2] for part in condition()))
    many = one.expand(4)
    assert many.tokens.shape == (4, T, D)
    assert (many.pooled == one.pooled).all()
    assert torch.equal(many.mask, one.mask.expand(4, T))
    with pytest.raises(ValueError, match="3 conditions for 4 samples: give 1 or 4"):
        condition().expand(4)


def test_cat_pads_with_masked_tokens():
    long, short = condition(), md.Condition(randn(2, 2, D), torch.ones(2, 2).bool(), randn(2, D))
    both = md.Condition.cat([long, short])
    assert both.tokens.shape == (5, T, D)
    assert both.mask.sum(1).tolist() == [3, 5, 1, 2, 2]
    assert torch.equal(both.tokens[3:, :2], short.tokens)
    assert torch.equal(both.pooled, torch.cat([long.pooled, short.pooled]))
