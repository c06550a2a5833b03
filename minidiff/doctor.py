"""What is wrong with this model? A check-up of a diffusion model and its data.

A diffusion loss is hard to read. It never comes near 0, because no network can tell the noise in an
almost clean image or the image in almost pure noise; so a run that learns and one that does not may show
the same flat curve. :func:`doctor` puts the loss between two numbers that can be computed, level by
level:

* the *trivial* error, that of the best guess which is linear in x_t and knows only mean and variance of
  the data, ``var sigma² / (alpha² var + sigma²)``;
* the *floor*: exact where the distribution of the data is known, else the error of the perfect denoiser
  of the given data, :class:`~minidiff.exact.FiniteData`, which knows them by heart. That is a loose
  bound where data are few. It knows no captions: at high noise a model that reads them can do better.

How far the model has come from the first to the second is what it has learned. Around this table stand
checks for the mistakes that people make: each :class:`Finding` names one and says what to do.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.condition import Condition
from minidiff.denoiser import Diffusion
from minidiff.exact import FiniteData, GaussianMixture
from minidiff.forward import TINY, NoiseLevel, Prediction, diffuse, target_coefficients

Conditions = Condition | Tensor | None
TIMES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 1.0)
SIGNIFICANT = 4.0  # standard errors


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        name: short and fixed, such as "terminal snr".
        what: what was seen, with its numbers.
        advice: what to do.
    """

    name: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what} {self.advice}"


@dataclass(frozen=True)
class LevelError:
    """Mean squared errors of x0 at one time, per element.

    Attributes:
        t: time.
        model: the model's.
        trivial: that of the best linear guess.
        floor: that of the perfect denoiser without a condition.
        stderr: standard error of ``model - trivial``, both on the same noise.
        excess: the mean of that difference.
    """

    t: float
    model: float
    trivial: float
    floor: float
    stderr: float
    excess: float

    @property
    def learned(self) -> float:
        """Share of the way from trivial to floor; nan where the two are the same."""
        gap = self.trivial - self.floor
        return (self.trivial - self.model) / gap if gap > 0.02 * self.trivial else math.nan


@dataclass
class Report:
    """What :func:`doctor` found.

    Attributes:
        findings: what is wrong; empty if all is well.
        levels: the errors, level by level.
    """

    findings: list[Finding] = field(default_factory=list)
    levels: list[LevelError] = field(default_factory=list)

    @property
    def learned(self) -> float:
        """Share of the way from trivial to floor, over all levels; nan where no level has a gap."""
        known = [e for e in self.levels if not math.isnan(e.learned)]
        gap = sum(e.trivial - e.floor for e in known)
        return sum(e.trivial - e.model for e in known) / gap if known else math.nan

    def __str__(self) -> str:
        lines = []
        if self.levels:
            lines.append("squared error of x0:   t    trivial      model      floor   learned")
            for e in self.levels:
                learned = "     -" if math.isnan(e.learned) else f"{100 * e.learned:5.0f}%"
                errors = f"{e.trivial:9.5f}  {e.model:9.5f}  {e.floor:9.5f}"
                lines.append(f"                    {e.t:4.2f}  {errors}    {learned}")
            if not math.isnan(self.learned):
                lines.append(f"learned: {100 * self.learned:.0f} % of the way from trivial to floor")
        lines += [f"- {finding}" for finding in self.findings] or ["nothing is wrong"]
        return "\n".join(lines)


