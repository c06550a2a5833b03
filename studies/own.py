"""What does a model draw that was trained as the book says: one command, two cores, five minutes?

Eight drawings of each pair that no picture of the training shows, from the seeds 0 to 7, none left out, and
whether the reader sees animal and hat in them. Of the three seeds in ``benchmarks/records`` number 1 is the
median of the held-out pairs.

    minidiff train critters --steps 400 --seed 1 --output runs/own
    python studies/own.py runs/own
"""

from pathlib import Path

import torch
from common import RESULTS, options, write

import minidiff as md
from minidiff import critters
from minidiff.pixels import save_grid
from minidiff.state import saved_steps

EACH = 8


def main() -> None:
    """Draw, ask the reader, write the two files."""
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, help="the run, as `minidiff train` left it")
    folder = parser.parse_args().folder
    pipe = md.TextToImage.from_pretrained(folder)
    reader = critters.AttributeReader.from_pretrained()
    prompts = [f"a {animal} in a {hat}" for animal, hat in critters.HELD_OUT]
    # Prompt by prompt: the seeds 0 to 7 for each.
    drawn = [pipe(prompt, num_images=EACH).tensors for prompt in prompts]
    right = {}
    for prompt, (animal, hat), x in zip(prompts, critters.HELD_OUT, drawn, strict=True):
        right[prompt] = [seen["animal"] == animal and seen["hat"] == hat for seen in reader.read(x)]
    save_grid(torch.cat(drawn), RESULTS / "own.png", ncols=EACH)
    write("own", steps=saved_steps(folder), each=EACH, right=right)


if __name__ == "__main__":
    main()
