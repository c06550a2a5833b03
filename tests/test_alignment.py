import copy
import json
import warnings

import pytest
import torch
from torch import nn
from transformers import CLIPModel

import minidiff as md
from minidiff.text import CLIP, Alignment, train_clip

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}
CAPTIONS = ["a red square", "a blue square", "green", "a red and blue square"]


def small(size: int = 16) -> CLIP:
    torch.manual_seed(0)
    return CLIP.from_captions(
        CAPTIONS, size=size, patch=4, dim=32, text_layers=1, image_layers=2, max_length=8
    ).eval()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    clip = small()
    for parameter in clip.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return clip.requires_grad_(False)


def pictures(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- one space ------------------------------------------------------------------------------------------


def test_vectors_are_those_of_transformers(clip):
    """Pixels in [-1, 1] are what its processor makes of [0, 255] with mean and std 0.5."""
    x = pictures()
    batch = clip.text.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    out = clip.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=x)
    torch.testing.assert_close(clip.embed_images(x), out.image_embeds)
    torch.testing.assert_close(clip.embed_captions(CAPTIONS), out.text_embeds)
    cosines = (out.image_embeds * out.text_embeds).sum(1)
    torch.testing.assert_close(clip.similarity(x, CAPTIONS), cosines)


def test_the_loss_is_that_of_transformers(clip):
    x = pictures()
    batch = clip.text.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    out = clip.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=x,
        return_loss=True,
    )  # fmt: skip
    torch.testing.assert_close(clip.loss(x, CAPTIONS), out.loss)


def test_equal_captions_are_equally_right(clip):
    """With one caption for all, every picture is right: the best a model can reach is log B."""
    x = pictures()
    same = clip.loss(x[:1].expand(4, -1, -1, -1), ["green"] * 4)
    torch.testing.assert_close(same, torch.tensor(4.0).log())
    a, b = ["green", "a red square", "green"], ["green", "a red square", "a blue square"]
    assert clip.loss(x[:3], a) != clip.loss(x[:3], b)


def test_wrong_captions_join_those_that_a_picture_must_not_choose(clip):
    x, right, wrong = pictures(2), CAPTIONS[:2], CAPTIONS[2:]
    logits = clip.model.logit_scale.exp() * clip.embed_images(x) @ clip.embed_captions(CAPTIONS).T
    of_pictures = -logits.log_softmax(1)[[0, 1], [0, 1]].mean()
    of_captions = -logits[:, :2].log_softmax(0)[[0, 1], [0, 1]].mean()
    torch.testing.assert_close(clip.loss(x, right + wrong), (of_pictures + of_captions) / 2)
    with pytest.raises(ValueError, match="1 captions for 2 pictures: give one each"):
        clip.loss(x, right[:1])


def test_pictures_are_brought_to_size_and_scaled(clip):
    other = CLIP(clip.model, clip.text.tokenizer, mean=(0.2, 0.3, 0.4), std=(0.3, 0.2, 0.1))
    x = pictures()
    pixels = (x + 1) / 2
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.2, 0.3, 0.4), (0.3, 0.2, 0.1)))
    torch.testing.assert_close(
        other.embed_images(x), clip.embed_images((pixels - mean) / std), rtol=1e-4, atol=1e-5
    )
    flat = torch.full((1, 3, 40, 24), 0.3)
    torch.testing.assert_close(clip.embed_images(flat), clip.embed_images(flat[..., :16, :16]))


