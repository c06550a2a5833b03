"""CLIP: pictures and captions in one space (chapter 7).

A :class:`CLIP` is two encoders, one for pictures and one for captions, that end in the same space: each
gives a vector of length 1, and a picture and its caption should point the same way (Radford et al.
2021). It is trained on nothing but pairs. In a batch of B pairs there are B right ones and B² - B wrong
ones, and the loss asks each picture for its caption and each caption for its picture.

One such model serves three times:

* its text tower is a text encoder for a denoiser (:meth:`CLIP.text_encoder`);
* the cosine of the two vectors scores samples (:meth:`CLIP.similarity`, "CLIP score");
* the same cosine, on the denoiser's guess of x0, is a term of the training loss or the gradient that
  guides a sampler (:class:`~minidiff.text.alignment.Alignment`).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from minidiff.device import has_bf16, pick_device
from minidiff.files import StrPath, checked_weights, fill_folder, first_line, locate_pretrained, nothing_runs
from minidiff.text.encoder import TextEncoder
from minidiff.text.tokens import word_tokenizer


class CLIP(nn.Module):
    """Pictures and captions in one space.

    Args:
        model: transformers' two towers.
        tokenizer: the tokenizer of the text tower.
        mean: mean that the picture tower expects to be subtracted from each channel, for pixels in [0, 1].
        std: what it expects them to be divided by after that.
    """

    def __init__(
        self,
        model: transformers.CLIPModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.model = model
        self.text = TextEncoder(model.text_model, tokenizer, model.config.text_config.max_position_embeddings)
        self.mean, self.std = tuple(mean), tuple(std)

    @classmethod
    def from_captions(
        cls,
        captions: Iterable[str],
        *,
        size: int = 64,
        patch: int = 8,
        dim: int = 128,
        text_layers: int = 2,
        image_layers: int = 4,
        max_length: int = 32,
    ) -> "CLIP":
        """A small, untrained CLIP that knows the words of some captions.

        Args:
            captions: text that contains every word to be known.
            size: height and width of the pictures.
            patch: side of the squares that become the tokens of the picture tower.
            dim: width of both towers and of the common space, a multiple of 32.
            text_layers: transformer layers of the text tower.
            image_layers: transformer layers of the picture tower.
            max_length: tokens kept of a caption, the end mark included.

        Raises:
            ValueError: the captions hold no word, ``dim`` is not a multiple of 32, or the patches do not
                fill the picture.
        """
        if dim % 32:
            raise ValueError(f"dim = {dim} is not a multiple of 32")
        if size % patch:
            raise ValueError(f"size = {size} is not a multiple of patch = {patch}")
        tokenizer = word_tokenizer(captions, max_length, end=True)
        width = {"hidden_size": dim, "intermediate_size": 4 * dim, "num_attention_heads": dim // 32}
        text = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), num_hidden_layers=text_layers, projection_dim=dim,
            max_position_embeddings=max_length, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **width,
        )  # fmt: skip
        image = transformers.CLIPVisionConfig(
            image_size=size, patch_size=patch, num_hidden_layers=image_layers, projection_dim=dim,
            **width,
        )  # fmt: skip
        config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=dim)
        config._attn_implementation = "eager"
        return cls(transformers.CLIPModel(config), tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def embed_images(self, x: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, H, W) in [-1, 1], brought to the size the tower takes.

        Gradients flow back to ``x``.
        """
        side = self.model.config.vision_config.image_size
        x = x.to(self.device, torch.float32)
        if x.shape[2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        pixels = ((x + 1) / 2 - mean) / std
        return F.normalize(self.model.get_image_features(pixels).pooler_output, dim=1)

    def embed_captions(self, captions: Sequence[str] | Tensor) -> Tensor:
        """Unit vectors (B, D) of B captions, or of their token numbers (B, T); the zero vector for one that
        says nothing."""
        condition = self.text(self.text.ids(captions))
        return F.normalize(self.model.text_projection(condition.pooled), dim=1)

    def similarity(self, x: Tensor, captions: Sequence[str] | Tensor) -> Tensor:
        """Cosine (B,) in [-1, 1] of each picture with its caption; CLIPScore is its positive part times 2.5
        (Hessel et al. 2021, section 3).

        Args:
            x: pictures (B, 3, H, W) in [-1, 1].
            captions: B strings, or their token numbers (B, T).

        Raises:
            ValueError: there are not as many captions as pictures.
        """
        if len(x) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(x)} pictures: give one each")
        return (self.embed_images(x) * self.embed_captions(captions)).sum(1)

    def loss(self, x: Tensor, captions: Sequence[str] | Tensor) -> Tensor:
        """The contrastive loss (Radford et al. 2021, figure 3), a tensor of shape ().

        Cosines, divided by a learned temperature, are the logits of two classifications: which of the B
        captions belongs to this picture, and which of the B pictures to this caption? Where a caption
        occurs more than once in the batch, each of its pictures is as right as the others.

        Captions beyond the first B belong to none of the pictures, unless they repeat one of the first.
        Almost right ones ("hard negatives") teach what a batch of others does not ask for, such as whose
        hat is red (Yuksekgonul et al. 2023).

        Args:
            x: pictures (B, 3, H, W) in [-1, 1].
            captions: B strings, and any number of wrong ones; or the token numbers of all, (B + wrong, T).

        Raises:
            ValueError: there are fewer captions than pictures.
        """
        if len(captions) < len(x):
            raise ValueError(f"{len(captions)} captions for {len(x)} pictures: give one each")
        scale = self.model.logit_scale.exp().clamp(max=100)
        logits = scale * self.embed_images(x) @ self.embed_captions(captions).T  # (B, B + wrong)
        # Equal captions have equal logits, so to ask for one of them or for all alike is the same loss.
        right = torch.arange(len(x), device=logits.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T[: len(x)], right)) / 2

    def text_encoder(self, *, frozen: bool = True) -> TextEncoder:
        """A copy of the text tower as a text encoder for a denoiser; ``frozen`` as there."""
        text = copy.deepcopy(self.text)
        text.requires_grad_(True)
        text.frozen = frozen
        return text

    def save_pretrained(self, folder: StrPath, dtype: torch.dtype | None = None) -> None:
        """Write the files that ``transformers`` reads as a CLIPModel with its tokenizer and processor.

        Args:
            folder: where to, as :func:`~minidiff.files.fill_folder` does it.
            dtype: store weights so (torch.float16 halves the size); None as they are.
        """
        side = self.model.config.vision_config.image_size
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side},
            image_mean=list(self.mean), image_std=list(self.std),
        )  # fmt: skip
        state = {key: value.to(dtype).contiguous() for key, value in self.model.state_dict().items()}
        with fill_folder(folder) as scratch:
            self.model.save_pretrained(scratch, state_dict=state)
            self.text.save_tokenizer(scratch)
            processor.save_pretrained(scratch)

    @classmethod
    def from_pretrained(cls, name: StrPath, device: torch.device | str | None = None) -> "CLIP":
        """A trained CLIP, in eval mode, without gradients to its weights, in float32.

        Args:
            name: shipped with minidiff ("critters-clip", "critters-duo-clip"), a folder that
                :meth:`save_pretrained` or ``transformers`` wrote, or a Hugging Face hub id such as
                "openai/clip-vit-base-patch32".
            device: where to put it; None for the CPU.

        Raises:
            FileNotFoundError: no such model.
        """
        how: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
        try:
            place = locate_pretrained(name)
            with nothing_runs(name), checked_weights(place):
                model = transformers.CLIPModel.from_pretrained(place, **how)
                tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            processor = transformers.CLIPImageProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no CLIP {str(name)!r}: {first_line(error)}") from error
        clip = cls(model, tokenizer, processor.image_mean, processor.image_std)
        return clip.to(pick_device(device)).eval().requires_grad_(False)


