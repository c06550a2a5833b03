import json
import math

import pytest
import torch
from networks import (
    NETWORKS,
    SHAPES,
    D,
    T,
    all_networks,
    batch,
    condition,
    image_networks,
    perturbed,
    randn,
    trained,
)
from torch import nn

import minidiff as md
from minidiff.denoiser.layers import Attention, Embedding, image_positions

# --- networks --------------------------------------------------------------------------------------


@all_networks
def test_the_output_starts_at_zero(name):
    """The last layer starts at zero, so the first guess is the mean of the target, not noise."""
    net = NETWORKS[name]()
    x, t = (part.float() for part in batch(name))
    for c in (None, condition().to(x)):
        out = net(x, t, c)
        assert out.shape == x.shape
        assert (out == 0).all()


@all_networks
def test_every_parameter_matters(name):
    """A branch that is built but not wired in gets no gradient."""
    net = perturbed(NETWORKS[name]())
    x, t = batch(name)
    (net(x, t, condition()) * randn(*x.shape, seed=9)).sum().backward()
    idle = [key for key, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert not idle


@all_networks
def test_time_matters(name):
    """Also between neighbours of DDPM's thousand steps."""
    net = perturbed(NETWORKS[name](None))
    x, _ = batch(name, 1)
    for a, b in [(0.1, 0.9), (0.500, 0.501)]:
        outs = [net(x, torch.full((1,), t, dtype=torch.float64)) for t in (a, b)]
        assert (outs[0] - outs[1]).abs().max() > 1e-4


@all_networks
def test_the_condition_matters(name):
    net = perturbed(NETWORKS[name]())
    x, t = batch(name)
    c = condition()
    plain = net(x, t, c)
    other_pooled = net(x, t, c._replace(pooled=-c.pooled))
    other_tokens = net(x, t, c._replace(tokens=-c.tokens))
    for i in range(3):
        assert (plain[i] - other_pooled[i]).abs().max() > 1e-4
        changed = (plain[i] - other_tokens[i]).abs().max()
        assert changed == 0 if name == "MLP" else changed > 1e-4  # the MLP uses the vector alone


@all_networks
def test_a_dropped_condition_is_no_condition(name):
    net = perturbed(NETWORKS[name]())
    x, t = batch(name)
    dropped = condition().drop(torch.tensor([True, False, True]))
    without, partly, fully = net(x, t, None), net(x, t, dropped), net(x, t, condition())
    for i in (0, 2):
        torch.testing.assert_close(partly[i], without[i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(partly[1], fully[1], rtol=1e-12, atol=1e-12)
    assert (fully[0] - without[0]).abs().max() > 1e-4


@all_networks
def test_padding_changes_nothing(name):
    """Whatever stands behind the mask: the same caption in a longer batch is the same condition."""
    net = perturbed(NETWORKS[name]())
    x, t = batch(name)
    c = condition()
    garbage = torch.where(c.mask[:, :, None], c.tokens, 1e3)
    padded = md.Condition(
        torch.cat([garbage, 1e3 * randn(3, 4, D, seed=3)], 1),
        torch.cat([c.mask, torch.zeros(3, 4).bool()], 1),
        c.pooled,
    )
    torch.testing.assert_close(net(x, t, padded), net(x, t, c), rtol=1e-11, atol=1e-11)


@image_networks
def test_tokens_are_a_set(name):
    """Attention knows no order: what order means is the text encoder's business. Tokens and mask move
    together, so this also sees a mask laid on the wrong tokens."""
    net = perturbed(NETWORKS[name]())
    x, t = batch(name)
    c = condition()
    order = torch.tensor([4, 2, 0, 3, 1])
    moved = md.Condition(c.tokens[:, order], c.mask[:, order], c.pooled)
    torch.testing.assert_close(net(x, t, moved), net(x, t, c), rtol=1e-11, atol=1e-11)
    wrong = net(x, t, c._replace(mask=c.mask[:, order]))
    assert (wrong - net(x, t, c)).abs().max() > 1e-4


@all_networks
def test_a_sample_does_not_depend_on_its_batch(name):
    net = perturbed(NETWORKS[name]())
    x, t = batch(name)
    c = condition()
    together = net(x, t, c)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], md.Condition(*(part[i : i + 1] for part in c)))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-11)


