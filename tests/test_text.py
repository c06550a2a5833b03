import os
import warnings
from pathlib import Path

import pytest
import torch
from texts import CAPTIONS, close, encode, model_with, row, small
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import minidiff as md


@pytest.fixture(scope="module")
def encoder() -> md.TextEncoder:
    """Every weight random, so that nothing is zero by chance; float64, so that rounding hides nothing."""
    torch.manual_seed(1)
    encoder = md.TextEncoder.from_captions(CAPTIONS, dim=32, layers=2, max_length=12).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval().requires_grad_(False)


# --- words -----------------------------------------------------------------------------------------


def test_every_word_and_comma_is_a_token(encoder):
    condition = encode(encoder, ["a cat, a top hat", "hat"])
    assert condition.tokens.shape == (2, 6, 32)
    assert condition.mask.tolist() == [[True] * 6, [True] + [False] * 5]
    words = encoder.tokenizer.get_vocab()
    expected = {w for caption in CAPTIONS for w in caption.lower().replace(",", " ,").split()}
    assert set(words) == expected | {"[UNK]", "[PAD]"}


def test_upper_case_and_spaces_do_not_matter(encoder):
    plain = encode(encoder, ["a cat, a hat"])
    for other in ("A CAT, a Hat", "  a  cat ,a hat "):
        close(encode(encoder, [other]).tokens, plain.tokens)


def test_words_and_their_order_matter(encoder):
    base = encode(encoder, ["a cat in a hat"]).pooled
    for other in ("a hat in a cat", "a cat in a top", "a cat in a hat on a hat", "cat in a hat"):
        assert (encode(encoder, [other]).pooled - base).abs().max() > 1e-4, other


def test_each_token_knows_its_neighbours(encoder):
    """A transformer in both directions: "hat" means something else beside "cat", before or after."""
    first, second = (encode(encoder, ["hat on cat"]).tokens[0], encode(encoder, ["hat on dogs"]).tokens[0])
    assert (first[0] - second[0]).abs().max() > 1e-3
    first, second = (encode(encoder, ["cat on hat"]).tokens[0], encode(encoder, ["dogs on hat"]).tokens[0])
    assert (first[2] - second[2]).abs().max() > 1e-3


# --- the batch -------------------------------------------------------------------------------------


def test_the_pooled_vector_is_the_mean_of_the_tokens(encoder):
    condition = encode(encoder, CAPTIONS)
    for i in range(3):
        close(condition.pooled[i], condition.tokens[i][condition.mask[i]].mean(0))


def test_a_caption_does_not_depend_on_its_batch(encoder):
    """Alone, among longer ones, among shorter ones, beside an empty one: the same encoding."""
    together = encode(encoder, [*CAPTIONS, ""])
    for i, caption in enumerate(CAPTIONS):
        alone = encode(encoder, [caption])
        assert together.mask[i].sum() == alone.mask.sum()
        close(row(together, i).tokens, alone.tokens[0])
        close(together.pooled[i], alone.pooled[0])


def test_the_order_of_the_batch_is_kept(encoder):
    order = [2, 0, 3, 1]
    captions = [*CAPTIONS, ""]
    straight, moved = encode(encoder, captions), encode(encoder, [captions[i] for i in order])
    for part, other in zip(straight, moved, strict=True):
        close(part[order].double(), other.double())


@pytest.mark.parametrize("captions", [[""], ["", ""], ["", "a cat"], ["   ", "a cat", "\n"]])
def test_the_empty_caption_is_no_condition(encoder, captions):
    condition = encode(encoder, captions)
    for i, caption in enumerate(captions):
        if not caption.strip():
            assert not condition.mask[i].any()
            assert (condition.pooled[i] == 0).all()
    assert all(part.isfinite().all() for part in (condition.tokens, condition.pooled))
    assert condition.mask.shape == condition.tokens.shape[:2]
    torch.manual_seed(0)
    net = md.UNet(1, 32, (1,), patch=2, attention=(0,), condition_dim=32).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = md.Diffusion(net, md.Cosine(), "v", encoder)
    x, level = torch.randn(len(captions), 1, 4, 4).double(), md.Cosine()(0.5)
    given, free = model.denoise(x, level, condition).x0, model.denoise(x, level).x0
    for i, caption in enumerate(captions):
        if caption.strip():
            assert (given[i] - free[i]).abs().max() > 1e-4
        else:
            close(given[i], free[i])


