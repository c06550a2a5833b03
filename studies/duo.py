"""Two critters in one picture: does one vector hold who wears what, and who stands where?

Two models of the recipe critters-duo, told the text by both roads or by the pooled vector alone, learn from
the same drawings for the same number of steps. Along the way each is asked for scenes that state everything.
The file holds the curve, and of the finished models what ``minidiff evaluate FOLDER/both`` says; beside it
lies what they draw, the first one above, of two prompts that differ by an exchange of places.

    python studies/duo.py FOLDER [--every 600]

A study that was stopped goes on where its folder stops.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, options, so_far, write

import minidiff as md
from minidiff import critters
from minidiff.critters import AttributeReader, Critters, Scene
from minidiff.critters.scores import shares_of_two
from minidiff.fit import fit
from minidiff.pixels import from_bytes, save_grid
from minidiff.recipes import get_recipe
from minidiff.state import saved_steps

SEED = 0
PROMPTS = (
    "a black cat in a red top hat left of a white rabbit in a blue crown on a green background",
    "a white rabbit in a blue crown left of a black cat in a red top hat on a green background",
)


def score(model: md.Diffusion, n: int, say: Callable[[Scene], str] = critters.prompt) -> dict[str, Any]:
    """Shares of ``n`` pictures of each split in which this or that is right, ten steps each; ``say`` makes
    what the model is told."""
    reader, pipe = AttributeReader.from_pretrained("critters-duo-reader"), md.TextToImage(model)
    shares = {}
    for split in ("train", "held_out"):
        rng = random.Random(f"study duo {split}")
        expected = [critters.sample_scene(rng, split) for _ in range(n)]
        x = pipe([say(scene) for scene in expected], steps=10, seed=SEED).tensors
        right = shares_of_two(reader.read(x), [critters.words(scene) for scene in expected])
        shares[split] = {what: share._asdict() for what, share in right.items()}
    return shares


@torch.no_grad()
def errors(
    model: md.Diffusion, n: int, t: float = 0.8, say: Callable[[Scene], str] = critters.prompt
) -> dict[str, float]:
    """Mean squared error of the guess of x0 at time ``t``, with the truth as its prompt or an exchange of it.

    It tells what a model has learned to use long before its pictures show it.
    """
    rendering = Critters(n, seed=2**30, count=2).render()
    x0 = from_bytes(rendering.images)
    scenes = [scene for scene in rendering.scenes if isinstance(scene, Scene)]
    level = model.schedule(torch.full((n,), t))
    x_t = md.diffuse(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED)), level)
    found = {}
    for kind in ("truth", "place", "hat", "hat_color"):  # those that can always be exchanged
        stated = [scene if kind == "truth" else critters.exchange(scene, kind) for scene in scenes]
        condition = model.encode([say(scene) for scene in stated if scene is not None])
        found[kind] = float((model.denoise(x_t, level, condition).x0 - x0).square().mean())
    return found


def main() -> None:
    """Run the study and write its file."""
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, help="where the two models go")
    parser.add_argument("--every", type=int, default=600, help="steps between scores")
    parser.add_argument("--prompts", type=int, default=128, help="pictures per split and score")
    arguments = parser.parse_args()
    settings = {name: value for name, value in vars(arguments).items() if name != "folder"}
    rows, pictures = so_far("duo", settings), []
    for conditioning in ("both", "pooled"):
        recipe = get_recipe("critters-duo", conditioning=conditioning)
        folder = arguments.folder / conditioning
        resume = (folder / "training.safetensors").exists()
        # Steps that a stopped run has scored and not saved are made, and scored, again.
        reached = saved_steps(folder) if resume else 0
        rows = [r for r in rows if r["conditioning"] != conditioning or r["steps"] <= reached]
        for step in fit(recipe, folder, resume=resume, save_every=arguments.every):
            count = step.index + 1
            if count % arguments.every == 0 or count == recipe.steps:
                described = {"conditioning": conditioning, "steps": count}
                by_kind = {"errors": errors(step.ema, 2 * arguments.prompts)}
                rows.append(described | by_kind | score(step.ema, arguments.prompts))
                write("duo", settings=settings, seed=SEED, prompts=PROMPTS, rows=rows)
        pipe = md.TextToImage.from_pretrained(folder)
        pictures.append(pipe(list(PROMPTS), num_images=6, seed=SEED).tensors)
        final = critters.evaluate(pipe, 2, seed=SEED)
        last = max((r for r in rows if r["conditioning"] == conditioning), key=lambda r: r["steps"])
        last["final"] = {name: share._asdict() for name, share in final.items()}
        write("duo", settings=settings, seed=SEED, prompts=PROMPTS, rows=rows)
    save_grid(torch.cat(pictures), RESULTS / "duo.png", ncols=6)


if __name__ == "__main__":
    main()
