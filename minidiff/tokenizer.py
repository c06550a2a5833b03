"""A tokenizer of whole words, for encoders that start from nothing (chapter 6)."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

UNKNOWN, PAD, END = "[UNK]", "[PAD]", "[END]"


def word_tokenizer(
    captions: Iterable[str], max_length: int, *, end: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word or sign of the captions, in order of the alphabet.

    Args:
        captions: text that contains every word to be known; capitals do not count.
        max_length: tokens kept of a caption.
        end: put an end mark behind each caption, for models that read from left to right.

    Raises:
        ValueError: the captions hold no word.
    """
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w]"), "isolated")]
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
