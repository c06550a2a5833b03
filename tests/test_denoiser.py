import json
import math
import pickle

import pytest
import torch
from helpers import SCHEDULES, full_disk
from safetensors.torch import load_file
from torch import Tensor, nn

import minidiff as md
from minidiff.denoiser.layers import Attention, Embedding, image_positions

D, T = 8, 5  # width and length of the conditions here
NETWORKS = {
    "UNet": lambda condition_dim=D: md.UNet(
        2, 32, (1, 2), blocks=1, patch=2, attention=(1,), condition_dim=condition_dim
    ),
    "DiT": lambda condition_dim=D: md.DiT(2, 64, depth=2, patch=2, condition_dim=condition_dim),
    "MLP": lambda condition_dim=D: md.MLP(3, 32, depth=2, condition_dim=condition_dim),
}
SHAPES = {"UNet": (2, 4, 8), "DiT": (2, 4, 8), "MLP": (3,)}
all_networks = pytest.mark.parametrize("name", NETWORKS)
image_networks = pytest.mark.parametrize("name", ["UNet", "DiT"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(net: nn.Module) -> nn.Module:
    """As after some training: no parameter is zero any more. float64, so that only mathematics counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.double().eval()


def batch(name: str, n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(n, *SHAPES[name], seed=seed), torch.linspace(0.1, 0.9, n, dtype=torch.float64)


def condition(n: int = 3, seed: int = 5) -> md.Condition:
    mask = torch.arange(T) < torch.tensor([3, 5, 1])[torch.arange(n) % 3, None]  # lengths 3, 5, 1
    return md.Condition(randn(n, T, D, seed=seed), mask, randn(n, D, seed=seed + 1))


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
    idle = [
        key for key, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12
    ]
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
            expected = [
                f(frequency * place) for place in (row, column) for f in (math.sin, math.cos)
            ]
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


def test_the_unet_is_told_the_place_only_if_asked_for():
    """Far from the edges a convolution sees the same everywhere, and attention asks for no place."""
    outs = {}
    for places in (False, True):
        torch.manual_seed(0)
        net = perturbed(md.UNet(1, 32, (1,), patch=1, attention=(0,), places=places))
        assert net.config["places"] is places
        out = net(torch.ones(1, 1, 48, 48, dtype=torch.float64), torch.tensor([0.5]))
        outs[places] = out[0, 0, 22:26, 22:26].flatten()
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
        (
            "UNet",
            (1, 3, 4, 8),
            r"x has shape \(1, 3, 4, 8\): this network takes \(B, 2, H, W\) .* of 4",
        ),
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
        (
            lambda: md.UNet(multipliers=(1, 2), attention=(2,)),
            r"attention = \(2,\) names a level outside",
        ),
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
        (
            lambda: md.Diffusion(md.MLP(), md.Flow(), "score"),
            "unknown target 'score': choose one of eps,",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_captions_need_a_text_encoder():
    model = md.Diffusion(NETWORKS["MLP"](), md.Cosine())
    with pytest.raises(ValueError, match="no text encoder, so it cannot follow \\['a cat'\\]"):
        model.denoise(torch.zeros(1, 3), md.Cosine()(0.5), ["a cat"])


# --- Diffusion -------------------------------------------------------------------------------------


class Spy(nn.Module):
    """Records what the network is asked, and answers with a function of it."""

    def __init__(self, answer=lambda x, t: torch.zeros_like(x)):
        super().__init__()
        self.anchor, self.answer = nn.Parameter(torch.zeros((), dtype=torch.float64)), answer

    def forward(self, x: Tensor, t: Tensor, condition: md.Condition | None = None) -> Tensor:
        self.x, self.t, self.condition = x, t, condition
        return self.answer(x, t) + self.anchor


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_network_sees_inputs_of_unit_variance(name):
    """For data of variance 1; a schedule that preserves variance is left alone."""
    spy, schedule = Spy(), SCHEDULES[name]
    x_t, t = randn(3, 2), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    level = schedule(t)
    md.Diffusion(spy, schedule, "v").denoise(x_t, level)
    spread = (level.alpha**2 + level.sigma**2).sqrt()[:, None]
    torch.testing.assert_close(spy.x, x_t / spread)
    torch.testing.assert_close(spy.t, t.float())
    md.Diffusion(spy, schedule, "v").denoise(x_t, schedule(0.25))  # one level for all
    assert spy.t.tolist() == [0.25] * 3


def test_drop_reaches_the_network():
    spy = Spy()
    md.Diffusion(spy, md.Flow())(
        randn(3, 2), md.Flow()(0.5), condition(), torch.tensor([True, False, False])
    )
    assert spy.condition.mask.sum(1).tolist() == [0, 5, 1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_denoise_undoes_the_target(name, target):
    """A network that outputs the true target makes a denoiser that finds x0 and eps."""
    schedule = SCHEDULES[name]
    x0, eps = randn(4, 2), randn(4, 2, seed=1)
    level = schedule(torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64))
    x_t = md.diffuse(x0, eps, level)
    spy = Spy(lambda x, t: md.to_target(x0, eps, level, target))
    found = md.Diffusion(spy, schedule, target).denoise(x_t, level)
    torch.testing.assert_close(found.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.eps, eps, rtol=1e-9, atol=1e-9)


def test_denoise_answers_in_the_dtype_of_the_question():
    """Samplers work in float64, networks in float32: the conversion happens here."""
    model = md.Diffusion(NETWORKS["MLP"](), md.Cosine(), "v")
    for dtype in (torch.float32, torch.float64):
        x0, eps = model.denoise(torch.zeros(2, 3, dtype=dtype), md.Cosine()(0.5))
        assert x0.dtype == eps.dtype == dtype


# --- save and load ---------------------------------------------------------------------------------


def trained(name: str, schedule: md.Schedule | None = None, target: str = "v") -> md.Diffusion:
    net = perturbed(NETWORKS[name]()).float()
    return md.Diffusion(net, schedule or md.Cosine(), target, shape=SHAPES[name])  # type: ignore[arg-type]


@all_networks
@pytest.mark.parametrize(
    "schedule,target",
    [(md.Cosine(0.02), "v"), (md.Linear(steps=77), "eps"), (md.Karras(0.01), "x0"), (md.Flow(), "flow")],
    ids=["cosine", "linear", "karras", "flow"],
)  # fmt: skip
def test_save_and_load_is_bitwise(name, schedule, target, tmp_path):
    model = trained(name, schedule, target)
    model.save_pretrained(tmp_path / "model")
    again = md.Diffusion.from_pretrained(tmp_path / "model")
    assert again.schedule == schedule
    assert again.target == target
    assert again.shape == SHAPES[name]
    assert type(again.net) is type(model.net)
    assert again.net.config == model.net.config
    weights = again.state_dict()
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    x = torch.randn(3, *SHAPES[name])
    c, level = condition().to(x), schedule(0.6)
    assert torch.equal(again.denoise(x, level, c).x0, model.denoise(x, level, c).x0)
    again.save_pretrained(tmp_path / "copy")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_a_loaded_model_is_ready_to_sample(tmp_path):
    trained("UNet").train().save_pretrained(tmp_path)
    model = md.Diffusion.from_pretrained(tmp_path)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_half_precision_files(tmp_path):
    model = trained("UNet")
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    again = md.Diffusion.from_pretrained(tmp_path / "half").state_dict()
    for key, value in model.state_dict().items():
        assert again[key].dtype == torch.float32
        assert torch.equal(again[key], value.half().float())


def test_nothing_is_pickled(tmp_path, monkeypatch):
    trained("MLP").save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "minidiff-1"
    assert load_file(tmp_path / "model.safetensors")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in [
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    md.Diffusion.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_model(tmp_path):
    trained("MLP").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(), pytest.raises(OSError, match="too large"):
        trained("MLP", md.Flow(), "flow").save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    trained("MLP", md.Flow(), "flow").save_pretrained(
        tmp_path
    )  # replaces the model, keeps other files
    assert md.Diffusion.from_pretrained(tmp_path).target == "flow"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(before)


def test_others_may_read_a_saved_model(tmp_path):
    """With the rights that any new file gets, not with those of a temporary one."""
    trained("MLP").save_pretrained(tmp_path / "model")
    (tmp_path / "plain").write_text("")
    for file in (tmp_path / "model").iterdir():
        assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_network_from_elsewhere_cannot_be_described(tmp_path):
    class MLP(md.MLP):
        pass

    for net in (nn.Linear(2, 2), MLP()):
        with pytest.raises(ValueError, match=r"cannot describe a (Linear|MLP) in config.json"):
            md.Diffusion(net, md.Flow()).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no model 'crittters': not a folder, not shipped"
    ) as error:
        md.Diffusion.from_pretrained("crittters")
    assert "\n" not in str(error.value)
    with pytest.raises(
        FileNotFoundError, match="holds no model: config.json and model.safetensors"
    ):
        md.Diffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda config: "{not json",
        lambda config: json.dumps({"architectures": ["UNet2DModel"]}),
        lambda config: json.dumps(config | {"net": {"name": "VNet"}}),
        lambda config: json.dumps(config | {"net": config["net"] | {"dims": 3}}),
        lambda config: json.dumps(config | {"schedule": {"name": "Quadratic"}}),
        lambda config: json.dumps({k: v for k, v in config.items() if k != "target"}),
        lambda config: json.dumps({k: v for k, v in config.items() if k != "text"}),
    ],
    ids=["not json", "foreign", "net", "net argument", "schedule", "no target", "no text"],
)
def test_a_config_of_another_kind_is_refused_in_one_line(break_it, tmp_path):
    trained("MLP").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(break_it(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=r".") as error:
        md.Diffusion.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value) or "unknown schedule" in str(error.value)


def test_a_hub_id_is_fetched_and_failures_are_one_line(tmp_path, monkeypatch):
    trained("MLP").save_pretrained(tmp_path)
    asked = []

    def hub(name, allow_patterns):
        asked.append(name)
        assert not any("bin" in pattern or "pt" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert md.Diffusion.from_pretrained("someone/model").target == "v"
    assert asked == ["someone/model"]

    def offline(name, allow_patterns):
        raise ConnectionError("no route to host\nand a long traceback")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"someone/model.*\(no route to host\)") as error:
        md.Diffusion.from_pretrained("someone/model")
    assert "\n" not in str(error.value)


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
    attention.out_proj.weight.data, attention.out_proj.bias.data = (
        mine.out.weight.data,
        mine.out.bias.data,
    )

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