@torch.no_grad()
def doctor(
    model: Diffusion,
    x0: Tensor | None = None,
    condition: Any = None,
    *,
    raw: Diffusion | None = None,
    oracle: GaussianMixture | None = None,
    guide: Callable[..., Any] | None = None,
    seed: int = 0,
) -> Report:
    """Examine a model, and the data it was trained on.

    Args:
        model: the one to sample from, usually the averaged one.
        x0: some of its training data (B, ...), as the network saw them; 256 or more tell enough. Without
            data only the model and its schedule are looked at.
        condition: what each of them shows, as :meth:`Diffusion.encode
            <minidiff.denoiser.Diffusion.encode>` takes it: captions, labels or a Condition; None for a model
            without conditions.
        raw: the model before averaging, to see whether the average lags behind.
        oracle: the exact distribution of the data, if it is known.
        guide: a guidance function of your own, with the arguments of :func:`minidiff.guide`.
        seed: of the noise.

    Returns:
        The findings, and the errors level by level.

    Raises:
        ValueError: fewer than 2 samples, or not one condition for each.
    """
    checks = [_check_schedule(model), _check_mode(model), _check_weights(model)]
    report = Report(list(chain(*checks)))
    if x0 is None:
        return report
    if len(x0) < 2:
        raise ValueError(f"x0 holds {len(x0)} samples: give at least 2, better 256")
    condition = model.encode(condition)
    about = condition.pooled if isinstance(condition, Condition) else condition
    if about is not None and len(about) != len(x0):
        raise ValueError(f"{len(about)} conditions for {len(x0)} samples: give one for each")
    report.findings += _check_data(x0)
    if not x0.is_floating_point():
        return report
    x0 = x0.to(model.device, torch.float32)
    if not {"weights", "data"} & {finding.name for finding in report.findings}:
        report.findings += _check_numbers(model, x0, condition, seed)
    if {"weights", "data", "nan"} & {finding.name for finding in report.findings}:
        return report  # errors of what is not a number say nothing
    report.levels = _errors(model, x0, condition, oracle, seed)
    report.findings += _check_levels(report)
    report.findings += _check_time(model, x0, condition, seed)
    if condition is not None:
        report.findings += _check_condition(model, x0, condition, seed)
    if raw is not None:
        lagging = _errors(raw.to(model.device), x0, condition, oracle, seed)
        report.findings += _check_ema(report.levels, lagging)
    if guide is not None:
        report.findings += _check_guidance(guide, seed)
    return report


# --- the model alone ----------------------------------------------------------------------------


def _check_schedule(model: Diffusion) -> Iterator[Finding]:
    top = model.schedule(1.0)
    if top.alpha > 0.1 * top.sigma:
        seen = f"at t = 1 alpha is {top.alpha:.2g} and sigma {top.sigma:.2g}"
        what = f"{seen}: training never shows pure noise, sampling starts from it."
        advice = "End the schedule in noise (more steps, larger betas, zero_terminal_snr)."
        yield Finding("terminal snr", what, advice)
    if _undefined(model, top):
        what = f"target {model.target!r} says nothing about x0 at t = 1, where alpha is 0."
        yield Finding("target", what, "Use target 'x0', 'v' or 'flow'.")
    log_snr = model.schedule(torch.linspace(0, 1, 101, dtype=torch.float64)).log_snr
    if bool((log_snr.diff() > 0).any()):
        what = "the SNR rises somewhere on the way to t = 1."
        yield Finding("schedule", what, "Let it only fall.")


def _check_mode(model: Diffusion) -> Iterator[Finding]:
    random = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm
    for name, part in model.named_modules():
        if isinstance(part, random) and part.training and getattr(part, "p", 1) > 0:
            what = f"{name!r} is in train mode and answers at random."
            yield Finding("train mode", what, "Call model.eval() before sampling.")
            return


def _check_weights(model: Diffusion) -> Iterator[Finding]:
    for name, value in model.named_parameters():
        if bad := int((~value.isfinite()).sum()):
            what = f"{name} holds {bad} values that are not finite."
            advice = "Go back to an earlier checkpoint; lower the learning rate or clip gradients."
            yield Finding("weights", what, advice)
            return


# --- the data -----------------------------------------------------------------------------------


def _check_data(x0: Tensor) -> Iterator[Finding]:
    low, high, std = x0.min().item(), x0.max().item(), x0.double().std().item()
    reach = f"{'images' if x0.ndim == 4 else 'data'} lie in [{low:.2g}, {high:.2g}]"
    if not x0.is_floating_point():
        advice = "Bring them to float in [-1, 1]: bytes by x / 127.5 - 1, 16-bit sounds by x / 32767."
        yield Finding("data range", f"data are {x0.dtype}.", advice)
    elif bad := int((~x0.isfinite()).flatten(1).any(1).sum()):
        what = f"{bad} of {len(x0)} samples hold nan or inf."
        yield Finding("data", what, "Find and drop them.")
    elif std < 1e-6:
        yield Finding("data", f"all values are {low:g}.", "There is nothing to learn from them.")
    elif x0.ndim == 4 and low >= 0:
        yield Finding("data range", f"{reach}, not in [-1, 1].", "Train and sample on 2 * x - 1.")
    elif x0.ndim == 4 and max(-low, high) > 1.5:
        what = f"{reach}; samples are clipped to [-1, 1]."
        yield Finding("data range", what, "Scale them, do not standardise them.")
    elif not 0.1 < std < 3:
        what = f"their standard deviation is {std:.2g}; schedules are made for about 0.5 to 1."
        yield Finding("data range", what, "Scale the data.")


# --- numbers ------------------------------------------------------------------------------------