def test_captions_and_pictures_must_be_as_many(clip):
    with pytest.raises(ValueError, match="3 captions for 4 pictures: give one each"):
        clip.similarity(pictures(), CAPTIONS[:3])


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"dim": 40}, "dim = 40 is not a multiple of 32"),
        ({"size": 60}, "size = 60 is not a multiple of patch = 8"),
        ({"captions": [""]}, "the captions hold no word"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CLIP.from_captions(**{"captions": CAPTIONS} | settings)


# --- training -------------------------------------------------------------------------------------------


def squares(seed: int = 0, batch: int = 12):
    generator = torch.Generator().manual_seed(seed)
    names = list(COLOURS)
    while True:
        kinds = torch.randint(3, (batch,), generator=generator).tolist()
        x = torch.tensor([COLOURS[names[k]] for k in kinds])[:, :, None, None].expand(-1, -1, 16, 16)
        noise = 0.3 * torch.randn(batch, 3, 16, 16, generator=generator)
        yield (x + noise).clamp(-1, 1), [f"a {names[k]} square" for k in kinds]


def test_it_learns_which_caption_belongs_to_which_picture():
    clip = small()
    losses = list(train_clip(clip, squares(), 60, lr=2e-3, warmup=5))
    assert not clip.training
    x, captions = next(squares(seed=1))
    asked = [f"a {name} square" for name in COLOURS]
    nearest = (clip.embed_images(x) @ clip.embed_captions(asked).T).argmax(1)
    assert [asked[i] for i in nearest] == captions
    counts = torch.tensor([captions.count(caption) for caption in captions])
    best = counts.float().log().mean()  # equal captions cannot be told apart
    assert losses[-1] < best + 0.35 < losses[0]


def test_training_makes_pictures_worse_when_asked_to():
    seen = []

    def degrade(x, generator):
        seen.append(torch.rand(1, generator=generator).item())
        return torch.zeros_like(x)

    clip = small()
    losses = list(train_clip(clip, squares(), 3, degrade=degrade))
    assert len(losses) == len(set(seen)) == 3
    again = list(train_clip(small(), squares(), 3, degrade=degrade))
    assert again == losses
    with pytest.raises(ValueError, match="steps = 0: train for at least 1"):
        next(train_clip(clip, squares(), 0))


# --- the text tower -------------------------------------------------------------------------------------


def test_the_text_tower_is_a_text_encoder(clip):
    encoder = clip.text_encoder()
    condition = encoder(encoder.ids(["a red square", "green", ""]))
    assert condition.mask.sum(1).tolist() == [4, 2, 0]  # the end mark counts, but not around nothing
    torch.testing.assert_close(condition.pooled[0], condition.tokens[0, 3])
    torch.testing.assert_close(condition.pooled[1], condition.tokens[1, 1])
    assert (condition.pooled[2] == 0).all()
    assert encoder.frozen
    assert not any(p.requires_grad for p in encoder.parameters())
    learning = clip.text_encoder(frozen=False)
    assert not learning.frozen
    assert all(p.requires_grad for p in learning.parameters())


def test_taking_the_tower_leaves_the_clip_as_it_was():
    clip = small()
    clip.text_encoder()
    Alignment(clip)
    assert all(p.requires_grad for p in clip.parameters())
    before = clip.text.model.embeddings.token_embedding.weight.clone()
    list(train_clip(clip, squares(), 2))
    assert not torch.equal(clip.text.model.embeddings.token_embedding.weight, before)
    with pytest.raises(ValueError, match="weights of this CLIP are frozen"):
        next(train_clip(clip.requires_grad_(False), squares(), 2))


def test_a_caption_that_says_nothing_has_no_direction(clip):
    assert (clip.embed_captions([""]) == 0).all()
    assert clip.similarity(pictures(1), [""]) == 0


def test_unknown_words_are_named(clip):
    with pytest.warns(UserWarning, match="'walrus'"):
        clip.embed_captions(["a red walrus"])


# --- save and load --------------------------------------------------------------------------------------


def test_round_trip(clip, tmp_path):
    clip.save_pretrained(tmp_path / "whole")
    again = CLIP.from_pretrained(tmp_path / "whole")
    x = pictures()
    assert torch.equal(again.similarity(x, CAPTIONS), clip.similarity(x, CAPTIONS))
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    clip.save_pretrained(tmp_path / "half", torch.float16)
    half = CLIP.from_pretrained(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.float32
    torch.testing.assert_close(half.similarity(x, CAPTIONS), clip.similarity(x, CAPTIONS), rtol=0, atol=5e-3)
    sizes = [(tmp_path / k / "model.safetensors").stat().st_size for k in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    for file in (tmp_path / "half").iterdir():
        assert file.stat().st_mode & 0o044 == 0o044, f"{file.name} can be read by its owner alone"


def test_transformers_reads_what_is_saved_and_the_other_way_round(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        theirs.get_image_features(pictures()).pooler_output,
        clip.model.get_image_features(pictures()).pooler_output,
    )


def test_mean_and_std_travel(clip, tmp_path):
    """Those of OpenAI's models, which are not ours."""
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    CLIP(clip.model, clip.text.tokenizer, mean, std).save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    assert (again.mean, again.std) == (mean, std)


def test_what_is_missing_is_named_in_one_line(tmp_path):
    for name in ("nothing-here", tmp_path, str(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError, match="no CLIP ") as caught:
            CLIP.from_pretrained(name)
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)


# --- alignment ------------------------------------------------------------------------------------------


def test_the_term_by_hand(clip):
    x, schedule = pictures(), md.Cosine()
    level = schedule(torch.tensor([0.1, 0.5, 0.9, 0.3]))
    captions = ["a red square", "green", "", "a blue square"]
    drop = torch.tensor([False, True, False, False])
    cosine = clip.similarity(x, captions)
    expected = 0.7 * sum(float(level.alpha[i]) ** 2 * (1 - cosine[i]) for i in (0, 3)) / 4
    got = Alignment(clip, 0.7).term(captions)(x, level, drop)
    assert got.shape == ()
    torch.testing.assert_close(got, expected)


def model_of_squares() -> md.Diffusion:
    torch.manual_seed(0)
    net = md.UNet(3, 32, (1,), patch=4, attention=(0,), condition_dim=32)
    nn.init.normal_(net.last.weight, std=0.1)
    return md.Diffusion(net, md.Cosine(), "v", small().text_encoder())


@pytest.mark.parametrize("target", ["x0", "eps", "v", "flow"])
def test_it_joins_the_loss_of_every_target(clip, target):
    """The term sees the guess of x0 behind the output, whatever the network predicts."""
    model, x0 = model_of_squares(), pictures()
    model.target = target
    seen = []

    term = Alignment(clip, 0.5).term(CAPTIONS)

    def spy(x0, level, drop=None):
        seen.append((x0, level, drop))
        return term(x0, level, drop)

    def value(alignment):
        generator = torch.Generator().manual_seed(0)
        return md.loss(model, x0, CAPTIONS, condition_dropout=0.5, alignment=alignment, generator=generator)

    plain, with_term = value(None), value(spy)
    guess, level, drop = seen[0]
    torch.testing.assert_close(with_term - plain, term(guess, level, drop), rtol=1e-3, atol=1e-5)
    # The generator of the loss, once more: the same level, noise and dropout.
    again = torch.Generator().manual_seed(0)
    torch.rand(1, generator=again, dtype=torch.float64), torch.randperm(4, generator=again)
    eps = torch.randn(x0.shape, generator=again)
    expected = model(md.diffuse(x0, eps, level), level, model.encode(CAPTIONS).drop(drop))
    x0_hat = md.from_target(expected, md.diffuse(x0, eps, level), level, target).x0
    torch.testing.assert_close(guess, x0_hat, rtol=1e-3, atol=1e-4)
    with_term.backward()
    assert model.net.last.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in clip.parameters())


def test_following_its_gradient_brings_pictures_to_the_caption(clip):
    x, level = pictures(1).requires_grad_(), md.Cosine()(0.3)
    term = Alignment(clip, 1.0).term(["green"])
    before = clip.similarity(x, ["green"]).item()
    (gradient,) = torch.autograd.grad(term(x, level), x)
    assert clip.similarity(x - 0.5 * gradient / gradient.norm(), ["green"]).item() > before


def test_its_score_guides_a_sampler(clip):
    """Pure noise as data, so the denoiser has no opinion of its own: the score has the say."""
    prior = md.exact.GaussianMixture(torch.zeros(1, 768), 0.5)

    def denoise(x_t, level):
        return md.Prediction(
            *(part.reshape(x_t.shape) for part in prior.denoise(x_t.flatten(1).double(), level))
        )

    levels = md.Cosine().levels(10)
    start = md.noise((2, 3, 16, 16), levels[0], generator=md.generators(0, 2)).double()
    score = Alignment(clip).score(["green"])
    guided = md.gradient_guide(denoise, score, 100.0)
    free, led = (md.sample(md.ddim(d, start, levels)) for d in (denoise, guided))
    assert (score(led.float(), levels[-1]) > score(free.float(), levels[-1]) + 0.05).all()


def test_training_with_it_leaves_the_clip_alone(clip):
    model, outer = model_of_squares(), copy.deepcopy(clip)
    before = {k: v.clone() for k, v in outer.state_dict().items()}
    batches = [(x, captions) for (x, captions), _ in zip(squares(), range(3), strict=False)]
    plain = [s.loss for s in md.train(copy.deepcopy(model), batches, 3, warmup=1)]
    with_term = [s.loss for s in md.train(model, batches, 3, warmup=1, alignment=Alignment(outer, 0.5))]
    assert all(b > a + 0.01 for a, b in zip(plain, with_term, strict=True))
    for key, value in outer.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(key.startswith("alignment") for key in model.state_dict())


def test_what_it_cannot_do_is_named(clip):
    model, x = model_of_squares(), pictures()
    for batch in (x, (x, model.encode(CAPTIONS))):
        with pytest.raises(ValueError, match=r"give batches \(x0, captions\)"):
            next(md.train(model, [batch], 1, alignment=Alignment(clip)))
    level = model.schedule(0.5)
    with pytest.raises(ValueError, match="2 captions for 4 pictures: give one each"):
        Alignment(clip).term(CAPTIONS[:2])(x, level, None)
    with pytest.raises(ValueError, match=r"weight = -0.1: it must not be negative"):
        Alignment(clip, -0.1)


# --- the shipped one ------------------------------------------------------------------------------------


def test_the_shipped_clip_tells_what_a_render_shows():
    from minidiff.critters import clip_accuracy

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = clip_accuracy(CLIP.from_pretrained("critters-clip"), n=256, seed=5)
    assert scores["animal and hat"].value > 0.95
    assert scores["held-out pairs"].value > 0.85
    assert min(score.value for score in scores.values()) > 0.85


def test_its_text_tower_is_the_encoder_of_the_shipped_model():
    encoder = md.TextEncoder.from_pretrained("critters-clip")
    model = md.Diffusion.from_pretrained("critters")
    prompts = ["a cat in a top hat", "a purple hat"]
    for part, other in zip(encoder(encoder.ids(prompts)), model.encode(prompts), strict=True):
        torch.testing.assert_close(part, other)
    assert model.encoder.frozen
