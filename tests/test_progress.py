"""What the command says while it works: bars, how long it will take, warnings."""

import io
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from networks import perturbed
from test_cli import run
from texts import small

import minidiff as md
from minidiff import cli, progress


@cache
def pipe() -> md.TextToImage:
    """Draws 16x16 pixels, other ones for other words."""
    net = perturbed(md.UNet(width=32, multipliers=(1,), attention=(0,), condition_dim=32)).float()
    return md.TextToImage(md.Diffusion(net, md.Cosine(), "x0", small(), shape=(3, 16, 16)).eval())


def draw(**options: object) -> md.pipeline.Images:
    return pipe()("Hat", **options)  # type: ignore[arg-type]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """Standard error, a terminal on which bars appear at once. To be called in a test: between fixtures and
    test pytest takes standard error back."""
    screen = Terminal()
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, to be set by the test."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a model that draws 16x16 pixels."""
    folder = tmp_path_factory.mktemp("model")
    pipe().model.save_pretrained(folder)
    return folder


def work(clock: list[float], seconds: float, total: int, **options: object) -> None:
    """A bar for work of ``total`` steps, of ``seconds`` each."""
    with progress.Bar(total=total, desc="many images", **options) as bar:
        clock[0] += 1000  # what comes before the first step does not count
        for _ in range(total - options.get("initial", 0)):
            bar.update()
            clock[0] += seconds


@pytest.mark.parametrize("on_terminal", [True, False])
def test_long_work_is_announced_once_and_early(clock, on_terminal, monkeypatch, capsys):
    screen = terminal(monkeypatch) if on_terminal else None
    work(clock, 1.0, 601)
    said = screen.getvalue() if screen else capsys.readouterr().err
    assert said.count("about 10 min for many images; Ctrl-C stops\n") == said.count("about") == 1
    if screen:  # on a line of its own, with a bar below
        assert "\rabout 10 min" in said
        assert 0 < said.index("about") < said.index("601/601")
    else:
        assert said.startswith("about")
        assert said.endswith("stops\n")


def test_what_was_done_before_takes_no_time(clock, capsys):
    work(clock, 1.0, 1000, initial=700)
    assert capsys.readouterr().err == "about 5 min for many images; Ctrl-C stops\n"


@pytest.mark.parametrize(
    "options", [{"seconds": 0.05, "total": 1000}, {"seconds": 9, "total": 99, "quiet": True}]
)
def test_short_work_and_all_processes_but_one_are_silent(clock, capsys, options):
    work(clock, **options)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "seconds,words",
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "2 h"), (2e5, "2 days"),
     (1e9, "11,574 days")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


# --- the pipeline ----------------------------------------------------------------------------------


def test_the_pipeline_tells_how_far_it_is(monkeypatch):
    told: list[object] = []

    @contextmanager
    def bar(**options):
        told.append(options)
        yield type("Bar", (), {"update": lambda self: told.append(1)})()

    plain = draw(num_images=5, steps=3, batch_size=2).tensors
    monkeypatch.setattr(pipe(), "progress", bar)
    shown = draw(num_images=5, steps=3, batch_size=2).tensors
    assert told == [{"total": 9, "desc": "5 images", "unit": "step"}, *[1] * 9]
    assert torch.equal(plain, shown)


def test_prompts_are_encoded_a_batch_at_a_time(monkeypatch):
    """The states of a million prompts would fill the memory before the first picture."""
    sizes, encode = [], md.Diffusion.encode

    def spy(self, values):
        sizes.append(len(values))
        return encode(self, values)

    words = ["a cat", "two black dogs", "Hat", "a top hat", "a green background"]
    alone = torch.cat([pipe()(w, num_images=2, steps=2, seed=2 * i).tensors for i, w in enumerate(words)])
    monkeypatch.setattr(md.Diffusion, "encode", spy)
    together = pipe()(words, num_images=2, steps=2, batch_size=3, negative=words[::-1]).tensors
    assert max(sizes) <= 3
    others = torch.cat(
        [
            pipe()(w, num_images=2, steps=2, seed=2 * i, negative=n).tensors
            for i, (w, n) in enumerate(zip(words, words[::-1], strict=True))
        ]
    )
    torch.testing.assert_close(together, others, rtol=0, atol=1e-3)
    assert (together - alone).abs().max() > 1e-2  # what is to be avoided counts