def _check_numbers(model: Diffusion, x0: Tensor, condition: Conditions, seed: int) -> Iterator[Finding]:
    """Which layer makes the first nan or inf, in float32 and in bfloat16?"""
    x0, condition = x0[:16], _take(condition, range(min(16, len(x0))))
    level = model.schedule(torch.linspace(0.02, 1, len(x0), dtype=torch.float64))
    x_t = diffuse(x0, _noise(x0, seed), level)
    for name, enabled in (("float32", False), ("bfloat16", True)):
        culprits: list[str] = []
        # The stack takes the hooks off again even if the model fails.
        with ExitStack() as hooks, torch.autocast(x0.device.type, torch.bfloat16, enabled=enabled):
            for path, part in list(model.named_modules())[1:]:
                hooks.enter_context(part.register_forward_hook(partial(_note, path, culprits)))
            output = model(x_t, level, condition)
        if not bool(output.isfinite().all()):
            where = f" from {culprits[0]!r} on" if culprits else ""
            what = f"in {name} the output is not finite{where}."
            yield Finding("nan", what, f"Keep that layer out of {name}, or bound its output.")
            return


def _note(path: str, culprits: list[str], part: nn.Module, inputs: Any, out: Any) -> None:
    """A forward hook: remember the path of a layer whose output is not finite."""
    if isinstance(out, Tensor) and out.is_floating_point() and not bool(out.isfinite().all()):
        culprits.append(path)


# --- errors -------------------------------------------------------------------------------------


@torch.no_grad()
def errors_by_level(
    model: Diffusion, x0: Tensor, condition: Conditions, oracle: GaussianMixture | None = None, seed: int = 0
) -> dict[float, dict[str, Tensor]]:
    """Squared errors of x0, sample by sample, at each time at which the target says what x0 is.

    Args:
        model: whose "model" errors to measure.
        x0: data (B, ...), on its device.
        condition: what each shows, encoded, or None.
        oracle: the exact distribution of the data; None for that of ``x0`` itself.
        seed: of the noise.

    Returns:
        By time, "model", "trivial" and "floor" errors (B,), means over the elements of each sample.
    """
    exact = FiniteData(x0) if oracle is None else oracle
    mean, variance = x0.mean(0), x0.var(0)  # (...), of each element
    found = {}
    for t in TIMES:
        level = model.schedule(t)
        if _undefined(model, level):
            continue
        x_t = diffuse(x0, _noise(x0, seed), level)
        _, alpha, sigma = level.like(x0)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        guesses = {
            "model": _guess(model, x_t, level, condition),
            "trivial": mean + gain * (x_t - alpha * mean),
            "floor": exact.denoise(x_t, level).x0,
        }
        found[t] = {name: ((x - x0) ** 2).flatten(1).mean(1) for name, x in guesses.items()}
    return found


def _errors(
    model: Diffusion, x0: Tensor, condition: Conditions, oracle: GaussianMixture | None, seed: int
) -> list[LevelError]:
    levels = []
    for t, errors in errors_by_level(model, x0, condition, oracle, seed).items():
        excess = errors["model"] - errors["trivial"]
        means = {name: error.mean().item() for name, error in errors.items()}
        stderr = (excess.std() / len(excess) ** 0.5).item()
        levels.append(LevelError(t, **means, stderr=stderr, excess=excess.mean().item()))
    return levels


def _check_levels(report: Report) -> Iterator[Finding]:
    """Levels at which a linear guess does better than the network; or as well nearly everywhere."""
    levels = report.levels
    bad = [e for e in levels if e.excess > max(SIGNIFICANT * e.stderr, 0.05 * e.trivial)]
    if not any(e.learned > 0.5 for e in levels) and (bad or report.learned < 0.1):
        share = f"{100 * report.learned:.0f} %"
        what = f"of what can be learned from these data it has learned {share}."
        advice = "Train for longer, or are target, schedule and data those it was trained with?"
        yield Finding("not learned", what, advice)
    elif bad:
        times = ", ".join(f"{e.t:g}" for e in bad)
        worst = max(bad, key=lambda e: e.model / e.trivial)
        much = f"at t = {worst.t:g} the model errs {worst.model / worst.trivial:.3g} times as much"
        where = "high" if bad[-1].t > 0.5 else "low"
        advice = f"Was t drawn from all of (0, 1]? The {where} end is missing."
        yield Finding("t coverage", f"at t = {times} a linear guess is better; {much}.", advice)


