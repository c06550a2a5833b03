"""Captions in scripts that put no space between words: read sign by sign. All others: word by word."""

import pytest
import torch
from PIL import Image
from tokenizers import Regex, pre_tokenizers

import minidiff as md
from minidiff import critters, fit, tones
from minidiff.recipes import get_recipe
from minidiff.text import word_tokenizer

CHINESE = ["一只戴帽子的猫", "两只黑狗，红色背景", "一只兔子"]


@pytest.mark.parametrize(
    "caption,tokens",
    [
        ("一只戴帽子的猫", "一 只 戴 帽 子 的 猫"),
        ("两只黑狗，红色背景", "两 只 黑 狗 ， 红 色 背 景"),
        ("ネコが3匹、ケーキ。", "ネ コ が 3 匹 、 ケ ー キ 。"),
        ("แมวใส่หมวก", "แ ม ว ใ ส่ ห ม ว ก"),  # a tone stays with its letter
        ("黑cat白Dog", "黑 cat 白 dog"),
        ("고양이가 모자를 썼다", "고양이가 모자를 썼다"),  # Korean has spaces
        ("Кот в шляпе", "кот в шляпе"),
        ("قطة ترتدي قبعة", "قطة ترتدي قبعة"),
        ("बिल्ली की टोपी", "बिल्ली की टोपी"),
        ("a Cat, two top-hats", "a cat , two top - hats"),
    ],
)
def test_what_is_a_token(caption, tokens):
    tokenizer = word_tokenizer([caption], 32)
    assert tokenizer.tokenize(caption) == tokens.split()
    assert set(tokenizer.get_vocab()) == {*tokens.split(), "[PAD]", "[UNK]"}


def test_what_has_spaces_is_read_as_before():
    """With the rule of two steps that the shipped models were trained with."""
    before = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w]"), "isolated")]
    )
    captions = [*critters.vocabulary(2), *tones.vocabulary(), "don't, héllo wörld_1 x2", "Ǆ ǆ 50% 🙂 1,5"]
    for caption in captions:
        now = word_tokenizer([caption], 32).backend_tokenizer.pre_tokenizer.pre_tokenize_str(caption)
        assert now == before.pre_tokenize_str(caption)


def test_a_sentence_of_known_signs_is_known_and_a_new_sign_is_named():
    encoder = md.TextEncoder.from_captions(CHINESE, dim=32, layers=1)
    assert encoder.unknown(["一只黑兔子"]) == []  # no caption says so
    assert encoder.unknown(["一只白马"]) == ["白", "马"]
    with pytest.warns(UserWarning, match="not in the vocabulary of this model, ignored: '马'"):
        ids = encoder.ids(["一只马"])
    assert (ids >= 0).tolist() == [[True, True, False]]


@pytest.mark.slow
def test_it_is_trained_saved_and_read_back(tmp_path):
    """A picture's folder with Chinese captions, two steps, and prompts that mean different things."""
    for i, caption in enumerate(CHINESE):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption, encoding="utf-8")
    torch.manual_seed(0)
    recipe = get_recipe(tmp_path, size=16, width=32)
    recipe.steps = 2
    *_, last = fit.fit(recipe, tmp_path / "run", sample_every=99)
    again = md.Diffusion.from_pretrained(tmp_path / "run").encoder
    assert isinstance(again, md.TextEncoder)
    mine = last.ema.encoder
    assert again.tokenizer.get_vocab() == mine.tokenizer.get_vocab()
    assert {"猫", "，", "狗"} < set(again.tokenizer.get_vocab())
    for caption in CHINESE:
        ids = again.ids([caption])
        assert torch.equal(ids, mine.ids([caption]))
        assert ids.shape == (1, len(caption))
        assert again.tokenizer.decode(ids[0]).replace(" ", "") == caption
    assert md.TextToImage.from_pretrained(tmp_path / "run")("一只黑猫", steps=1).images[0].size == (16, 16)
