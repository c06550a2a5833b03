"""Words never trained on: does a model understand "kitty" if it only ever read "cat"?

Two models learn from the same pictures and captions. One has a sentence encoder that was trained before
on a billion pairs of sentences (all-MiniLM-L6-v2) and stays as it is; the other learns its words from
the captions. Then each is asked for critters with one word replaced by a synonym that no caption holds.
The attribute reader says whether the picture shows what the synonym stands for.

    python studies/words.py PATH/TO/all-MiniLM-L6-v2 [--steps 1500]

The list below was fixed before the first measurement. See studies/README.md for how to get the encoder
without a hub.
"""

import argparse
import random
import warnings

import torch
from common import fit, small_model, write

import minidiff as md
from minidiff.data import AttributeReader, critters
from minidiff.metrics import proportion

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
    made = []
    while len(made) < n:
        critter = critters.sample(rng)
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
            made.append(
                text.replace(f"{stands_for} {critter.animal}", f"{synonym} {critter.animal}")
            )
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


def score(pipe: md.TextToImage, reader: AttributeReader, n: int, guidance: float) -> dict:
    """Of each synonym how many of ``n`` pictures show what it stands for."""
    found = {}
    for attribute, words in SYNONYMS.items():
        for synonym, stands_for in words.items():
            asked = prompts(attribute, synonym, stands_for, n)
            seen = reader.read(pipe(asked, steps=20, guidance=guidance).tensors)
            found[synonym] = sum(s[attribute] == stands_for for s in seen)
    return found


def main() -> None:
    """Run the study and write its file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("encoder")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--prompts", type=int, default=8, help="pictures per synonym")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--keep", help="folder to save both models in")
    arguments = parser.parse_args()
    words = [word for group in SYNONYMS.values() for text in group for word in text.split()]
    trained = set(critters.vocabulary()) - {"hat"}
    assert not trained & set(words), f"not unseen: {trained & set(words)}"
    reader, rows = AttributeReader.from_pretrained(), {}
    for name in ("pre-trained", "from scratch"):
        torch.manual_seed(0)
        text = (
            md.TextEncoder.from_pretrained(arguments.encoder)
            if name == "pre-trained"
            else md.TextEncoder.from_captions([*critters.vocabulary(), ","])
        )
        model, seconds = fit(
            small_model(text), arguments.steps, 0, images=arguments.images, fixed_captions=True
        )
        pipe, rng = md.TextToImage(model), random.Random(1)
        if arguments.keep:
            model.save_pretrained(f"{arguments.keep}/{name.replace(' ', '-')}")
        wanted = [critters.sample(rng) for _ in range(256)]
        drawn = pipe([critters.prompt(c, tuple(critters.ATTRIBUTES)) for c in wanted]).tensors
        known = sum(reader.correct(drawn, wanted, tuple(critters.ATTRIBUTES)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the other model names every word it does not know
            found = score(pipe, reader, arguments.prompts, arguments.guidance)
        right = proportion(sum(found.values()), arguments.prompts * len(found))
        rows[name] = {
            "synonyms": right._asdict(), "trained words": proportion(known, 256)._asdict(),
            "by word": found, "seconds": seconds,
        }  # fmt: skip
        print(f"{name:14} trained words {proportion(known, 256)}; synonyms {right}", flush=True)
    write(
        "words",
        settings=vars(arguments) | {"encoder": "all-MiniLM-L6-v2", "keep": None},
        synonyms=SYNONYMS,
        rows=rows,
    )


if __name__ == "__main__":
    main()
