"""The shipped model, and the pipeline around it."""

import json
import warnings

import pytest
import torch

import minidiff as md
from minidiff.critters import AttributeReader, Critter, accuracy, evaluate, reader_accuracy
from minidiff.files import SHIPPED
from minidiff.metrics import Interval


@pytest.fixture(scope="module")
def pipe() -> md.TextToImage:
    return md.TextToImage.from_pretrained("critters", device="cpu")


def tiny(target: str = "x0", text: bool = True) -> md.Diffusion:
    encoder = md.TextEncoder.from_captions(["a cat in a top hat"], dim=32, layers=1) if text else None
    net = md.UNet(width=32, multipliers=(1,), attention=(0,), condition_dim=32 if text else None)
    return md.Diffusion(net, md.Cosine(), target, encoder, shape=(3, 16, 16))


def test_shipped_files_are_small_and_hold_no_pickle():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    for path in files:
        assert path.suffix in {".json", ".safetensors", ".md"}, path
        assert path.stat().st_size <= 16e6, path


@pytest.mark.parametrize("name", ["critters", "critters-duo", "fashion-mnist", "tones"])
def test_the_model_card_quotes_the_scores_that_were_measured(name):
    scores = json.loads((SHIPPED / name / "scores.json").read_text())
    card = (SHIPPED / name / "README.md").read_text()
    for name, score in scores.items():
        assert f"| {name} | {Interval(**score)} |" in card


def test_shipped_model_draws_cats_in_top_hats_which_training_never_showed(pipe):
    wanted = [
        Critter("cat", fur, "top hat", color, "green")
        for fur in ("orange", "gray", "black", "white")
        for color in ("red", "yellow", "green", "blue")
    ]
    prompts = [f"a {c.fur} cat in a {c.hat_color} top hat" for c in wanted]
    x = pipe(prompts, seed=1).tensors
    assert accuracy(AttributeReader.from_pretrained(), x, wanted).value >= 14 / 16


def test_shipped_duo_puts_each_where_the_prompt_says():
    """The same words in two orders: what is left changes places. Colours are not asked for."""
    pipe = md.TextToImage.from_pretrained("critters-duo", device="cpu")
    told = ("a black cat in a red top hat", "a pink pig in a blue crown")
    prompts = ["{} left of {}".format(*told), "{} left of {}".format(*reversed(told))]
    x = pipe(prompts, num_images=4, steps=10, seed=0).tensors
    read = AttributeReader.from_pretrained("critters-duo-reader").read(x)
    found = [(r["relation"], r["first_animal"], r["second_animal"]) for r in read]
    expected = [("left of", "cat", "pig")] * 4 + [("left of", "pig", "cat")] * 4
    assert sum(f == e for f, e in zip(found, expected, strict=True)) >= 7


def test_the_prompt_is_followed_because_of_the_prompt(pipe):
    """The same noise, another prompt, another picture: nothing here is by chance."""
    reader = AttributeReader.from_pretrained()
    seen = reader.read(pipe(["a pig in a crown", "a panda in a cap"], seed=3).tensors)
    assert [(s["animal"], s["hat"]) for s in seen] == [("pig", "crown"), ("panda", "cap")]
    swapped = reader.read(pipe(["a panda in a cap", "a pig in a crown"], seed=3).tensors)
    assert [(s["animal"], s["hat"]) for s in swapped] == [("panda", "cap"), ("pig", "crown")]


def test_one_seed_one_result_whatever_the_batch(pipe):
    four = pipe("a cat in a top hat", num_images=4, seed=5, steps=6)
    again = pipe("a cat in a top hat", num_images=4, seed=5, steps=6, batch_size=3)
    alone = pipe("a cat in a top hat", seed=7, steps=6)
    mixed = pipe(["a dog", "an orange cat in a red crown", "a cat in a top hat"], seed=5, steps=6)
    assert torch.allclose(four.tensors, again.tensors, atol=1e-3)
    assert torch.allclose(four.tensors[2], alone.tensors[0], atol=1e-3)
    assert torch.allclose(four.tensors[2], mixed.tensors[2], atol=1e-3)
    assert (four.tensors[0] - four.tensors[1]).abs().mean() > 0.02
    other = pipe("a cat in a top hat", num_images=4, seed=50, steps=6)
    assert (four.tensors - other.tensors).abs().mean() > 0.02


