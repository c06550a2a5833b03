"""Muon against singular value decompositions, against torch's, and in a training run."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn

import minidiff as md
from minidiff.muon import Muon, orthogonal

RATE, DECAY = 0.02, 0.1


@pytest.mark.parametrize("shape", [(40, 40), (64, 200), (200, 64), (48, 32, 3, 3)])
def test_all_directions_of_a_step_are_equally_long(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(1).double()
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    long = torch.linspace(1, 0.02, min(m.shape)).double()  # from one direction to the next, 50 times in all
    (turned,) = orthogonal([(u @ long.diag() @ v).reshape(shape).float()])
    assert turned.shape == shape
    found = u.T @ turned.flatten(1).double() @ v.T  # in the directions of the matrix itself
    assert ((found.diagonal() > 0.6) & (found.diagonal() < 1.3)).all()
    assert (found - found.diagonal().diag()).abs().max() < 0.05


def test_matrices_of_one_shape_do_not_mix():
    random = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, 64, generator=random) for n in (32, 48, 32, 48)]
    for alone, beside in zip(matrices, orthogonal(matrices), strict=True):
        torch.testing.assert_close(orthogonal([alone])[0], beside, atol=0.02, rtol=0.02)


def stepped(make, model, steps=6):
    """The weights after some steps along given gradients."""
    random = torch.Generator().manual_seed(1)
    optimizer = make(model)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random).to(p)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def matrix():
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=False)


def test_a_matrix_moves_as_with_torch():
    before = matrix().weight.detach()
    theirs = partial(
        torch.optim.Muon, lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    (wanted,) = stepped(lambda model: theirs(model.parameters()), matrix())
    (found,) = stepped(lambda model: Muon(model, RATE, weight_decay=DECAY), matrix())
    # Theirs computes in bfloat16, as ours does where that is quicker, and five products round five times.
    assert (found - wanted).norm() < 0.06 * (wanted - before).norm()


def test_a_kernel_moves_as_its_matrix():
    flat, kernel = matrix(), nn.Conv2d(96, 40, 1, bias=False).to(memory_format=torch.channels_last)
    with torch.no_grad():
        kernel.weight.copy_(flat.weight[:, :, None, None])
    make = partial(Muon, lr=RATE, weight_decay=DECAY)
    torch.testing.assert_close(stepped(make, kernel)[0].flatten(1), stepped(make, flat)[0])


def test_what_is_no_matrix_moves_as_with_adamw():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(50, 64), nn.GroupNorm(8, 64), nn.Linear(64, 3))

    options = {"lr": RATE, "weight_decay": DECAY, "betas": (0.9, 0.99), "fused": True}
    wanted = stepped(lambda m: torch.optim.AdamW(m.parameters(), **options), model())
    for mine, theirs in zip(stepped(partial(Muon, **options), model()), wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_a_broken_step_leaves_weights_and_momentum():
    model = matrix()
    optimizer = Muon(model, RATE, fused=True)
    good = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    model.weight.grad = good.clone()
    optimizer.step()
    weight, momentum = model.weight.detach().clone(), optimizer.state[model.weight]["momentum"].clone()
    optimizer.found_inf = torch.ones(())
    model.weight.grad = torch.full_like(good, torch.nan)
    optimizer.step()
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["momentum"], momentum)


def test_a_learning_rate_in_memory_is_read_at_each_step():
    (wanted,) = stepped(partial(Muon, lr=RATE), matrix())
    rate = torch.tensor(RATE)
    (found,) = stepped(lambda model: Muon(model, lr=rate), matrix())
    torch.testing.assert_close(found, wanted)


def run(folder=None, stop=None, **how):
    torch.manual_seed(0)
    model = md.Diffusion(md.MLP(width=32), md.Cosine(), target="v")
    data = (
        torch.randn(64, 2, generator=torch.Generator().manual_seed(k)) for k in range(how.pop("skip", 0), 99)
    )
    steps = md.train(model, data, 12, lr=5e-3, optimizer="muon", resume=folder, **how)
    return list(islice(steps, stop))[-1]


def test_a_run_goes_on_to_the_bit(tmp_path):
    whole = run()
    run(stop=5).save(tmp_path)
    resumed = run(tmp_path, skip=5)
    for a, b in zip(whole.ema.parameters(), resumed.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_of_the_other_optimizer_is_named(tmp_path):
    run(stop=5).save(tmp_path)
    model = md.Diffusion(md.MLP(width=32), md.Cosine(), target="v")
    with pytest.raises(ValueError, match="optimizer"):
        next(iter(md.train(model, iter([torch.randn(8, 2)]), 12, resume=tmp_path)))


def test_an_unknown_optimizer_is_named():
    model = md.Diffusion(md.MLP(width=32), md.Cosine(), target="v")
    with pytest.raises(ValueError, match="unknown optimizer 'sgd': choose one of adamw, muon"):
        next(iter(md.train(model, iter([torch.randn(8, 2)]), 12, optimizer="sgd")))