def test_patches_of_the_transformer_stay_where_they_are():
    """Without blocks, a DiT treats each patch alone: a pixel may change its own patch only. Rows and
    columns mixed up, or the folding and unfolding of patches, would show on an oblong image."""
    net = perturbed(md.DiT(2, 64, depth=0, patch=2))
    x, t = randn(1, 2, 4, 8), torch.tensor([0.5])
    plain = net(x, t)
    for row, column in [(0, 0), (1, 5), (3, 6)]:
        moved = x.clone()
        moved[0, 1, row, column] += 1
        changed = ((net(moved, t) - plain).abs() > 1e-9).any(1)[0].nonzero()
        r, c = row // 2 * 2, column // 2 * 2
        assert changed.tolist() == [[r, c], [r, c + 1], [r + 1, c], [r + 1, c + 1]]


def test_the_transformer_knows_where_a_patch_is():
    net = perturbed(md.DiT(2, 64, depth=0, patch=2))
    out = net(torch.ones(1, 2, 8, 4, dtype=torch.float64), torch.tensor([0.5]))
    patches = out.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(8, -1)
    assert (torch.cdist(patches, patches) + torch.eye(8) > 1e-6).all()


def test_image_positions_are_sines_of_row_and_column():
    codes = image_positions(3, 5, 16).reshape(3, 5, 16)
    for k in range(4):
        frequency = 100 ** (-k / 3)
        for row, column in [(0, 0), (2, 4), (1, 3)]:
            expected = [f(frequency * place) for place in (row, column) for f in (math.sin, math.cos)]
            assert codes[row, column, k::4].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["UNet", "DiT"])
def test_one_network_takes_images_of_any_size(name):
    net = perturbed(NETWORKS[name]())
    for size in [(4, 4), (8, 12)]:
        x = randn(1, 2, *size)
        assert net(x, torch.tensor([0.5])).shape == x.shape


def test_the_unet_sees_the_whole_image():
    """At its lowest level positions attend to each other: a corner reaches the opposite corner."""
    net = perturbed(md.UNet(1, 32, (1, 1), blocks=1, patch=1, attention=(1,)))
    x = randn(1, 1, 32, 32)
    moved = x.clone()
    moved[0, 0, 0, 0] += 1
    t = torch.tensor([0.5])
    assert (net(moved, t) - net(x, t))[0, 0, -1, -1].abs() > 1e-9


def test_the_unet_is_told_positions_only_if_asked_for():
    """Far from the edges a convolution sees the same everywhere, and attention asks for no place."""
    outs = {}
    for positions in (False, True):
        torch.manual_seed(0)
        net = perturbed(md.UNet(1, 32, (1,), patch=1, attention=(0,), positions=positions))
        assert net.config["positions"] is positions
        out = net(torch.ones(1, 1, 48, 48, dtype=torch.float64), torch.tensor([0.5]))
        outs[positions] = out[0, 0, 22:26, 22:26].flatten()
    assert outs[False].max() - outs[False].min() < 1e-9
    assert outs[True].unique().numel() == 16


# --- how a network listens to its condition --------------------------------------------------------

mechanisms = pytest.mark.parametrize("conditioning", ["both", "pooled", "tokens"])


