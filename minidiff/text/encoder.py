"""Text encoders: from a prompt to a condition (chapter 6).

A :class:`TextEncoder` is a tokenizer and a transformer from the ``transformers`` library, side by side.
It turns each caption into numbers (:meth:`~TextEncoder.ids`), and these into one vector per token, which
the denoiser's attention can look at, and one vector for the whole, which joins the embedding of time. It
may be trained before and stay as it is (:meth:`TextEncoder.from_pretrained`), or start from nothing and
learn with the denoiser (:meth:`TextEncoder.from_captions`).
"""

import json
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from minidiff.checks import whole
from minidiff.condition import Condition
from minidiff.files import StrPath, checked_weights, first_line, locate_pretrained, nothing_runs
from minidiff.text.tokens import token_ids, unknown_words, word_tokenizer

CACHE_BYTES = 256 * 2**20
"""How much memory a frozen encoder may spend on token states it has computed before."""


class TextEncoder(nn.Module):
    """Captions in, :class:`~minidiff.condition.Condition` out, by way of token numbers::

        condition = encoder(encoder.ids(["a cat in a hat"]))

    Args:
        model: a transformers text model whose output has ``last_hidden_state``.
        tokenizer: the tokenizer that goes with it, one of the fast ones.
        max_length: tokens kept of a caption, those the tokenizer puts around it included.
        frozen: it does not learn. Its weights get no gradients, it computes in float32 whatever the
            network around it does, and captions that come again are looked up. ``encoder.frozen`` can
            be set at any time.

    Raises:
        ValueError: the tokenizer cannot say where in the caption its tokens stand, or has more of them than
            the model, or ``max_length`` is more than the model can read.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        max_length: int = 32,
        *,
        frozen: bool = False,
    ):
        super().__init__()
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer: give its fast version")
        table = model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"{type(model).__name__} is no text model: it has no table of tokens")
        if len(tokenizer) > (known := table.num_embeddings):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the text model {known}: give its own"
            )
        max_length = whole("max_length", max_length, 1, _positions(model.config))
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.projection: nn.Linear | None = None  # see reduce
        self._cache: dict[bytes, Tensor] = {}  # what was read -> (T, D)
        self._cache_bytes = 0
        self._frozen = False
        self.frozen = frozen
        self.register_load_state_dict_post_hook(_forget_all)

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], *, dim: int = 128, layers: int = 2, max_length: int = 32
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
        if whole("dim", dim, 32) % 32:
            raise ValueError(f"dim = {dim} is not a multiple of 32")
        tokenizer = word_tokenizer(captions, whole("max_length", max_length))
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=dim, num_hidden_layers=layers,
            num_attention_heads=dim // 32, intermediate_size=4 * dim, max_position_embeddings=max_length,
            type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",  # fused attention is slower here: a caption is a few tokens
        )  # fmt: skip
        return cls(transformers.BertModel(config, add_pooling_layer=False), tokenizer, max_length)

    @classmethod
    def from_pretrained(
        cls, name: StrPath, *, max_length: int | None = None, frozen: bool = True
    ) -> "TextEncoder":
        """An encoder that has read more than our captions, as it was trained.

        Known to work: the text tower of CLIP (Radford et al. 2021), alone or out of the whole model,
        T5's encoder (Raffel et al. 2020), and BERT and its many relatives, sentence encoders among them
        (Reimers & Gurevych 2019).

        Args:
            name: an encoder shipped with minidiff ("critters-clip", "critters-duo-clip"), a folder
                that ``transformers`` wrote, or a Hugging Face hub id such as "openai/clip-vit-base-patch32".
            max_length: tokens kept of a caption; None for as many as model and tokenizer take, 512 at
                most.
            frozen: leave it as it is; False lets it learn with the denoiser.

        Raises:
            FileNotFoundError: no such encoder.
            ValueError: it is not a text model, its tokenizer is not a fast one, or ``max_length`` is
                out of range.
        """
        place = locate_pretrained(name)
        try:
            with nothing_runs(name):
                config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
                tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise FileNotFoundError(f"no text encoder {str(name)!r}: {first_line(error)}") from error
        with nothing_runs(name), checked_weights(place):
            both, about = _architecture(config, name).from_pretrained(
                place, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
        if missing := sorted(key for key in about["missing_keys"] if "pooler" not in key):
            raise ValueError(  # they would be random numbers
                f"the weights in {name} lack {missing[0]} and {len(missing) - 1} more: copy or download them"
            )
        model = both.text_model if isinstance(both, transformers.CLIPModel) else both
        most = min(tokenizer.model_max_length, _positions(model.config), 512)
        if max_length is None:
            max_length = most
        elif not 1 <= max_length <= most:
            raise ValueError(f"max_length = {max_length}: {str(name)!r} takes 1 to {most} tokens")
        return cls(_without_pooler(model), tokenizer, max_length, frozen=frozen)

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is. Setting it to False lets all its weights learn."""
        return self._frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        # A new encoder that learns may have been given with some weights fixed.
        if value or self._frozen:
            self.requires_grad_(not value)
            self.model.train(not value and self.training)
        self._frozen = value
        self._forget()  # it may have learned since

    @property
    def dim(self) -> int:
        """Width D of token states and pooled vector."""
        if self.projection is not None:
            return self.projection.out_features
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def reduce(self, captions: Sequence[str], variance: float = 0.95) -> "TextEncoder":
        """Keep the directions in which captions differ, in place.

        A wide encoder that was trained on other texts has many directions in which our captions hardly
        differ. A denoiser learns to read even those, and a new word, which differs there too, leads it
        astray. So of the principal components of the pooled vectors only the leading ones stay, with a
        mean variance of 1 (Su et al. 2021 give each a variance of 1). Token states go the same way.

        Args:
            captions: some thousands, like those to come.
            variance: share of the pooled vectors' variance that stays, in (0, 1].

        Returns:
            The encoder itself, with a smaller ``dim``.

        Raises:
            ValueError: it was reduced before or is not frozen, ``variance`` is out of range, or the
                captions do not differ.
        """
        if not self.frozen or self.projection is not None:
            raise ValueError("only a frozen encoder can be reduced, and only once")
        if not 0 < variance <= 1:
            raise ValueError(f"variance = {variance:g} is a share: give it in (0, 1]")
        parts = [captions[i : i + 256] for i in range(0, len(captions), 256)]
        pooled = torch.cat([self(self.ids(part)).pooled for part in parts])  # (N, D)
        centre = pooled.mean(0)
        _, spread, directions = torch.linalg.svd(pooled - centre, full_matrices=False)
        if not spread[0] > 1e-6:
            raise ValueError(f"{len(captions)} captions that do not differ: give some thousands")
        held = spread.square().cumsum(0) / spread.square().sum()
        dim = 1 + int((held < variance - 1e-6).sum())
        scale = (spread[:dim].square().mean() / len(captions)).sqrt()
        self.projection = nn.Linear(pooled.shape[1], dim).to(pooled).requires_grad_(False)
        self.projection.weight.copy_(directions[:dim] / scale)
        self.projection.bias.copy_(-self.projection.weight @ centre)
        self._forget()
        return self

    def ids(self, values: Sequence[str] | Tensor, /) -> Tensor:
        """Captions as token numbers (B, T) int64, -1 where nothing is to be read.

        Args:
            values: B strings; the empty one is no condition at all. Numbers pass as they are.

        Raises:
            ValueError: a string in place of a list of strings, an empty list, or an entry that is no string;
                a tensor that does not hold token numbers.

        Warns:
            UserWarning: a word is not known, or a caption too long; see
                :func:`~minidiff.text.tokens.token_ids`.
        """
        if isinstance(values, Tensor):
            if values.ndim != 2 or values.is_floating_point():
                raise ValueError(
                    f"a tensor {tuple(values.shape)} of {values.dtype} is no text, which this model reads: "
                    "for labels give Diffusion(..., encoder=LabelEncoder(num_classes))"
                )
            return values
        return token_ids(self.tokenizer, values, self.max_length)

    def unknown(self, captions: Sequence[str]) -> list[str]:
        """The words and signs of captions that are not known and would not be read, each once."""
        return unknown_words(self.tokenizer, captions)

    def forward(self, ids: Tensor) -> Condition:
        """The conditions that token numbers stand for.

        Args:
            ids: (B, T) from :meth:`ids`.

        Returns:
            Condition with tokens (B, T, D), mask (B, T) and pooled (B, D). The pooled vector is the mean
            of the token states; for CLIP's tower it is the state of the last token, the end mark, which
            alone has seen the whole caption and was trained to stand for it.

        Raises:
            ValueError: captions in place of their numbers.
        """
        if not isinstance(ids, Tensor):
            raise ValueError(f"ids = {reprlib.repr(ids)} are no numbers: give encoder.ids(captions)")
        device = next(self.model.parameters()).device
        if self.frozen:
            # The caller may compute in bfloat16 or want gradients: what is read must not depend on it. On a
            # GPU to read once more is quicker than to look up, and can be recorded as a part of a step.
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                tokens = self._remembered(ids) if device.type == "cpu" else self._states(ids)
        else:
            tokens = self._states(ids)
        mask = (ids >= 0).to(tokens.device)
        if isinstance(self.model, transformers.CLIPTextModel):
            position = torch.arange(mask.shape[1], device=mask.device)
            last = (mask * position).argmax(dim=1)  # (B,)
            pooled = tokens[torch.arange(len(tokens), device=mask.device), last]
            pooled = pooled * mask.any(dim=1, keepdim=True)
        else:
            pooled = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Condition(tokens, mask, pooled)

    def _states(self, ids: Tensor) -> Tensor:
        """Token states (B, T, D); only tokens with a number are looked at."""
        ids = ids.to(next(self.model.parameters()).device)
        mask = ids >= 0
        visible = mask | ~mask.any(dim=1, keepdim=True)  # a softmax over nothing would be nan
        out = self.model(input_ids=ids.clamp(min=0), attention_mask=visible.long())
        states: Tensor = out.last_hidden_state
        return states if self.projection is None else self.projection(states)

    def _remembered(self, ids: Tensor) -> Tensor:
        """The same for a frozen encoder; what was read before is looked up."""
        ids = ids.cpu()
        lengths = (ids >= 0).mul(torch.arange(1, ids.shape[1] + 1)).amax(1)  # up to the last token read
        keys = [row[:length].numpy().tobytes() for row, length in zip(ids, lengths, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self._cache}
        found = {key: self._cache[key] for key in keys if key in self._cache}
        if new:
            states = self._states(ids[list(new.values())])
            for key, state in zip(new, states, strict=True):
                found[key] = state = state[: len(key) // 8].clone()  # 8 bytes a token
                if self._cache_bytes + state.nbytes > CACHE_BYTES:
                    self._forget()
                self._cache[key] = state
                self._cache_bytes += state.nbytes
        states = nn.utils.rnn.pad_sequence([found[key] for key in keys], batch_first=True)
        # Shorter than the batch if the longest caption ends in words that are not read.
        return F.pad(states, (0, 0, 0, ids.shape[1] - states.shape[1]))

    def _forget(self) -> None:
        self._cache.clear()
        self._cache_bytes = 0

    def _apply(self, *args: Any, **kwargs: Any) -> "TextEncoder":
        self._forget()  # another device or dtype, other states
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Training mode, which a frozen encoder never enters: no dropout."""
        return super().train(mode and not self.frozen)

    def config(self) -> dict[str, Any]:
        """What config.json needs to rebuild the encoder around its weights."""
        return {
            "name": "TextEncoder",
            "max_length": self.max_length,
            "frozen": self.frozen,
            "reduced_to": None if self.projection is None else self.dim,
            "model": json.loads(self.model.config.to_json_string()),
        }

    def save_tokenizer(self, folder: StrPath) -> None:
        """Write the tokenizer's files (JSON) into ``folder``."""
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_config(cls, config: dict[str, Any], folder: StrPath) -> "TextEncoder":
        """The encoder that :meth:`config` described, with the tokenizer in ``folder``, untrained."""
        settings = dict(config["model"])
        model_config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = _architecture(model_config, folder).from_config(
            model_config, attn_implementation="eager", trust_remote_code=False
        )
        with nothing_runs(folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(Path(folder), trust_remote_code=False)
        frozen = config.get("frozen", False)  # not in files of the first version
        encoder = cls(_without_pooler(model), tokenizer, config["max_length"], frozen=frozen)
        if dim := config.get("reduced_to"):
            encoder.projection = nn.Linear(encoder.dim, dim).requires_grad_(not frozen)
        return encoder


def _forget_all(encoder: TextEncoder, keys: Any) -> None:
    """Other weights, other states. A function, since a lambda could not be pickled."""
    encoder._forget()


def _architecture(config: transformers.PretrainedConfig, name: StrPath) -> Any:
    """The class that holds the text encoder of a model with this configuration."""
    if config.model_type == "clip":  # both towers
        return transformers.CLIPModel
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if config.is_encoder_decoder or not (hasattr(config, "vocab_size") and hasattr(config, "hidden_size")):
        raise ValueError(
            f"{str(name)!r} is a {config.model_type!r} model, not a text encoder: "
            "use one of CLIP, T5 or BERT's kind"
        )
    return transformers.AutoModel


def _without_pooler(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """BERT's head for classification is not used: the pooled vector is made from the token states."""
    if hasattr(model, "pooler"):
        model.pooler = None
    return model


def _positions(config: transformers.PretrainedConfig) -> int:
    """The longest sequence the model has positions for; T5, which counts distances, has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return 512
    # RoBERTa numbers its positions from the padding index on.
    return int(positions) - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
