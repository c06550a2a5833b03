"""Text to image on a folder of captioned pictures, step by step: what `minidiff train FOLDER` does.

python examples/folder.py path/to/folder "a red kite over the sea"
"""

import sys

import torch

import minidiff as md
from minidiff.data import Batches, captioned_folder


def main(folder: str, prompt: str, steps: int = 2000, size: int = 64, output: str = "runs/mine") -> None:
    """Train on the folder, keep the model in ``output``, draw the prompt."""
    torch.manual_seed(0)
    images, captions, *_ = found = captioned_folder(folder, size)  # (N, 3, size, size) bytes
    print(*found.notes, f"{len(images)} pictures, such as {captions[0]!r}", sep="\n")

    # An encoder that learns the words of these captions with the network. One that knows more:
    # md.TextEncoder.from_pretrained("openai/clip-vit-base-patch32")
    encoder = md.TextEncoder.from_captions(captions)
    net = md.UNet(patch=max(1, size // 16), condition_dim=encoder.dim)
    model = md.Diffusion(net, md.Cosine(), target="x0", encoder=encoder, shape=(3, size, size))

    batches = Batches(images, captions, batch_size=min(64, len(images)))
    for step in md.train(model, batches, steps, weighting="snr_plus_one"):
        if step.index % 100 == 0:
            print(f"step {step.index:5}  loss {step.loss:.3f}")
        if step.index % 500 == 499:
            step.ema.save_pretrained(output)

    step.ema.save_pretrained(output)
    pipe = md.TextToImage.from_pretrained(output)
    pipe(prompt, guidance=3.0, seed=0).images[0].save("drawn.png")
    print(f"{output}, drawn.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
