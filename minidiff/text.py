"""Text encoders: from a prompt to a condition (chapter 6).

A :class:`TextEncoder` is a tokenizer and a transformer from the ``transformers`` library, side by side.
It turns each caption into one vector per token, which the denoiser's attention can look at, and one
vector for the whole, which joins the embedding of time.
"""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from minidiff.denoiser import Condition

UNKNOWN, PAD = "[UNK]", "[PAD]"


class TextEncoder(nn.Module):
    """Captions in, :class:`~minidiff.denoiser.Condition` out.

    Args:
        model: a transformers text model whose output has ``last_hidden_state``.
        tokenizer: the tokenizer that goes with it.
        max_length: tokens kept of a caption.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 32
    ):
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    @classmethod
    def from_captions(
        cls,
        captions: Iterable[str],
        *,
        dim: int = 128,
        layers: int = 2,
        max_length: int = 32,
    ) -> "TextEncoder":
        """A small, untrained encoder that knows the words of some captions.

        One token per word (lower case, commas kept); a BERT of a few layers without dropout reads
        them in both directions. It is trained together with the denoiser.

        Args:
            captions: text that contains every word to be known.
            dim: width of the token states, a multiple of 32.
            layers: transformer layers.
            max_length: tokens kept of a caption.

        Raises:
            ValueError: the captions hold no word, or ``dim`` is not a multiple of 32.
        """
        if dim % 32:
            raise ValueError(f"dim = {dim} is not a multiple of 32")
        tokenizer = _word_tokenizer(captions, max_length)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=dim // 32,
            intermediate_size=4 * dim,
            max_position_embeddings=max_length,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",  # fused attention is slower here: a caption is a few tokens
        )
        return cls(BertModel(config, add_pooling_layer=False), tokenizer, max_length)

    @property
    def dim(self) -> int:
        """Width D of token states and pooled vector."""
        return int(self.model.config.hidden_size)

    def forward(self, captions: Sequence[str]) -> Condition:
        """Encode captions; the empty caption is no condition at all.

        Words the tokenizer does not know are left out, and captions that are too long are cut; a warning
        names what was lost.

        Args:
            captions: B strings.

        Returns:
            Condition with tokens (B, T, D), mask (B, T) and pooled (B, D), the mean of the token states.

        Raises:
            ValueError: a string was given in place of a list of strings, or the list is empty.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions = {captions!r} is one string: give a list of them")
        if not captions:
            raise ValueError("no captions: give a list with at least one; '' stands for anything")
        batch = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length,
            return_tensors="pt", return_token_type_ids=False, return_offsets_mapping=True,
        )  # fmt: skip
        ids: Tensor = batch["input_ids"].long()  # (B, T)
        if ids.shape[1]:
            spans: Tensor = batch[
                "offset_mapping"
            ]  # (B, T, 2): where in the caption a token stands
            written = spans[:, :, 1] > spans[:, :, 0]  # not padding, nor a start or end mark
            unknown_id = self.tokenizer.unk_token_id
            unknown = written & (ids == (-1 if unknown_id is None else unknown_id))
            self._warn(captions, spans, unknown)
            # What was never trained is not read; and marks around nothing are nothing.
            said = (written & ~unknown).any(dim=1, keepdim=True)
            mask = batch["attention_mask"].bool() & ~unknown & said
        else:  # nothing but empty captions
            ids = ids.new_zeros(len(captions), 1)
            mask = torch.zeros_like(ids, dtype=torch.bool)
        device = next(self.model.parameters()).device
        mask, ids = mask.to(device), ids.to(device)
        visible = mask | ~mask.any(dim=1, keepdim=True)  # a softmax over nothing would be nan
        tokens = self.model(
            input_ids=ids, attention_mask=visible.long()
        ).last_hidden_state  # (B, T, D)
        pooled = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Condition(tokens, mask, pooled)

    def _warn(self, captions: Sequence[str], spans: Tensor, unknown: Tensor) -> None:
        """Name the words that are not known, and the end of captions that is cut."""
        if unknown.any():
            places = [(i, *spans[i, j].tolist()) for i, j in unknown.nonzero().tolist()]
            words = dict.fromkeys(repr(captions[i][start:end]) for i, start, end in places)
            warnings.warn(
                f"not in the vocabulary of this model, ignored: {', '.join(words)}", stacklevel=3
            )
        if spans.shape[1] < self.max_length:
            return
        whole = self.tokenizer(list(captions), verbose=False)["input_ids"]
        for caption, tokens, span in zip(captions, whole, spans, strict=True):
            if len(tokens) > self.max_length:
                lost = caption[int(span[:, 1].max()) :].strip()
                lost = lost if len(lost) <= 60 else lost[:57] + "..."
                warnings.warn(
                    f"only {self.max_length} tokens are read; ignored: {lost!r}", stacklevel=3
                )

    def config(self) -> dict[str, Any]:
        """What config.json needs to rebuild the encoder around its weights."""
        return {
            "max_length": self.max_length,
            "model": json.loads(self.model.config.to_json_string()),
        }

    def save_tokenizer(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files (JSON) into ``folder``."""
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_config(cls, config: dict[str, Any], folder: str | os.PathLike[str]) -> "TextEncoder":
        """The encoder that :meth:`config` described, with the tokenizer in ``folder``, untrained."""
        settings = dict(config["model"])
        model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModel.from_config(model_config, attn_implementation="eager")
        if hasattr(model, "pooler"):
            model.pooler = None  # the pooled vector is the mean of the tokens
        tokenizer = AutoTokenizer.from_pretrained(Path(folder))
        return cls(model, tokenizer, config["max_length"])


def _word_tokenizer(captions: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word (or comma) of the captions, in order of the alphabet."""
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
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD, model_max_length=max_length
    )
