import numpy as np
import pytest
import torch
from networks import D, T, condition, randn

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


def test_take_names_rows_in_any_order():
    full = condition()
    taken = full.take([2, 0, 0])
    for part, whole in zip(taken, full, strict=True):
        assert torch.equal(part, whole[torch.tensor([2, 0, 0])])
    assert torch.equal(full.take(torch.tensor([1])).pooled, full.pooled[1:2])


# --- labels ----------------------------------------------------------------------------------------


def test_a_label_is_one_token_and_its_summary():
    torch.manual_seed(0)
    encoder = md.LabelEncoder(5, D)
    table = encoder.embedding.weight
    c = encoder(encoder.ids([3, None, 0, -1]))
    assert c.tokens.shape == (4, 1, D)
    assert c.mask[:, 0].tolist() == [True, False, True, False]
    assert torch.equal(c.pooled[0], table[3])
    assert torch.equal(c.pooled[2], table[0])
    assert (c.pooled[[1, 3]] == 0).all()
    assert torch.equal(c.tokens[:, 0], c.pooled)
    assert isinstance(encoder, md.Encoder)


@pytest.mark.parametrize("label", [5, -2, 1.5, "cat"])
def test_a_label_that_is_no_class_is_named(label):
    with pytest.raises(ValueError, match=f"label {label!r}: give whole numbers from 0 to 4"):
        md.LabelEncoder(5).ids([0, label])
    if isinstance(label, int):  # numbers pass for ids, and are still looked at
        encoder = md.LabelEncoder(5)
        with pytest.raises(ValueError, match=f"label {label!r}: give whole numbers from 0 to 4"):
            encoder(torch.tensor([0, label]))
    with pytest.raises(ValueError, match="num_classes = 0: use at least 1"):
        md.LabelEncoder(0)


@pytest.mark.parametrize("labels", [list, torch.tensor, np.array])
def test_labels_train_a_model_that_is_saved_guided_and_loaded(labels, tmp_path):
    """Two classes on two sides; the label says which, and no label leaves both."""
    torch.manual_seed(0)
    encoder = md.LabelEncoder(2, 16)
    model = md.Diffusion(md.MLP(1, 32, condition_dim=16), md.Cosine(), "v", encoder, shape=(1,))
    sides = [i % 2 for i in range(64)]
    x0 = 2.0 * torch.tensor(sides)[:, None] - 1 + 0.1 * torch.randn(64, 1)
    for step in md.train(model, [{"x0": x0, "label": labels(sides)}], 400, lr=1e-2, ema_decay=0.98):
        pass
    step.ema.save_pretrained(tmp_path)
    loaded = md.Diffusion.from_pretrained(tmp_path)
    levels = loaded.schedule.levels(20)
    x = md.noise((64, 1), levels[0], generator=md.generators(0, 64))
    for label, sign in ((0, -1), (1, 1)):
        for denoise in (
            md.guide(loaded.denoise, loaded.encode([label]), 1.0),
            md.guide(loaded.denoise, loaded.encode([label]), 2.0),
        ):
            assert (md.sample(md.ddim(denoise, x, levels)).sign() == sign).float().mean() > 0.97
    free = md.sample(md.ddim(loaded.denoise, x, levels)).sign()
    assert 0.25 < (free > 0).double().mean() < 0.75
