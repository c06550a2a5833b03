"""Two critters, and one vector that says it all: can the network draw a scene that it is told so?

In ``duo.py`` a model that is told the pooled vector of a frozen encoder fails. Is the vector to blame, or the
road? Here the encoder is an oracle. It knows the attributes that a caption states, and its one vector holds
each of them in a place of its own: who wears what, and who stands where. (It also says which critter is the
first where a caption leaves that to the order of its words.) All else is the pooled model of ``duo.py``:
drawings, captions, network, batches of 64, learning rate. The run stops where the rate would begin to fall,
after 3,000 of 5,000 steps; the rows of ``duo.json`` up to there were made at the same rate.

    python studies/oracle.py [--steps 3000] [--every 600]
"""

from collections.abc import Sequence
from itertools import islice

import torch
from common import options, write
from duo import SEED, errors, score
from torch import Tensor, nn

import minidiff as md
from minidiff import critters
from minidiff.condition import Condition
from minidiff.critters import PAIR_ATTRIBUTES, Critter, Critters, Scene
from minidiff.data import Batches

WHOLE = 5000  # steps of the recipe, over which the learning rate is planned
UNSAID = -1
TWINS = {
    relation: Scene(
        Critter("cat", "black", "top hat", "red", "green"),
        Critter("rabbit", "white", "crown", "blue", "green"),
        relation,
    )
    for relation in PAIR_ATTRIBUTES["relation"]
}
"""Scenes in which no word belongs to two attributes: what a caption of theirs states can be seen."""
TURNS = ("left of", "right of", "above", "below", "over", "under")


class Oracle(nn.Module):
    """An encoder that is told labels and gives one vector with a place for each value.

    Its "captions" are the labels of :data:`~minidiff.critters.PAIR_ATTRIBUTES` in their order, as a string of
    whole numbers, -1 for what is not said.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [len(values) for values in PAIR_ATTRIBUTES.values()]
        self.dim = sum(self.sizes)

    def ids(self, values: Sequence[str], /) -> Tensor:
        """(B, attributes) int64."""
        return torch.tensor([[int(number) for number in value.split()] for value in values])

    def forward(self, ids: Tensor) -> Condition:
        """As long as a vector of standard normal numbers if all is said. Its token is that vector, too."""
        places = [nn.functional.one_hot(ids[:, i] + 1, size + 1)[:, 1:] for i, size in enumerate(self.sizes)]
        pooled = torch.cat(places, 1).float() * (self.dim / len(self.sizes)) ** 0.5
        nothing = ids.new_zeros(len(ids), 1)
        return Condition(pooled[:, None], ~nothing.bool(), pooled)


def told(scene: Scene, names: set[str] | None = None) -> str:
    """What the oracle is told of a scene: the labels of these attributes; None for all."""
    labels = critters.labels(scene)
    return " ".join(str(labels[name] if names is None or name in names else UNSAID) for name in labels)


def stated(data: Critters, index: int, epoch: int) -> set[str]:
    """The attributes that ``data.caption(index, epoch)`` states.

    The same choices of words are made for a twin of the scene, in which each word has one meaning.
    """
    scene = data.scene(index)
    assert isinstance(scene, Scene)
    text = critters.caption(TWINS[scene.relation], data.chance(index, f"caption {epoch}"))
    found = {
        name
        for name, value in critters.words(TWINS[scene.relation]).items()
        if name != "relation" and f" {value} " in f" {text.replace(',', ' ')} "
    }
    return found | ({"relation"} if any(f" {turn} " in text for turn in TURNS) else set())


def main() -> None:
    """Train, score along the way, write the file."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=600, help="steps between scores")
    parser.add_argument("--prompts", type=int, default=128, help="pictures per split and score")
    arguments = parser.parse_args()
    data = Critters(40_000, count=2)
    torch.manual_seed(SEED)
    oracle = Oracle()
    net = md.UNet(patch=4, condition_dim=oracle.dim, conditioning="pooled", positions=True)
    model = md.Diffusion(net, md.Cosine(), target="x0", encoder=oracle, shape=(3, 64, 64))

    def say(index: int, epoch: int) -> str:
        scene = data.scene(index)
        assert isinstance(scene, Scene)
        return told(scene, stated(data, index, epoch))

    batches = Batches(data.images(), say, 64, seed=SEED)
    rows = []
    run = md.train(model, batches, WHOLE, weighting="snr_plus_one", seed=SEED)
    for step in islice(run, arguments.steps):
        count = step.index + 1
        if count % 100 == 0:
            print(f"step {count}: loss {step.loss:.4f}", flush=True)
        if count % arguments.every == 0:
            by_kind = {"errors": errors(step.ema, 2 * arguments.prompts, say=told)}
            rows.append(
                {"conditioning": "oracle", "steps": count}
                | by_kind
                | score(step.ema, arguments.prompts, told)
            )
            write("duo_oracle", settings=vars(arguments), seed=SEED, rows=rows)
            print(rows[-1]["errors"], flush=True)


if __name__ == "__main__":
    main()
