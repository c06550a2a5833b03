"""From strings to numbers: where captions enter the library, and where strings end (chapter 6).

:func:`token_ids` asks a tokenizer and warns of what it loses. :func:`word_tokenizer` makes one of whole
words, for encoders that start from nothing.
"""

import sys
import warnings
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNKNOWN, PAD, END = "[UNK]", "[PAD]", "[END]"
WITHOUT_SPACES = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
"""Scripts that put no space between words, by their names in Unicode: of them each sign is a token. A whole
sentence would pass for one word else, and no other sentence would hold it again."""
LONG_VOWEL = "\u30fc"
"""Of Katakana and Hiragana: it belongs to both, so that Unicode counts it to neither."""


def word_tokenizer(captions: Iterable[str], max_length: int, *, end: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word or sign of the captions, in order of the alphabet.

    Words end at a space or a sign that is no letter. Of :data:`WITHOUT_SPACES` each letter is a token of its
    own, together with the vowels and tones that are written above or below it: Chinese, Japanese and Thai are
    read sign by sign.

    Args:
        captions: text that contains every word to be known; capitals do not count.
        max_length: tokens kept of a caption.
        end: put an end mark behind each caption, for models that read from left to right.

    Raises:
        ValueError: the captions hold no word.
    """
    normalizer = normalizers.Lowercase()
    letter = "".join(rf"\p{{{script}}}" for script in WITHOUT_SPACES) + LONG_VOWEL
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w]"), "isolated"),
            pre_tokenizers.Split(Regex(rf"[{letter}]\p{{M}}*"), "isolated"),
        ]
    )
    words = {
        word
        for caption in captions
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    }
    if not words:
        raise ValueError("the captions hold no word: a text encoder needs some to learn")
    marks = [END] if end else []
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, *sorted(words), *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD, model_max_length=max_length,
        **({"eos_token": END} if end else {}),
    )  # fmt: skip


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> Tensor:
    """Captions as numbers: (B, T) int64, -1 where nothing is to be read.

    Words the tokenizer does not know are not read, as no model was trained on them, and captions that
    are too long are cut; a warning names what was lost. Marks that the tokenizer puts around nothing are
    not read either: the empty caption is a row of -1.

    Args:
        tokenizer: a fast one, which says where in the caption each token stands.
        captions: B strings.
        max_length: tokens kept of a caption, marks included.

    Raises:
        ValueError: a string was given in place of a list of strings, the list is empty, or an entry is no
            string.
    """
    if isinstance(captions, str):
        raise ValueError(f"captions = {captions!r} is one string: give a list of them")
    if not len(captions):
        raise ValueError("no captions: give a list with at least one; '' stands for anything")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(
                f"caption {caption!r} is no string: '' stands for no caption, and for labels there is "
                "LabelEncoder"
            )
    batch = tokenizer(
        list(captions), padding=True, truncation=True, max_length=max_length,
        return_tensors="pt", return_token_type_ids=False, return_offsets_mapping=True,
    )  # fmt: skip
    ids: Tensor = batch["input_ids"].long()  # (B, T)
    if not ids.shape[1]:  # nothing but empty captions
        return torch.full((len(captions), 1), -1)
    spans: Tensor = batch["offset_mapping"]  # (B, T, 2): where in the caption a token stands
    written = spans[:, :, 1] > spans[:, :, 0]  # not padding, nor a start or end mark
    unknown_id = tokenizer.unk_token_id
    unknown = written & (ids == (-1 if unknown_id is None else unknown_id))
    _warn_unknown(captions, spans, unknown)
    if ids.shape[1] >= max_length:
        _warn_cut(tokenizer, captions, spans, max_length)
    says_something = (written & ~unknown).any(dim=1, keepdim=True)
    return torch.where(batch["attention_mask"].bool() & ~unknown & says_something, ids, -1)


def unknown_words(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
    """The words and signs of captions that a tokenizer does not know, each once, as they come.

    Args:
        tokenizer: a fast one. One that takes words apart knows all whose parts it knows.
        captions: strings.
    """
    texts = list(dict.fromkeys(captions))
    if tokenizer.unk_token_id is None or not texts:
        return []
    batch = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    found: dict[str, None] = {}
    for text, ids, spans in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        for token, (start, end) in zip(ids, spans, strict=True):
            if token == tokenizer.unk_token_id and end > start:
                found[text[start:end]] = None
    return list(found)


def _warn_unknown(captions: Sequence[str], spans: Tensor, unknown: Tensor) -> None:
    """Name the words that are not known."""
    if not bool(unknown.any()):
        return
    positions = [(i, *spans[i, j].tolist()) for i, j in unknown.nonzero().tolist()]
    words = dict.fromkeys(_short(captions[i][start:end]) for i, start, end in positions)
    _warn(f"not in the vocabulary of this model, ignored: {', '.join(words)}")


def _warn_cut(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], spans: Tensor, max_length: int
) -> None:
    """Name the ends of captions that are cut."""
    whole = tokenizer(list(captions), verbose=False)["input_ids"]
    for caption, tokens, span in zip(captions, whole, spans, strict=True):
        if len(tokens) > max_length:
            lost = _short(caption[int(span[:, 1].max()) :].strip())
            _warn(f"only {max_length} tokens are read; ignored: {lost}")


def _warn(message: str) -> None:
    """Warn at the line of the caller's own code, however deep in the library this is."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("minidiff", "torch")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _short(text: str) -> str:
    """In quotes, and at most 60 characters of it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