def test_a_single_string_is_refused(encoder):
    with pytest.raises(ValueError, match="captions = 'a cat' is one string: give a list of them"):
        encode(encoder, "a cat")


# --- warnings --------------------------------------------------------------------------------------


def test_unknown_words_are_named_as_they_were_written(encoder):
    with pytest.warns(UserWarning, match=r"not in the vocabulary.*'Zebra', 'hovercraft'") as record:
        encode(encoder, ["a Zebra in a hat", "a cat", "a hovercraft on a Zebra"])
    assert len(record) == 1  # one line for all, each word once


def test_an_unknown_word_is_ignored_as_the_warning_says(encoder):
    """The embedding of "unknown" was never trained: whatever it is, it must not reach the network."""
    captions = ["a hovercraft cat", "hovercraft", "two dogs"]
    unknown = encoder.tokenizer.unk_token_id
    embedding = encoder.model.get_input_embeddings().weight.data
    kept, encoded = embedding[unknown].clone(), []
    for value in (0.0, 5.0):
        embedding[unknown] = value * torch.arange(32)
        with pytest.warns(UserWarning, match="'hovercraft'"):
            encoded.append(encode(encoder, captions))
    embedding[unknown] = kept
    assert encoded[0].mask.sum(1).tolist() == [2, 0, 2]
    assert (encoded[0].pooled[1] == 0).all()  # nothing but unknown words is no condition
    for i in range(3):
        close(row(encoded[0], i).tokens, row(encoded[1], i).tokens)
        close(encoded[0].pooled[i], encoded[1].pooled[i])


def test_what_does_not_fit_is_named(encoder):
    long = "a cat in a top hat, on a green background in a green hat"  # 15 tokens, of which 12 are read
    with pytest.warns(UserWarning, match="only 12 tokens are read; ignored: 'a green hat'") as record:
        condition = encode(encoder, [long, "a cat"])
    assert len(record) == 1
    assert condition.mask.sum(1).tolist() == [12, 2]
    close(condition.tokens[:1], encode(encoder, ["a cat in a top hat, on a green background in"]).tokens)


def test_a_warning_stays_short(encoder):
    with pytest.warns(UserWarning, match="'x{57}\\.\\.\\.'$"):
        encode(encoder, ["x" * 10_000])