def _check_time(model: Diffusion, x0: Tensor, condition: Conditions, seed: int) -> Iterator[Finding]:
    """The same input announced with other times must give other outputs."""
    x0, condition = x0[:32], _take(condition, range(min(32, len(x0))))
    level = model.schedule(0.5)
    x_t = diffuse(x0, _noise(x0, seed), level)
    right = model(x_t, level, condition).float()
    wrong = [model(x_t, level._replace(t=level.t * 0 + t), condition).float() for t in (0.1, 0.9)]
    difference = max((right - other).abs().max().item() for other in wrong)
    # A network that says nothing at all yet, all zeros, is not to blame.
    if bool(right.any()) and difference <= 1e-6 * right.abs().max().item():
        advice = "Pass t to the network, and train its embedding."
        yield Finding("time", "the output does not depend on the time.", advice)


def _check_condition(model: Diffusion, x0: Tensor, condition: Conditions, seed: int) -> Iterator[Finding]:
    """Is the condition heard, and does it tell anything about the data?"""
    level = model.schedule(0.8)
    x_t = diffuse(x0, _noise(x0, seed), level)
    shuffled = _take(condition, [*range(1, len(x0)), 0])
    right, wrong, none = (_guess(model, x_t, level, c) for c in (condition, shuffled, None))
    if max((right - other).abs().max().item() for other in (wrong, none)) < 1e-5:
        what = "the output is the same with any condition and with none."
        yield Finding("condition ignored", what, "Is it passed on, and are its weights trained?")
        return
    gain = ((wrong - x0) ** 2 - (right - x0) ** 2).flatten(1).mean(1)  # (B,)
    z = (gain.mean() / (gain.std() / len(gain) ** 0.5).clamp(min=1e-12)).item()
    share = (gain.mean() / ((right - x0) ** 2).mean()).item()
    if z < SIGNIFICANT or share < 0.01:
        grows = f"the error grows by {100 * share:.2g} % only ({z:.1f} standard errors)"
        what = f"with the conditions of other samples {grows}."
        yield Finding("condition uninformative", what, "Do conditions and data belong together?")


def _check_ema(averaged: Sequence[LevelError], raw: Sequence[LevelError]) -> Iterator[Finding]:
    mine, theirs = (sum(e.model / e.trivial for e in errors) for errors in (averaged, raw))
    if mine > 1.1 * theirs:
        what = f"the averaged model errs {mine / theirs:.2f} times as much as the one it averages."
        yield Finding("ema", what, "Lower the decay to about 1 - 10/steps, or train for longer.")


def _check_guidance(guide: Callable[..., Any], seed: int) -> Iterator[Finding]:
    """Scale 1 must be the conditional answer, scale 0 the unconditional one."""
    x_t = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    level = NoiseLevel(*(torch.tensor(v, dtype=torch.float64) for v in (0.5, 0.8, 0.6)))

    def denoise(x: Tensor, level: NoiseLevel, condition: Any = None) -> Prediction:
        x0 = torch.zeros_like(x) + (0.0 if condition is None else 1.0)
        return Prediction(x0, (x - level.alpha.to(x) * x0) / level.sigma.to(x))

    at = {w: guide(denoise, "anything", w)(x_t, level).x0.mean().item() for w in (0, 1, 3)}
    what = ", ".join(f"scale {scale} gives {value:g}" for scale, value in at.items())
    advice = "x0 should be none + scale * (with - none)."
    if all(abs(value - scale - 1) < 1e-4 for scale, value in at.items()):
        advice = "This is the paper's w, where 0 is no guidance: pass scale - 1."
    if any(abs(value - scale) > 1e-4 for scale, value in at.items()):
        yield Finding("guidance", f"between none = 0 and with = 1, {what}.", advice)


# --- helpers ------------------------------------------------------------------------------------


def _undefined(model: Diffusion, level: NoiseLevel) -> bool:
    p, q = target_coefficients(model.target, level)
    return bool((level.alpha * q - level.sigma * p).abs() < TINY)


def _guess(model: Diffusion, x_t: Tensor, level: NoiseLevel, condition: Conditions) -> Tensor:
    """The model's x0, in batches of 64."""
    parts = []
    for start in range(0, len(x_t), 64):
        chosen = range(start, min(start + 64, len(x_t)))
        parts.append(model.denoise(x_t[start : start + 64], level, _take(condition, chosen)).x0)
    return torch.cat(parts)


def _take(condition: Conditions, rows: Sequence[int]) -> Conditions:
    """The conditions of some samples."""
    if isinstance(condition, Condition):
        return condition.take(rows)
    return None if condition is None else condition[list(rows)]


def _noise(x0: Tensor, seed: int) -> Tensor:
    return torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
