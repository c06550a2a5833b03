"""Text: from captions to conditions, and CLIP, the common space of captions and pictures (chapters 6 and 7).

:mod:`~minidiff.text.tokens` turns strings into numbers, :mod:`~minidiff.text.encoder` numbers into
conditions, :mod:`~minidiff.text.clip` puts captions and pictures into one space, and
:mod:`~minidiff.text.alignment` uses that space to train a denoiser or to guide it.
"""

from minidiff.text.alignment import Alignment
from minidiff.text.clip import CLIP, train_clip
from minidiff.text.encoder import TextEncoder
from minidiff.text.tokens import token_ids, word_tokenizer

__all__ = ["CLIP", "Alignment", "TextEncoder", "token_ids", "train_clip", "word_tokenizer"]