def test_captions_that_fit_give_no_warning(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(encoder, ["a cat in a top hat, on a green background in", "hat", ""])  # exactly 12 tokens


# --- other tokenizers and models -------------------------------------------------------------------


def foreign(unknown: str | None) -> md.TextEncoder:
    """A tokenizer with the habits of CLIP's: marks around the caption, one of which is also what stands
    for an unknown word; or one that, as those on bytes do, has no unknown token at all."""
    words = ["<pad>", "<start>", "<end>", *CAPTIONS[1].split(), "a", "cat"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=32, max_position_embeddings=6,
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token=unknown
    )
    return md.TextEncoder(BertModel(config, add_pooling_layer=False).eval(), fast, max_length=6)


@pytest.mark.parametrize("unknown", ["<end>", None])
def test_a_tokenizer_from_elsewhere_works(unknown):
    encoder = foreign(unknown)
    assert encoder.tokenizer.unk_token_id == (2 if unknown else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condition = encode(encoder, ["a cat", "two black dogs a", ""])
    assert condition.mask.sum(1).tolist() == [4, 6, 0]  # marks count, but not around nothing
    close(encode(encoder, ["a cat"]).tokens[0], condition.tokens[0, :4])


def test_warnings_of_a_tokenizer_with_marks():
    encoder = foreign("<end>")
    with pytest.warns(UserWarning, match="'zebra'") as record:
        assert encode(encoder, ["a zebra cat"]).mask[0].tolist() == [True, True, False, True, True]
    assert len(record) == 1
    for tail in ("a", "a cat", "a cat a"):
        with pytest.warns(UserWarning, match=f"only 6 tokens are read; ignored: '{tail}'$"):
            encode(encoder, [f"two black dogs cat {tail}"])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: md.TextEncoder.from_captions([]), "the captions hold no word"),
        (lambda: md.TextEncoder.from_captions(["", "  "]), "the captions hold no word"),
        (lambda: md.TextEncoder.from_captions(["a cat"], dim=40), "dim = 40 is not a multiple of 32"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- save and load ---------------------------------------------------------------------------------


def test_text_model_round_trip(tmp_path):
    model = model_with(small()).eval()
    model.save_pretrained(tmp_path)
    again = md.Diffusion.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(model.state_dict())
    x, level = torch.randn(4, 2), md.Cosine()(0.5)
    captions = ["a cat in a top hat, on a green background", "hat", "", "two black dogs"]
    for part, other in zip(model.encode(captions), again.encode(captions), strict=True):
        assert torch.equal(part, other)
    mine, theirs = (m.denoise(x, level, m.encode(captions)).x0 for m in (model, again))
    assert torch.equal(mine, theirs)
    assert again.encoder.max_length == 12
    with pytest.warns(UserWarning, match="'zebra'"):  # the loaded tokenizer still knows what it knows
        again.encode(["a zebra"])
    with pytest.warns(UserWarning, match="only 12 tokens"):
        again.encode(["a cat " * 10])
    again.save_pretrained(tmp_path / "copy")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_a_text_model_may_move(tmp_path):
    """Nothing in the folder points back to where it was made."""
    model_with(small()).save_pretrained(tmp_path / "here")
    for file in (tmp_path / "here").iterdir():
        assert file.suffix == ".safetensors" or str(tmp_path) not in file.read_text()
    (tmp_path / "here").rename(tmp_path / "there")
    assert md.Diffusion.from_pretrained(tmp_path / "there").encode(["a cat"]).mask.sum() == 2


def test_half_a_save_is_no_model(tmp_path, monkeypatch):
    """A process that is killed while files are put in place leaves a new folder without a model, never
    one that loads and lacks its tokenizer; also where the file system lists config.json first."""
    listing = os.listdir
    monkeypatch.setattr(Path, "iterdir", lambda self: map(self.joinpath, sorted(listing(self))))
    real = os.rename, os.replace
    for allowed in range(4):
        moves = []

        def limited(move, allowed=allowed, moves=moves):
            def step(source, target, **kwargs):
                if "tokenizer" in str(target) or "model" in str(target) or "config" in str(target):
                    moves.append(target)
                    if len(moves) > allowed:
                        raise KeyboardInterrupt
                return move(source, target, **kwargs)

            return step

        folder, model = tmp_path / str(allowed), model_with(small())
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", limited(real[0]))
            patch.setattr(os, "replace", limited(real[1]))
            with pytest.raises(KeyboardInterrupt):
                model.save_pretrained(folder)
        with pytest.raises(FileNotFoundError, match="holds no model"):
            md.Diffusion.from_pretrained(folder)


def test_the_encoder_learns_with_the_network():
    """Its weights get gradients from the loss, those of words that were shown among them."""
    model = model_with(small())
    md.loss(model, torch.randn(3, 2), ["a cat", "two dogs", ""]).backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle
    gradient = model.encoder.model.embeddings.word_embeddings.weight.grad.abs().sum(1)
    vocabulary = model.encoder.tokenizer.get_vocab()
    for word in ("cat", "dogs"):
        assert gradient[vocabulary[word]] > 0
    for word in ("green", "hat"):
        assert gradient[vocabulary[word]] == 0