def listener(name: str, conditioning: str) -> nn.Module:
    """As in NETWORKS, with a mechanism. The same seed, so shared parameters have the same values."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    return perturbed(type(net)(**net.config | {"conditioning": conditioning}))


@image_networks
@mechanisms
def test_a_network_hears_what_it_listens_to_and_nothing_else(name, conditioning):
    """Deaf to the bit: the pooled vector, the tokens, their order, and how many there are."""
    net = listener(name, conditioning)
    x, t = batch(name)
    c, other = condition(), condition(seed=50)
    plain = net(x, t, c)
    vector = (net(x, t, c._replace(pooled=other.pooled)) - plain).abs().amax((1, 2, 3))
    tokens = (net(x, t, c._replace(tokens=other.tokens)) - plain).abs().amax((1, 2, 3))
    masked = (net(x, t, c._replace(mask=c.mask.flip(1))) - plain).abs().amax((1, 2, 3))
    assert (vector > 1e-4).all() if conditioning != "tokens" else (vector == 0).all()
    assert (tokens > 1e-4).all() if conditioning != "pooled" else (tokens == 0).all()
    many = torch.tensor([0, 2])  # the second sample has all its tokens, so its mask is the same
    assert (masked[many] > 1e-4).all() if conditioning != "pooled" else (masked == 0).all()


@image_networks
@mechanisms
def test_weights_are_there_for_what_is_listened_to(name, conditioning):
    """And every one of them is used."""
    net = listener(name, conditioning)
    keys = list(net.state_dict())
    assert any("token_key_value" in key for key in keys) == (conditioning != "pooled")
    assert any("embedding.pooled" in key for key in keys) == (conditioning != "tokens")
    x, t = batch(name)
    (net(x, t, condition()) * randn(*x.shape, seed=9)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-12 for p in net.parameters())


@image_networks
@mechanisms
def test_a_dropped_condition_is_no_condition_to_every_mechanism(name, conditioning):
    net = listener(name, conditioning)
    x, t = batch(name)
    dropped = condition().drop(torch.tensor([True, False, True]))
    without, partly, fully = net(x, t, None), net(x, t, dropped), net(x, t, condition())
    for i in (0, 2):
        torch.testing.assert_close(partly[i], without[i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(partly[1], fully[1], rtol=1e-12, atol=1e-12)
    assert ((fully - without).abs().amax((1, 2, 3)) > 1e-4).all()


@image_networks
@mechanisms
def test_the_mechanism_is_saved(name, conditioning, tmp_path):
    net = listener(name, conditioning).float()
    md.Diffusion(net, md.Cosine(), "v").save_pretrained(tmp_path)
    again = md.Diffusion.from_pretrained(tmp_path).net
    assert again.config == net.config
    assert again.config["conditioning"] == conditioning
    x, t = (part.float() for part in batch(name))
    c = condition().to(x)
    assert torch.equal(again(x, t, c), net(x, t, c))


@image_networks
def test_a_config_from_before_the_mechanisms_means_both(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["net"].pop("conditioning") == "both"
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = md.Diffusion.from_pretrained(tmp_path)
    x = torch.randn(3, *SHAPES[name])
    c, level = condition().to(x), md.Cosine()(0.6)
    assert torch.equal(again.denoise(x, level, c).x0, model.denoise(x, level, c).x0)


@image_networks
@mechanisms
def test_every_mechanism_names_a_condition_that_does_not_fit(name, conditioning):
    """Either part of it, whether the network looks at that part or not."""
    net = listener(name, conditioning)
    x, t = batch(name)
    for part in ("pooled", "tokens"):
        wide = condition()._replace(**{part: getattr(condition(), part).repeat_interleave(2, -1)})
        with pytest.raises(ValueError, match=r"^the condition is 16 wide, .*condition_dim is 8$"):
            net(x, t, wide)
    deaf = type(net)(**net.config | {"condition_dim": None})
    with pytest.raises(ValueError, match="this network takes no condition"):
        deaf(x.float(), t.float(), condition().to(x.float()))


# --- layers against formulas -----------------------------------------------------------------------


def test_attention_is_one_softmax_over_positions_and_tokens():
    layer = Attention(64, D, head_width=32).double()
    nn.init.normal_(layer.out.weight, generator=torch.Generator().manual_seed(0))
    x, c = randn(3, 6, 64), condition()
    out = layer(x, c)
    for b in range(3):
        tokens = c.tokens[b][c.mask[b]]
        keys_values = torch.cat([layer.key_value(x[b]), layer.token_key_value(tokens)])
        heads = []
        for h in range(2):
            part = slice(32 * h, 32 * h + 32)
            key, value = keys_values[:, :64][:, part], keys_values[:, 64:][:, part]
            query = layer.query(x[b])[:, part]
            weight = torch.exp(query @ key.T / 32**0.5)
            heads.append(weight @ value / weight.sum(1, keepdim=True))
        torch.testing.assert_close(out[b], layer.out(torch.cat(heads, 1)))


def test_embedding_of_time_is_made_of_sines():
    layer = Embedding(16, None)
    taken = []
    layer.time.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    layer(torch.tensor([0.0, 0.3]), None)
    frequencies = [10 ** (3 * k / 31) for k in range(32)]  # 1 to 1000
    expected = [math.sin(0.3 * f) for f in frequencies] + [math.cos(0.3 * f) for f in frequencies]
    assert taken[0][1].tolist() == pytest.approx(expected, abs=1e-4)
    assert taken[0][0].tolist() == [0.0] * 32 + [1.0] * 32


def test_no_condition_adds_nothing_to_the_embedding():
    layer, t = Embedding(16, D), torch.rand(3)
    zero = md.Condition(torch.zeros(3, 1, D), torch.zeros(3, 1).bool(), torch.zeros(3, D))
    assert torch.equal(layer(t, None), layer(t, zero))


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,shape,message",
    [
        ("UNet", (1, 3, 4, 8), r"x has shape \(1, 3, 4, 8\): this network takes \(B, 2, H, W\) .* of 4"),
        ("UNet", (1, 2, 4, 6), r"x has shape \(1, 2, 4, 6\): .* multiples of 4"),
        ("UNet", (2, 4, 8), r"x has shape \(2, 4, 8\)"),
        ("DiT", (1, 2, 4, 7), r"x has shape \(1, 2, 4, 7\): .* multiples of 2"),
        ("MLP", (1, 4), r"x has shape \(1, 4\): this network takes \(B, 3\)"),
        ("MLP", (3,), r"x has shape \(3,\)"),
    ],
)
def test_wrong_shapes_are_named_in_one_line(name, shape, message):
    model = md.Diffusion(NETWORKS[name](), md.Cosine())
    with pytest.raises(ValueError, match=message) as error:
        model.denoise(torch.zeros(shape), md.Cosine()(0.5))
    assert "\n" not in str(error.value)


@all_networks
def test_a_condition_of_the_wrong_width_is_named(name):
    model = md.Diffusion(NETWORKS[name](), md.Cosine())
    x = torch.zeros(3, *SHAPES[name])
    wide = md.Condition(torch.zeros(3, T, D + 1), torch.ones(3, T).bool(), torch.zeros(3, D + 1))
    with pytest.raises(ValueError, match="9.*8"):
        model.denoise(x, md.Cosine()(0.5), wide)


@all_networks
def test_a_condition_is_not_ignored_in_silence(name):
    """A network made without condition_dim cannot follow a prompt; to sample as if there were none
    would look like a bad model."""
    model = md.Diffusion(NETWORKS[name](None), md.Cosine())
    with pytest.raises(ValueError, match="condition_dim"):
        model.denoise(torch.zeros(3, *SHAPES[name]), md.Cosine()(0.5), condition())


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: md.UNet(width=40), "width = 40 is not a multiple of 32"),
        (lambda: md.UNet(multipliers=(1, 2), attention=(2,)), r"attention = \(2,\) names a level outside"),
        (lambda: md.DiT(width=100), "width = 100 is not a multiple of 64"),
        (
            lambda: md.UNet(conditioning="film"),  # type: ignore[arg-type]
            "unknown conditioning 'film': choose one of both, pooled, tokens",
        ),
        (
            lambda: md.DiT(conditioning=None),  # type: ignore[arg-type]
            "unknown conditioning None: choose one of both, pooled, tokens",
        ),
        (
            lambda: md.UNet(attention=(), condition_dim=D, conditioning="tokens"),
            "conditioning = 'tokens', but no attention is there to look at them",
        ),
        (
            lambda: md.DiT(depth=0, condition_dim=D, conditioning="tokens"),
            "conditioning = 'tokens', but no attention is there to look at them",
        ),
        (lambda: Attention(48, None), "width = 48 is not a multiple of the head width 32"),
        (lambda: md.Diffusion(md.MLP(), md.Flow(), "score"), "unknown target 'score': choose one of eps,"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- blocks, written out ---------------------------------------------------------------------------


def wake(part: nn.Module) -> nn.Module:
    """Random numbers in place of the zeros with which some layers start."""
    for p in part.parameters():
        nn.init.normal_(p, std=0.2)
    return part


def test_a_unet_block_written_out():
    """Norm, SiLU, convolution, twice, with scale and shift after the second norm (FiLM)."""
    from minidiff.denoiser.unet import Block

    torch.manual_seed(0)
    block = wake(Block(16, 32, 8, attend=False, condition_dim=None))
    x, e = torch.randn(2, 16, 6, 6), torch.randn(2, 8)

    def normalised(h, norm):
        parts = h.reshape(2, 8, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (
            parts.var(2, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        weight, bias = norm.weight.reshape(1, -1, 1, 1), norm.bias.reshape(1, -1, 1, 1)
        return parts.reshape(h.shape) * weight + bias

    scale_shift = e @ block.scale_shift.weight.T + block.scale_shift.bias
    scale, shift = scale_shift[:, :32, None, None], scale_shift[:, 32:, None, None]
    h = normalised(x, block.norm1)
    h = nn.functional.conv2d(h * torch.sigmoid(h), block.conv1.weight, block.conv1.bias, padding=1)
    h = normalised(h, block.norm2) * (1 + scale) + shift
    h = nn.functional.conv2d(h * torch.sigmoid(h), block.conv2.weight, block.conv2.bias, padding=1)
    h = h + nn.functional.conv2d(x, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, e, None), h, rtol=1e-4, atol=1e-4)


def test_a_transformer_block_written_out():
    """adaLN (Peebles & Xie 2023, figure 3), with PyTorch's own multi-head attention."""
    from minidiff.denoiser.dit import TransformerBlock

    torch.manual_seed(0)
    block = wake(TransformerBlock(64, None))
    h, e = torch.randn(2, 10, 64), torch.randn(2, 64)
    attention = nn.MultiheadAttention(64, 2, batch_first=True)
    mine = block.attention
    attention.in_proj_weight.data = torch.cat([mine.query.weight, mine.key_value.weight]).data
    attention.in_proj_bias.data = torch.cat([mine.query.bias, mine.key_value.bias]).data
    attention.out_proj.weight.data, attention.out_proj.bias.data = (mine.out.weight.data, mine.out.bias.data)

    def normalised(h):
        return (h - h.mean(2, keepdim=True)) / (h.var(2, correction=0, keepdim=True) + 1e-5).sqrt()

    modulation = (e @ block.modulation.weight.T + block.modulation.bias)[:, None]
    scale1, shift1, gate1, scale2, shift2, gate2 = modulation.split(64, dim=2)
    y = normalised(h) * (1 + scale1) + shift1
    wanted = h + gate1 * attention(y, y, y)[0]
    wanted = wanted + gate2 * block.mlp(normalised(wanted) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(h, e, None), wanted, rtol=1e-4, atol=1e-4)


def test_the_shortcut_adds_the_image_times_a_factor_of_time():
    torch.manual_seed(0)
    net = md.UNet(width=32, multipliers=(1, 1), patch=2, attention=())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9])
    assert net(x, t).abs().max() == 0
    nn.init.normal_(net.shortcut.weight)
    factors = net.shortcut(net.embedding(t, None))  # (2, 3)
    torch.testing.assert_close(net(x, t), factors[:, :, None, None] * x)
    assert not torch.allclose(factors[0], factors[1])