# --- the command -----------------------------------------------------------------------------------


def test_samples_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    monkeypatch.setattr(md.pipeline, "BATCH", 3)
    most = []
    call = md.TextToImage.__call__

    def spy(self, prompt, **how):
        most.append(how["num_images"])
        return call(self, prompt, **how)

    whole = draw(num_images=7, steps=2, seed=4, batch_size=3).tensors
    monkeypatch.setattr(md.TextToImage, "__call__", spy)
    parts = md.pipeline.draw_many(md.TextToImage(pipe().model), "Hat", 7, seed=4, steps=2)
    assert most == [3, 3, 1]
    assert torch.equal(parts, md.pixels.to_bytes(whole))


@pytest.mark.parametrize("count", [3, 70])
def test_sample_shows_one_bar_on_a_terminal_and_none_elsewhere(count, model, monkeypatch, capsys, tmp_path):
    screen = terminal(monkeypatch)
    call = (
        "sample",
        "Hat",
        "--model",
        str(model),
        "--num-images",
        str(count),
        "--steps",
        "2",
        "--seed",
        "1",
        "-o",
    )
    code, on_terminal, _ = run(monkeypatch, capsys, *call, str(tmp_path / "a.png"))
    total = 2 if count == 3 else 4  # 64 at a time
    assert code == 0
    assert f"{count} images: 100%" in screen.getvalue()
    assert f"| {total}/{total} [" in screen.getvalue()
    assert screen.getvalue().count("\n") == 1
    monkeypatch.undo()
    code, elsewhere, err = run(monkeypatch, capsys, *call, str(tmp_path / "b.png"))
    assert (code, err) == (0, "")
    assert elsewhere.replace("b.png", "a.png") == on_terminal
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_is_refused_shows_no_bar(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())  # with the delay
    call = ("sample", "Hat", "--model", str(model), "--rescale", "2", "-o", str(tmp_path / "a.png"))
    assert run(monkeypatch, capsys, *call)[0] == 1
    assert screen.getvalue() == "minidiff: rescale = 2 is a share: give it in [0, 1]\n"