def test_images_are_pil_at_the_trained_size(pipe):
    drawn = pipe("a fox in a crown", steps=2)
    assert drawn.images[0].size == (64, 64)
    assert drawn.tensors.shape == (1, 3, 64, 64)
    assert drawn.tensors.abs().max() <= 1


def test_unknown_words_are_named(pipe):
    with pytest.warns(UserWarning, match="'zebra'"):
        pipe("a zebra in a top hat", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a cat in a top hat", steps=1)


def test_every_sampler_runs_and_negative_prompts_change_the_picture(pipe):
    plain = {name: pipe("a bear in a cap", steps=4, seed=2, sampler=name).tensors for name in SAMPLERS}
    assert all(x.isfinite().all() for x in plain.values())
    away = pipe("a bear in a cap", steps=4, seed=2, negative="a green background").tensors
    assert (away - plain["dpmpp_2m"]).abs().mean() > 1e-3


def by_hand(pipe, prompt: str | None, seed: int, steps: int, **guidance) -> torch.Tensor:
    """One image, put together from the parts that the book shows."""
    model, generator = pipe.model, md.generators(seed, 1)
    levels = model.schedule.levels(steps)
    with torch.no_grad():
        if prompt is None:
            denoise = md.clamp(model.denoise)
        else:
            denoise = md.clamp(md.guide(model.denoise, model.encode([prompt]), **guidance))
        x = md.noise((1, *model.shape), levels[0], generator=generator)
        return md.sample(md.dpmpp_2m(denoise, x, levels)).float().clamp(-1, 1)


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    """The same but for the order of sums in float32."""
    return x.shape == y.shape and torch.allclose(x, y, atol=1e-3)


def test_the_pipeline_is_its_parts(pipe):
    settings = {"interval": (0.1, 0.8), "rescale": 0.7}
    found = pipe("a fox in a cap", seed=4, steps=3, guidance=6.0, **settings).tensors
    assert close(found, by_hand(pipe, "a fox in a cap", 4, 3, scale=6.0, **settings))
    plain = pipe("a fox in a cap", seed=4, steps=3, guidance=6.0).tensors
    for name, value in settings.items():
        one = pipe("a fox in a cap", seed=4, steps=3, guidance=6.0, **{name: value}).tensors
        assert (one - found).abs().mean() > 1e-3
        assert (one - plain).abs().mean() > 1e-3


@pytest.mark.filterwarnings("ignore:not in the vocabulary")
@pytest.mark.parametrize("prompt", ["", "  ", "кот в шляпе", "🐱🎩", "q" * 10_000])
def test_a_prompt_that_says_nothing_draws_anything(pipe, prompt):
    """And one line says so, at the line of the caller."""
    with pytest.warns(UserWarning, match="^nothing to follow in .*: drawn without a prompt$") as said:
        found = pipe(prompt, seed=6, steps=2).tensors
    said = [w for w in said if str(w.message).startswith("nothing")]
    assert len(said) == 1
    assert len(str(said[0].message)) < 120
    assert said[0].filename == __file__
    assert close(found, by_hand(pipe, None, 6, 2))


def test_prompts_of_all_kinds_do_not_disturb_each_other(pipe):
    """Image i is that of its prompt alone; the warnings of all prompts are said once."""
    long = "a cat in a top hat, " * 500  # 10,000 characters
    prompts = ["a bear in a crown", "", "an 🐱 owl", long, "кот", "a gray fox wearing a green cap"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        together = pipe(prompts, seed=10, steps=3, negative="a red hat").tensors
    lines = [str(w.message) for w in said]
    assert "nothing to follow in ['', 'кот']: drawn without a prompt" in lines
    assert len(lines) == 3, lines
    assert any("'🐱', " in line and "'кот'" in line for line in lines)
    assert any("only 32 tokens are read; ignored: 'a top hat, a cat" in line for line in lines)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [
            pipe(prompt, seed=10 + i, steps=3, negative="a red hat").tensors
            for i, prompt in enumerate(prompts)
        ]
    assert close(together, torch.cat(alone))
    read = pipe("a cat in a top hat, " * 4 + "a cat in a", seed=13, steps=3, negative="a red hat")
    assert close(together[3:4], read.tensors)  # 32 words and commas


def test_each_prompt_may_have_its_own_negative(pipe):
    prompts, negatives = ["a dog in a cap", "a pig in a crown"], ["a green background", ""]
    found = pipe(prompts, num_images=2, negative=negatives, seed=3, steps=3, batch_size=3).tensors
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = pipe(prompt, num_images=2, negative=negative, seed=3 + 2 * i, steps=3).tensors
        assert close(found[2 * i : 2 * i + 2], alone)
    none = pipe(prompts, num_images=2, seed=3, steps=3).tensors
    assert (found[:2] - none[:2]).abs().mean() > 1e-3
    assert close(found[2:], none[2:])  # to stay away from nothing is to have no negative prompt


SAMPLERS = ("ddpm", "ddim", "heun", "dpmpp_2m", "adams")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_images": 0}, "num_images = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"sampler": "euler"}, "unknown sampler 'euler'.*ddim"),
        ({"size": (30, 30)}, r"\(1, 3, 30, 30\)|\(2, 3, 30, 30\)"),
        ({"guidance": float("nan")}, "guidance = nan: give a finite number"),
        ({"guidance": float("inf")}, "guidance = inf: give a finite number"),
        ({"interval": (0.8, 0.2)}, r"interval = \(0.8, 0.2\): .*low <= high"),
        ({"rescale": 1.5}, r"rescale = 1.5 is a share: give it in \[0, 1\]"),
        ({"negative": ["a hat", "a cap"]}, "2 negative prompts for 1 prompts: give one string"),
        ({"negative": []}, "0 negative prompts for 1 prompts"),
        ({"negative": [None]}, "negative None is no string"),
        ({"negative": 7}, "negative 7 is no string"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        md.TextToImage(tiny())("a cat", **arguments)


@pytest.mark.parametrize("prompt", [None, 3, ["a cat", 3], [["a cat"]], b"cat", torch.zeros(2, 2)])
def test_prompts_that_are_no_strings_are_named(prompt):
    with pytest.raises(ValueError, match=r"^prompt .* is no string: give one string, or") as error:
        md.TextToImage(tiny())(prompt)
    assert len(str(error.value)) < 120


def test_models_that_cannot_follow_a_prompt_are_refused():
    with pytest.raises(ValueError, match="no text encoder"):
        md.TextToImage(tiny(text=False))
    with pytest.raises(ValueError, match="no prompt"):
        md.TextToImage(tiny())([])


@pytest.mark.parametrize("name", ["no-such-model", "some/where/else"])
def test_a_missing_model_is_one_clear_line(name):
    with pytest.raises(FileNotFoundError, match=f"no model '{name}'.*critters") as error:
        md.TextToImage.from_pretrained(name)
    assert "\n" not in str(error.value)


def test_a_hub_model_that_cannot_be_had_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no model 'nobody/nothing'.*hub \(") as error:
        md.TextToImage.from_pretrained("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json and model\.safetensors missing"):
        md.TextToImage.from_pretrained(tmp_path)


def test_the_reader_reads_fresh_renders():
    scores = reader_accuracy(AttributeReader.from_pretrained(), n=1024, seed=77)
    assert scores["animal and hat"].value >= 0.99
    assert scores["all attributes"].value >= 0.98


def test_the_reader_can_say_no():
    """A score that could not fail would prove nothing: wrong labels must read as wrong."""
    reader = AttributeReader.from_pretrained()
    rendering = md.critters.Critters(128, split="all", seed=78).render(workers=1)
    x = rendering.images.float() / 127.5 - 1
    wrong = [rendering.scenes[(i + 1) % 128] for i in range(128)]
    assert accuracy(reader, x, wrong).value < 0.15
    assert accuracy(reader, torch.randn_like(x), rendering.scenes).value < 0.2


@pytest.mark.filterwarnings("ignore:a Fréchet distance of 40 samples")
def test_evaluation_scores_every_split(pipe):
    scores = evaluate(pipe, prompts=40, steps=4)
    assert {"seen: animal and hat", "held-out: animal and hat"} <= set(scores)
    for name, score in scores.items():
        assert score.low <= score.value <= score.high, name
    assert scores["seen: animal and hat"].n == 40
    untrained = evaluate(md.TextToImage(untrained_critters(pipe)), prompts=16, steps=2)
    assert untrained["seen: animal and hat"].value < 0.3


def untrained_critters(pipe: md.TextToImage) -> md.Diffusion:
    net = md.UNet(width=32, multipliers=(1,), attention=(0,), condition_dim=pipe.model.encoder.dim)
    return md.Diffusion(net, md.Cosine(), "x0", pipe.model.encoder, shape=(3, 64, 64))


def test_evaluation_refuses_a_model_of_something_else():
    with pytest.raises(ValueError, match="not a critters model"):
        evaluate(md.TextToImage(tiny()), prompts=2)