def train_clip(
    clip: CLIP,
    batches: Iterable[tuple[Tensor, Sequence[str]]],
    steps: int = 1500,
    *,
    lr: float = 1e-3,
    warmup: int = 100,
    seed: int = 0,
    degrade: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Iterator[float]:
    """Train a CLIP in place, yielding the loss of each step.

    Args:
        clip: on its device.
        batches: pairs (x, captions) without end, as :meth:`CLIP.loss` takes them.
        steps: optimizer steps.
        lr: highest learning rate of AdamW. It follows torch's one-cycle policy: up over ``warmup`` steps,
            then down as a cosine, with the momentum the other way round.
        warmup: steps over which the learning rate rises; 30 % of the run at most.
        seed: of ``degrade``.
        degrade: makes pictures worse, ``degrade(x, generator)``, so that unsharp ones are understood too.

    Raises:
        ValueError: ``steps`` is smaller than 1, or the weights are frozen.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: train for at least 1")
    if not all(parameter.requires_grad for parameter in clip.parameters()):
        raise ValueError("weights of this CLIP are frozen: call clip.requires_grad_(True) first")
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(2, steps), pct_start=min(0.3, warmup / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    clip.train()
    try:
        for _, (x, captions) in zip(range(steps), batches, strict=False):
            if degrade is not None:
                x = degrade(x, generator)
            ids = clip.text.ids(captions)
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=has_bf16(clip.device)):
                loss = clip.loss(x.to(clip.device), ids)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield loss.item()
    finally:
        clip.eval()
