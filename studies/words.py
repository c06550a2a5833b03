"""Words never trained on: does a model understand "kitty" if it only ever read "cat"?

Two models learn from the same pictures and captions, three times. One has a sentence encoder that was
trained before on a billion pairs of sentences (all-MiniLM-L6-v2) and stays as it is, less the directions in
which the captions hardly differ. The other learns its words from the captions. Then each is asked for
critters with one word replaced by a synonym that no caption holds. The attribute reader says whether the
picture shows what the synonym stands for.

    python studies/words.py PATH/TO/all-MiniLM-L6-v2 [--steps 800]

The list below was fixed before the first measurement. See studies/README.md for how to get the encoder
without a hub.
"""

import copy
import random
import statistics
import warnings

import torch
import torch.nn.functional as F
from common import fit, options, over_runs, small_model, write

import minidiff as md
from minidiff import critters
from minidiff.critters import AttributeReader

SEEDS = (0, 1, 2)
SYNONYMS: dict[str, dict[str, str]] = {
    "animal": {
        "kitty": "cat", "kitten": "cat", "feline": "cat", "tomcat": "cat", "pussycat": "cat",
        "tabby": "cat", "puppy": "dog", "hound": "dog", "pooch": "dog", "doggy": "dog", "canine": "dog",
        "poodle": "dog", "bunny": "rabbit", "hare": "rabbit", "grizzly": "bear", "teddy": "bear",
        "bruin": "bear", "hog": "pig", "piglet": "pig", "swine": "pig", "piggy": "pig", "boar": "pig",
        "toad": "frog", "bullfrog": "frog", "amphibian": "frog", "froggy": "frog", "vixen": "fox",
    },
    "fur": {
        "ginger": "orange", "grey": "gray", "ebony": "black", "snowy": "white", "ivory": "white",
        "chestnut": "brown", "chocolate": "brown",
    },
    "hat": {
        "tiara": "crown", "coronet": "crown", "diadem": "crown", "bonnet": "beanie", "toque": "beanie",
        "visor": "cap", "stovepipe hat": "top hat", "witch hat": "wizard hat",
        "sorcerer hat": "wizard hat", "magic hat": "wizard hat", "birthday hat": "party hat",
    },
    "hat_color": {
        "crimson": "red", "scarlet": "red", "golden": "yellow", "lemon": "yellow", "emerald": "green",
        "azure": "blue", "navy": "blue", "violet": "purple", "lilac": "purple",
    },
    "background": {"rose": "pink", "lime": "green", "turquoise": "blue"},
}  # fmt: skip


def prompts(attribute: str, synonym: str, stands_for: str, n: int) -> list[str]:
    """``n`` prompts with the synonym; everything else in them is a word of the captions."""
    rng = random.Random(f"{attribute} {synonym}")
    made: list[str] = []
    while len(made) < n:
        critter = critters.sample_critter(rng)
        if getattr(critter, attribute) != stands_for:
            continue
        said = {"animal": ("animal", "hat"), "hat": ("animal", "hat")}.get(
            attribute, ("animal", "hat", attribute)
        )
        text = critters.prompt(critter, said)
        # The background's colour may also be that of fur or hat: replace the word in its own place.
        if attribute == "background":
            made.append(text.replace(f"{stands_for} background", f"{synonym} background"))
        elif attribute == "fur":
            made.append(text.replace(f"{stands_for} {critter.animal}", f"{synonym} {critter.animal}"))
        elif attribute == "hat_color":
            made.append(text.replace(f"{stands_for} {critter.hat}", f"{synonym} {critter.hat}"))
        else:
            made.append(text.replace(stands_for, synonym))
    return [with_article(text) for text in made]


def with_article(text: str) -> str:
    """ "a azure crown" is "an azure crown"."""
    words = text.split()
    for i in range(len(words) - 1):
        if words[i] in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return " ".join(words)


def nearest(encoder: md.TextEncoder) -> dict[str, str]:
    """Of each synonym, the trained word of its kind that lies nearest in the encoder's space, by itself.

    No denoiser has a part in this: it is what the encoder knows of single words.
    """
    found: dict[str, str] = {}
    with torch.no_grad():
        for attribute, words in SYNONYMS.items():
            values = critters.ATTRIBUTES[attribute]
            said, known = (F.normalize(encoder(list(part)).pooled, dim=1) for part in (words, values))
            closest = (said @ known.T).argmax(1).tolist()
            found |= {word: values[i] for word, i in zip(words, closest, strict=True)}
    return found


def score(
    pipe: md.TextToImage, reader: AttributeReader, seed: int, n: int, guidance: float
) -> tuple[dict[str, int], dict[str, int]]:
    """Of each synonym, and of each trained word it stands for, how many of ``n`` pictures are right."""
    found: dict[str, int] = {}
    known: dict[str, int] = {}
    number = 0
    for attribute, words in SYNONYMS.items():
        pairs = [*words.items(), *((word, word) for word in sorted(set(words.values())))]
        for said, stands_for in pairs:
            number += 1  # other noise for every word
            drawn = pipe(
                prompts(attribute, said, stands_for, n),
                steps=20, guidance=guidance, seed=100_000 * seed + 1000 * number,
            )  # fmt: skip
            seen = reader.read(drawn.tensors)
            right = sum(s[attribute] == stands_for for s in seen)
            if said == stands_for:
                known[f"{attribute} {said}"] = right
            else:
                found[said] = right
    return found, known


def main() -> None:
    """Run the study and write its file."""
    parser = options(__doc__)
    parser.add_argument("encoder")
    parser.add_argument("--name", default="all-MiniLM-L6-v2", help="of the encoder, for the record")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--prompts", type=int, default=8, help="pictures per word and run")
    parser.add_argument("--conditioning", default="pooled", help="both, pooled or tokens")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--variance", type=float, default=0.95, help="of the pre-trained vectors, to keep")
    arguments = parser.parse_args()
    reader, rows = AttributeReader.from_pretrained(), {}
    pretrained = md.TextEncoder.from_pretrained(arguments.encoder)
    by_itself = nearest(pretrained)
    pretrained.reduce(critters.Critters(arguments.images).captions(), arguments.variance)
    print(f"{pretrained.dim} dimensions hold {100 * arguments.variance:g} % of the variance", flush=True)
    for name in ("pre-trained", "from scratch"):
        runs = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            text = (
                copy.deepcopy(pretrained)
                if name == "pre-trained"
                else md.TextEncoder.from_captions([*critters.vocabulary(), ","])
            )
            model, _ = fit(
                small_model(text, conditioning=arguments.conditioning), arguments.steps, seed,
                images=arguments.images, fixed_captions=True,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the other model names every word it does not know
                runs.append(score(md.TextToImage(model), reader, seed, arguments.prompts, arguments.guidance))
            print(name, seed, runs[-1], flush=True)
        rows[name] = {
            # The share of each word first, so that words count alike; then over the runs.
            what: over_runs([statistics.fmean(run[i].values()) / arguments.prompts for run in runs])
            for i, what in enumerate(("synonyms", "trained words"))
        }
        rows[name]["by word"] = {word: sum(run[0][word] for run in runs) for word in runs[0][0]}
        settings = vars(arguments) | {"encoder": arguments.name, "dimensions": pretrained.dim}
        write("words", settings=settings, seeds=SEEDS, synonyms=SYNONYMS, nearest=by_itself, rows=rows)


if __name__ == "__main__":
    main()
