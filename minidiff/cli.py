"""The ``minidiff`` command: sample, train, evaluate, doctor.

Each command imports what it needs when it runs, so that ``minidiff --help`` and a misspelt option are
answered without loading transformers.
"""

import copy
import json
import math
import secrets
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from minidiff import __version__
from minidiff.checks import read_size, seed_number
from minidiff.files import check_place, first_line, load_weights, write_whole
from minidiff.progress import Bar, FewOfAKind, RunningMean, say

# What several commands take.
Model = Annotated[str, typer.Argument(help="Shipped model, folder of a run, or hub id.")]
Trained = Annotated[
    str | None,
    typer.Argument(help="What it was trained on: critters, critters-duo, fashion-mnist, tones, or a folder."),
]
DataRoot = Annotated[Path | None, typer.Option(help="Where Fashion-MNIST is.")]
CaptionColumn = Annotated[str | None, typer.Option(help="Column of a folder's metadata with the captions.")]
Sampler = Annotated[str, typer.Option(help="dpmpp_2m, adams, heun, ddim or ddpm.")]
SamplingSteps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 is none, 3 usual, 2 of sounds.")]
Interval = Annotated[
    tuple[float, float],
    typer.Option(metavar="LOW HIGH", help="Times, 0 data to 1 noise, when guidance acts."),
]

MOST_BYTES = 10**9
"""So large may a file of pictures be before it is packed."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def show_version(asked: bool) -> None:
    """Print the version and end, if it was asked for."""
    if asked:
        typer.echo(f"minidiff {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Small diffusion models: draw with one, train one, measure one, examine one."""


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw or play, e.g. 'a cat in a top hat'.")],
    model: Annotated[str, typer.Option(help="Shipped model, folder, or hub id.")] = "critters",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; else sample.png or .wav.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="How many, side by side or one by one.")] = 1,
    steps: SamplingSteps = 20,
    guidance: Guidance = None,
    negative: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    interval: Interval = (0.0, 1.0),
    rescale: Annotated[float, typer.Option(help="Share of guidance's contrast to take back.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same file; else by chance.")] = None,
    sampler: Sampler = "dpmpp_2m",
    scale: Annotated[int, typer.Option(min=1, help="Enlarge each pixel this many times.")] = 4,
) -> None:
    """Draw images, or play sounds, for a prompt and write them into one file."""
    from minidiff.denoiser import Diffusion
    from minidiff.device import default_device
    from minidiff.pipeline import TextToSound, draw_many, pipeline
    from minidiff.pixels import check_image_name, save_grid
    from minidiff.sounds import save_wav

    if output is not None:
        if output.suffix.lower() != ".wav":
            check_image_name(output)
        check_place(output)
    if seed is None:
        seed = secrets.randbelow(2**31)
    pipe = pipeline(Diffusion.from_pretrained(model, default_device()))
    guidance = pipe.usual_guidance if guidance is None else guidance
    how: dict[str, Any] = {
        "steps": steps, "guidance": guidance, "negative": negative, "interval": interval, "rescale": rescale,
        "seed": seed, "sampler": sampler,
    }  # fmt: skip
    sounds = isinstance(pipe, TextToSound)
    output = output or Path("sample.wav" if sounds else "sample.png")
    check_place(output)
    if sounds != (output.suffix.lower() == ".wav"):
        raise ValueError(
            f"--output {output}: {model} makes {'sounds: use .wav' if sounds else 'images: use .png'}"
        )
    if num_images * (1 if sounds else scale**2) * math.prod(pipe.model.shape or ()) > MOST_BYTES:
        raise ValueError(
            f"--num-images {num_images} at --scale {scale} is more than one file can hold: draw fewer"
        )
    pipe.progress = Bar
    samples = draw_many(pipe, prompt, num_images, **how)
    if sounds:
        save_wav(samples, output)
    else:
        save_grid(samples, output, scale=scale)
    typer.echo(f"{output}  ({num_images} x {prompt!r}, seed {seed})")


