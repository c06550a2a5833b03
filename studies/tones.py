"""What does the shipped model of tones get right, and does the network's view of the wave matter?

* by guidance: the scores of `minidiff evaluate tones`, 256 prompts a split, at three guidance scales;
* by view: after a short training of each, the error of x0 on fresh sounds, level by level, of two networks
  that differ in one thing: they see the wave in lapped frames of 128 samples, or in plain stretches of 128.

    python studies/tones.py
    python studies/tones.py --view
"""

from typing import Any

import torch
from common import options, write

import minidiff as md
from minidiff import tones
from minidiff.data import Batches
from minidiff.recipes import get_recipe
from minidiff.sounds import from_int16

SCALES, TIMES = (1.0, 2.0, 3.0), (0.1, 0.3, 0.5, 0.7, 0.9)


def plain_view(model: md.Diffusion) -> md.Diffusion:
    """The recipe's model with patches in place of frames."""
    encoder: Any = model.encoder
    wave_net: Any = model.net
    text = md.TextEncoder.from_captions(tones.vocabulary())
    net = md.UNet(
        1, wave_net.config["width"], tuple(wave_net.config["multipliers"]), patch=wave_net.config["frame"],
        condition_dim=encoder.dim, positions=True, dims=1,
    )  # fmt: skip
    return md.Diffusion(net, model.schedule, target=model.target, encoder=text, shape=model.shape)


@torch.no_grad()
def errors(model: md.Diffusion, x0: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Squared error of x0 at some times, divided by the variance of the data."""
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    condition, found = model.encode(captions), {}
    for t in TIMES:
        level = model.schedule(torch.tensor(t))
        x_t = md.diffuse(x0, eps, level)
        guess = torch.cat(
            [
                model.denoise(x_t[i : i + 64], level, condition.take(range(i, i + 64))).x0
                for i in range(0, len(x0), 64)
            ]
        )
        found[f"{t}"] = float((guess - x0).square().mean() / x0.square().mean())
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--view", action="store_true", help="compare the views, in place of the scores")
    parser.add_argument("--model", default="tones", help="shipped name or folder")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="guidance scales")
    parser.add_argument("--prompts", type=int, default=256, help="prompts a split")
    parser.add_argument("--steps", type=int, default=400, help="of the short trainings")
    arguments = parser.parse_args()
    if arguments.view:
        write("tones_view", settings={"steps": arguments.steps}, **{"by view": views(arguments.steps)})
        return
    pipe, found = md.TextToSound.from_pretrained(arguments.model), {}
    for scale in arguments.scales:
        scores = tones.evaluate(pipe, prompts=arguments.prompts, guidance=scale)
        found[f"{scale:g}"] = {name: score._asdict() for name, score in scores.items()}
        print(scale, {name: str(score) for name, score in scores.items()}, flush=True)
    write("tones", settings={"prompts": arguments.prompts}, **{"by guidance": found})


def views(steps: int) -> dict[str, dict[str, float]]:
    """The errors of both networks after ``steps`` steps."""
    recipe = get_recipe("tones", images=4000)
    fresh = tones.Tones(256, seed=2**29 + 7)
    x0, captions = from_int16(fresh.waves()), [fresh.caption(i) for i in range(256)]
    found = {}
    for name in ("lapped frames", "plain stretches"):
        torch.manual_seed(0)
        model = get_recipe("tones").model if name == "lapped frames" else plain_view(recipe.model)
        batches = Batches(recipe.source.images, recipe.source.caption, 64)
        for step in md.train(model, batches, steps, weighting=recipe.weighting):
            if step.index % 100 == 99:
                print(name, step.index + 1, round(step.loss, 4), flush=True)
        found[name] = errors(step.ema, x0, captions)
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    main()