def test_prompts_are_asked_for_as_they_are_drawn(monkeypatch):
    """Of a million, the first part is drawn before the second is written or read."""
    monkeypatch.setattr(md.pipeline, "BATCH", 2)
    monkeypatch.setattr(md.pipeline, "PART", 4)
    asked, read, bars = [], [], []
    ids = md.Diffusion.ids

    def spy(self, values):
        read.append(len(values))
        return ids(self, values)

    @contextmanager
    def bar(**options):
        bars.append(options)
        yield type("Bar", (), {"update": lambda self: None})()

    def prompts():
        for i in range(10**6):
            asked.append(i)
            yield ("Hat", "a cat", "two black dogs")[i % 3]

    whole = pipe()(["Hat", "a cat", "two black dogs"] * 4, steps=2, seed=4, batch_size=2).tensors
    monkeypatch.setattr(md.Diffusion, "ids", spy)
    drawing = md.TextToImage(pipe().model)
    drawing.progress = bar
    parts = md.pipeline.draw_each(drawing, prompts(), 10, seed=4, steps=2)
    first = next(parts)
    assert (len(first), len(asked), read) == (4, 4, [4])
    rest = list(parts)
    assert (len(asked), read) == (10, [4, 4, 2])
    assert bars == [{"total": 10, "desc": "10 images", "unit": "step"}]
    assert drawing.progress is bar
    torch.testing.assert_close(torch.cat([first, *rest]), whole[:10], rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:a Fréchet distance of 40 samples")
def test_scores_of_many_prompts_are_those_of_parts(monkeypatch):
    """And of a million prompts the first is drawn at once, as those of `sample` are."""
    text = md.TextEncoder.from_captions([*md.critters.vocabulary(), ","], dim=32, layers=1)
    net = perturbed(md.UNet(width=32, multipliers=(1,), attention=(0,), patch=4, condition_dim=32)).float()
    model = md.Diffusion(net, md.Cosine(), "x0", text, shape=(3, 64, 64)).eval()
    monkeypatch.setattr("minidiff.critters.scores.reader_accuracy", lambda *_, **__: {"animal and hat": None})
    how = {"prompts": 40, "steps": 1}
    whole = md.critters.evaluate(md.TextToImage(model), **how)
    monkeypatch.setattr(md.pipeline, "PART", 16)
    parts = md.critters.evaluate(md.TextToImage(model), **how)
    assert list(parts) == list(whole)
    for name, score in whole.items():
        if score is not None:
            assert parts[name][:4] == pytest.approx(score[:4], rel=1e-3, abs=1e-3), name

    class Stop(Exception):
        pass

    def stop(self, prompts, **how):
        raise Stop(len(prompts))

    monkeypatch.setattr(md.TextToImage, "__call__", stop)
    with pytest.raises(Stop, match="^16$"):
        md.critters.evaluate(md.TextToImage(model), prompts=10**9)


def test_evaluate_shows_bars(monkeypatch, capsys):
    screen = terminal(monkeypatch)
    monkeypatch.setattr("minidiff.critters.scores.reader_accuracy", lambda *_, **__: {"animal and hat": None})
    code, out, _ = run(monkeypatch, capsys, "evaluate", "critters", "--prompts", "2", "--steps", "1")
    assert code == 0
    seen, held_out, _ = screen.getvalue().split("\n")
    assert "2 images: 100%" in seen
    assert "2 images: 100%" in held_out
    assert "images" not in out


def test_the_bar_counts_from_where_a_resumed_run_begins(monkeypatch, capsys, tmp_path):
    """Else the rate, and the time it leaves, would count steps that somebody else made."""
    screen = terminal(monkeypatch)
    bars = []

    class Bar(progress.Bar):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(cli, "Bar", Bar)
    for color in ("red", "green"):
        (tmp_path / "data" / color).mkdir(parents=True)
        md.pixels.to_pil(torch.zeros(3, 16, 16)).save(tmp_path / "data" / color / "1.png")
    for options in (["--steps", "2"], ["--steps", "3", "--resume"]):
        call = ("train", str(tmp_path / "data"), "-o", str(tmp_path / "run"), "--size", "16", "--width", "32")
        assert run(monkeypatch, capsys, *call, *options)[0] == 0, screen.getvalue()
    steps = [bar for bar in bars if bar.unit == "step"]
    assert [(bar.initial, bar.n) for bar in steps] == [(0, 2), (2, 3)]
    pictures = [bar for bar in bars if bar.unit == "picture"]
    assert [(bar.desc, bar.n) for bar in pictures] == [("2 pictures", 2)] * 2


def test_the_loss_in_the_bar_is_a_weighted_mean():
    """Weight 0.98^age, and nothing but: the untrained network's loss does not linger."""
    losses = [5.0, 0.4, 0.1, 0.2]
    mean = progress.RunningMean()
    shown = [mean(loss) for loss in losses]
    for n in range(1, 5):
        weights = [0.98**age for age in reversed(range(n))]
        true = sum(w * x for w, x in zip(weights, losses[:n], strict=True)) / sum(weights)
        assert shown[n - 1] == pytest.approx(true, rel=1e-12)


def test_of_many_warnings_of_a_kind_five_are_shown(capsys):
    """A folder may have thousands of captions that are too long."""
    show = progress.FewOfAKind()
    for i in range(60):
        show(f"only 32 tokens are read; ignored: {i}")
    show("something else: 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[4] == "warning: only 32 tokens are read; ignored: 4 (more of this kind are not shown)"
    assert lines[5] == "warning: something else: 1"