@app.command()
def train(
    what: Annotated[
        str,
        typer.Argument(
            help="critters, critters-duo, fashion-mnist, tones, a folder; critters-clip, critters-duo-clip, "
            "critters-reader, critters-duo-reader."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model and samples.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps in all.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --output stopped.")] = False,
    start: Annotated[
        str | None, typer.Option("--from", help="Model to train further: shipped, a folder, or hub id.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, data order and noise.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Such as 64, or 48x96 (height x width) for folders; else 64.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=128, help="Critters or tones to make; else the recipe's.")
    ] = None,
    data_root: DataRoot = None,
    text_encoder: Annotated[str | None, typer.Option(help="Folder or hub id of a frozen encoder.")] = None,
    conditioning: Annotated[str | None, typer.Option(help="How text enters: both, pooled, tokens.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step; else the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; else the recipe's.")] = None,
    width: Annotated[
        int | None, typer.Option(help="Channels of the U-Net's first level; else the recipe's.")
    ] = None,
    caption_column: CaptionColumn = None,
    sample_every: Annotated[int, typer.Option(min=1, help="Steps between sample grids.")] = 300,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 300,
) -> None:
    """Train a model: a named recipe, or your own folder of captioned images."""
    import torch

    from minidiff import fit
    from minidiff.denoiser import Conditioning, Diffusion
    from minidiff.recipes import HELPERS, RECIPES, get_recipe
    from minidiff.state import saved_steps
    from minidiff.text import TextEncoder
    from minidiff.training import processes

    torch.manual_seed(seed_number(seed))
    check_place(output, folder=True)
    options: dict[str, Any] = {
        "size": size and read_size(size), "images": images, "data_root": data_root, "width": width,
        "caption_column": caption_column, "conditioning": conditioning,
        "progress": partial(Bar, unit="picture", quiet=not processes().is_main_process),
    }  # fmt: skip
    if what in HELPERS:
        if resume or start or text_encoder or conditioning or batch_size or lr or width:
            raise ValueError(
                f"{what} takes none of --resume, --from, --text-encoder, --conditioning, --width, "
                "--batch-size and --lr: it is trained whole"
            )
        train_helper(what, output, steps, seed, options)
        return
    if what not in RECIPES and not Path(what).is_dir():
        known = ", ".join([*RECIPES, *HELPERS])
        raise ValueError(f"nothing to train: {what!r} is no recipe ({known}) and no folder")
    if conditioning and conditioning not in get_args(Conditioning):
        raise ValueError(f"--conditioning {conditioning}: choose one of {', '.join(get_args(Conditioning))}")
    if text_encoder:
        options["encoder"] = TextEncoder.from_pretrained(text_encoder)
    if start:
        options["start"] = Diffusion.from_pretrained(start)
        # Once, of all captions, is enough: the recipe's notes name the words.
        warnings.filterwarnings("ignore", "not in the vocabulary of this model")
    recipe = get_recipe(what, **options)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("lr", lr)):
        if value is not None:
            setattr(recipe, name, value)
    # First what may be refused, then the model, then the data: they take longest.
    fitting = fit.fit(
        recipe, output, seed=seed, resume=resume, sample_every=sample_every, save_every=save_every
    )
    parameters = sum(p.numel() for p in recipe.model.parameters()) / 1e6
    for note in recipe.source.notes:
        say(note)
    kind = "images" if recipe.source.images.ndim == 4 else "sounds"
    say(f"{len(recipe.source.images)} {kind}, {parameters:.1f} M parameters, {recipe.steps} steps")
    started = time.monotonic()
    quiet = not processes().is_main_process
    # tqdm counts what was done before towards the bar, not towards the rate.
    done = saved_steps(output) if resume else 0
    if done >= recipe.steps:
        say(f"{output} has made its {done} steps: give more --steps to go on")
        return
    bar = Bar(total=recipe.steps, initial=done, unit="step", desc=Path(what).name, quiet=quiet)
    mean = RunningMean()
    try:
        for step in fitting:
            bar.update()
            bar.set_postfix(loss=f"{mean(step.loss):.4f}", refresh=False)
    except (KeyboardInterrupt, SystemExit) as stop:
        bar.close()
        saved = saved_steps(output) if (output / "training.safetensors").is_file() else 0
        after = (
            f"saved after step {saved}; the same command with --resume goes on" if saved else "nothing saved"
        )
        say(f"stopped, {after}")
        raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 1)) from None
    finally:
        bar.close()  # what is said next, an error for one, begins a new line
    say(f"{output}  ({time.monotonic() - started:.0f} s)")


def train_helper(what: str, output: Path, steps: int | None, seed: int, options: dict[str, Any]) -> None:
    """Train a CLIP or a reader, save it, and print how often it is right on fresh renders."""
    from minidiff.recipes import HELPERS, Options

    if (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a model: choose another folder")
    helper, chosen = HELPERS[what], Options(**options)
    network, steps = helper.make(chosen), steps or helper.steps
    losses = helper.train(network, chosen, steps, seed)
    with Bar(total=steps, desc=what, unit="step") as bar:
        for loss in losses:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    network.eval().save_pretrained(output, helper.dtype)
    for name, score in helper.measure(network).items():
        typer.echo(f"{name:16} {score}")


@app.command()
def evaluate(
    model: Model,
    data: Trained = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts per split.")] = 512,
    steps: SamplingSteps = 20,
    guidance: Guidance = None,
    sampler: Sampler = "dpmpp_2m",
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and noise.")] = 0,
    data_root: DataRoot = None,
    caption_column: CaptionColumn = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the scores as JSON.")] = None,
) -> None:
    """Scores with error bars: of critters and tones, how often samples are what the prompt says; of other
    data, the loss against its floor and the distance to pictures that were held back, in the features of
    critters-clip (no FID: that is Inception's)."""
    from minidiff.denoiser import Diffusion
    from minidiff.device import default_device
    from minidiff.pipeline import pipeline
    from minidiff.recipes import get_recipe, guess_data, size_of

    if output is not None:
        check_place(output)
    pipe = pipeline(Diffusion.from_pretrained(model, default_device()))
    guidance = pipe.usual_guidance if guidance is None else guidance
    data = data or guess_data(pipe.model)
    if data is None:
        raise ValueError("its words do not tell what it draws: say so, with a recipe or a folder")
    recipe = get_recipe(
        data, size=size_of(pipe.model), data_root=data_root, caption_column=caption_column,
        progress=partial(Bar, unit="picture"),
    )  # fmt: skip
    pipe.progress = Bar
    scores = recipe.score(
        pipe, recipe, prompts=prompts, steps=steps, guidance=guidance, sampler=sampler, seed=seed
    )
    for name, score in scores.items():
        typer.echo(f"{name:40} {score}")
    if output is not None:
        with write_whole(output) as unfinished:  # whole or not at all
            as_json = {name: score._asdict() for name, score in scores.items()}
            unfinished.write_text(json.dumps(as_json, indent=2) + "\n")


@app.command()
def doctor(
    model: Model,
    data: Trained = None,
    samples: Annotated[int, typer.Option(min=32, max=4096, help="Images of the data to look at.")] = 256,
    data_root: DataRoot = None,
    caption_column: CaptionColumn = None,
    seed: Annotated[int, typer.Option(min=0, help="Of data and noise.")] = 0,
) -> None:
    """Say what is wrong with a model, or what it has learned; exit code 2 if something is wrong."""
    from minidiff.denoiser import Diffusion
    from minidiff.doctor import doctor as examine
    from minidiff.pixels import from_bytes
    from minidiff.recipes import get_recipe, guess_data, size_of
    from minidiff.state import saved_part

    diffusion = Diffusion.from_pretrained(model)
    data = data or guess_data(diffusion)
    x0, captions = None, None
    if data is not None:
        if diffusion.shape is None:
            raise ValueError("the model does not say the shape of its samples: look at it from Python")
        source = get_recipe(
            data, size=size_of(diffusion), images=samples, seed=seed, data_root=data_root,
            caption_column=caption_column, progress=partial(Bar, unit="picture"),
        ).source  # fmt: skip
        x0 = from_bytes(source.images[:samples])
        captions = source.captions(len(x0)) if diffusion.encoder is not None else None
    raw = None
    if (Path(model) / "training.safetensors").is_file():
        raw = copy.deepcopy(diffusion)
        load_weights(raw, saved_part(model, "model"))
    report = examine(diffusion, x0, captions, raw=raw, seed=seed)
    typer.echo(str(report))
    if report.findings:
        raise typer.Exit(2)


def main() -> None:
    """Run the command; an error is one line on standard error and exit code 1, never a traceback."""
    warnings.showwarning = FewOfAKind()  # type: ignore[assignment]
    try:
        app()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        typer.echo(f"minidiff: {first_line(error)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
