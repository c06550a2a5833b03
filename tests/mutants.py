"""Would the tests notice? Each mutant is this library with one classic mistake in it.

    python tests/mutants.py            # or `make mutants`
    python tests/mutants.py heun       # those whose name contains the word

For every mutant the tests named beside it run against the wrong source, and at least one must fail. The
source on disk stays as it is: a child process reads it through a loader that swaps the text.
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FORWARD, SCHEDULE, SAMPLING = "test_forward", "test_schedule", "test_sampling"


class Mutant(NamedTuple):
    """One mistake: in ``file``, a module of minidiff, ``old`` (which stands there once) becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(*mutant)
    for mutant in (
        # --- forward
        ("noise subtracted", "forward", "return alpha * x0 + sigma * eps", "return alpha * x0 - sigma * eps", (FORWARD, "test_diffusers")),
        ("variance for standard deviation", "forward", "return alpha * x0 + sigma * eps", "return alpha * x0 + sigma**2 * eps", (FORWARD,)),
        ("alpha_bar for alpha", "forward", "return alpha * x0 + sigma * eps", "return alpha**2 * x0 + sigma * eps", (FORWARD,)),
        ("SNR without the square", "forward", "return (self.alpha / self.sigma) ** 2", "return self.alpha / self.sigma", (FORWARD,)),
        ("log SNR halved", "forward", "return 2 * (self.alpha.log() - self.sigma.log())", "return self.alpha.log() - self.sigma.log()", (FORWARD,)),
        ("posterior: weight of x0", "forward", "from_x0 = level_s.alpha * (std / level_t.sigma) ** 2", "from_x0 = level_s.alpha * (std / level_t.sigma)", (FORWARD,)),
        ("posterior: weight of x_t", "forward", "from_x_t = scale * (level_s.sigma / level_t.sigma) ** 2", "from_x_t = scale * (level_s.sigma / level_t.sigma)", (FORWARD,)),
        ("beta for beta tilde", "forward", "return std * level_s.sigma / level_t.sigma", "return std", (FORWARD,)),
        ("transition: scale upside down", "forward", "scale = level_t.alpha / level_s.alpha", "scale = level_s.alpha / level_t.alpha", (FORWARD,)),
        ("transition: variance for std", "forward", "std = level_t.sigma * (-torch.expm1(level_t.log_snr - level_s.log_snr)).sqrt()", "std = level_t.sigma * (-torch.expm1(level_t.log_snr - level_s.log_snr))", (FORWARD,)),
        ("sign of v", "forward", "return -level.sigma, level.alpha", "return level.sigma, -level.alpha", (FORWARD,)),
        ("flow backwards", "forward", "return -one, one", "return one, -one", (FORWARD,)),
        ("EDM without sigma_data", "forward", "std = (level.alpha**2 * SIGMA_DATA**2 + level.sigma**2).sqrt()", "std = (level.alpha**2 + level.sigma**2).sqrt()", (FORWARD,)),
        ("sign in eps from the output", "forward", "((q, -level.sigma), (-p, level.alpha))", "((q, -level.sigma), (p, level.alpha))", (FORWARD,)),
        ("eps at alpha = 0 let through", "forward", "if bool((det.abs() < TINY).any()):", "if bool((det.abs() == 0).any()):", (FORWARD,)),
        # --- schedule
        ("betas off by one", "schedule", "torch.linspace(self.beta_min, self.beta_max, self.steps, dtype=torch.float64)", "torch.linspace(self.beta_min, self.beta_max, self.steps + 1, dtype=torch.float64)[1:]", (SCHEDULE,)),
        ("table off by one", "schedule", "return torch.cat([logs.new_zeros(1), logs.clamp(min=2 * math.log(ALMOST_ZERO))])", "return torch.cat([logs, logs[-1:]])", (SCHEDULE,)),
        ("cosine: offset not scaled", "schedule", "u0 = self.offset / (1 + self.offset) * math.pi / 2", "u0 = self.offset * math.pi / 2", (SCHEDULE,)),
        ("continuous rate not halved", "schedule", "t * (self.beta_max - self.beta_min) / 2)", "t * (self.beta_max - self.beta_min))", (SCHEDULE,)),
        ("shift of the SNR for that of its root", "schedule", "2 * math.log(self.shift)", "math.log(self.shift)", (SCHEDULE,)),
        ("sampling never starts at t = T", "schedule", "torch.linspace(1, 0, count, dtype=torch.float64)[:n]", "torch.linspace(0.999, 0, count, dtype=torch.float64)[:n]", (SCHEDULE,)),
        ("sampling ends with noise left", "schedule", "return [*map(NoiseLevel, *parts), NoiseLevel(zero, one, zero)]", "return [*map(NoiseLevel, *parts), self(0.001)]", (SCHEDULE,)),
        ("karras spacing with the wrong exponent", "schedule", "last ** (1 / rho) * grid) ** rho", "last ** (1 / rho) * grid) ** (rho / 2)", (SCHEDULE,)),
        ("log-SNR spacing even in the ratio", "schedule", "ratio = first ** (1 - grid) * last**grid", "ratio = first * (1 - grid) + last * grid", (SCHEDULE,)),
        ("ratio taken for its square", "schedule", "times = self.time(-2 * ratio.log())", "times = self.time(-ratio.log())", (SCHEDULE,)),
        ("trailing spacing that leads", "schedule", "times = ((1 - torch.arange(n, dtype=torch.float64) / n) * chain).round() / chain", "times = ((1 - (torch.arange(n, dtype=torch.float64) + 1) / n) * chain).round() / chain", (SCHEDULE,)),
        ("trailing spacing off the grid of the chain", "schedule", "/ n) * chain).round() / chain", "/ n) * chain) / chain", (SCHEDULE,)),
        # --- muon
        ("muon: the shorter side", "muon", "* max(rows, columns) ** 0.5", "* min(rows, columns) ** 0.5", ("test_muon",)),
        ("muon: momentum not ahead", "muon", "return gradient.lerp(state[\"momentum\"], MOMENTUM)", "return state[\"momentum\"]", ("test_muon",)),
        ("muon: one iteration too few", "muon", "for _ in range(ITERATIONS):", "for _ in range(ITERATIONS - 1):", ("test_muon",)),
        ("muon: decay without the rate", "muon", "p.mul_(1 - rate * group[\"weight_decay\"])", "p.mul_(1 - group[\"weight_decay\"])", ("test_muon",)),
        ("muon: tall matrices left standing", "muon", "x = x.mT if rows > columns else x\n        x = x /", "x = x /", ("test_muon",)),
        # --- sampling
        ("noise twice", "sampling", "kept = (level_s.sigma**2 - noise_std**2).clamp(min=0).sqrt()", "kept = level_s.sigma", (SAMPLING,)),
        ("noise at the last step", "sampling", "noise_std = eta * posterior_std(level_t, level_s)  # eq. 16", "noise_std = eta * transition(x0, level_s, level_t).std", (SAMPLING,)),
        ("eta squared", "sampling", "noise_std = eta * posterior_std(level_t, level_s)", "noise_std = eta**2 * posterior_std(level_t, level_s)", (SAMPLING, "test_diffusers")),
        ("ddpm: the two variances swapped", "sampling", 'if variance == "transition":\n            std', 'if variance != "transition":\n            std', (SAMPLING,)),
        ("heun without the mean", "sampling", "eps = (eps + denoise(ahead, level_s).eps) / 2", "eps = denoise(ahead, level_s).eps", (SAMPLING, "test_sampling_exact")),
        ("heun looks at the wrong level", "sampling", "denoise(ahead, level_s).eps) / 2", "denoise(ahead, level_t).eps) / 2", (SAMPLING, "test_sampling_exact")),
        ("dpmpp extrapolates twice as far", "sampling", "h / (2 * old_h)", "h / old_h", (SAMPLING, "test_sampling_exact")),
        ("dpmpp extrapolates backwards", "sampling", "* (x0 - old_x0)", "* (old_x0 - x0)", (SAMPLING, "test_sampling_exact")),
        ("dpmpp: step ratio upside down", "sampling", "h / (2 * old_h)", "old_h / (2 * h)", ("test_sampling_exact",)),
        ("start with sigma squared", "sampling", "return level.sigma.item() * randn_like(", "return level.sigma.item() ** 2 * randn_like(", (SAMPLING,)),
        ("all samples from one seed", "sampling", "manual_seed(seed + i)", "manual_seed(seed)", (SAMPLING,)),
        # --- guidance
        ("the paper's w for the scale", "guidance", "x0_other + strength * (x0 - x0_other)", "x0 + strength * (x0 - x0_other)", ("test_guidance",)),
        ("eps not guided", "guidance", "eps_other + strength * (eps - eps_other)", "eps + 0 * strength * eps_other", ("test_guidance",)),
        ("a second call at scale 1", "guidance", "if scale == 1 or not bool(inside.any()):", "if not bool(inside.any()):", ("test_guidance",)),
        ("eps kept after clipping", "guidance", "return _with_x0(denoise(x_t, level).x0.clamp(low, high), x_t, level)", "return Prediction(denoise(x_t, level).x0.clamp(low, high), denoise(x_t, level).eps)", ("test_guidance",)),
        ("thresholding without rescaling", "guidance", "x0.clamp(-s, s) / s", "x0.clamp(-s, s)", ("test_guidance",)),
        ("rescaled by the variance", "guidance", "x.flatten(1).std(dim=1, correction=0)", "x.flatten(1).var(dim=1, correction=0)", ("test_guidance",)),
        ("rescaled by the spread of the batch", "guidance", "x.flatten(1).std(dim=1, correction=0)", "x.std(correction=0).expand(len(x))", ("test_guidance",)),
        ("rescaling upside down", "guidance", "_spread(x0) / spread, 1.0", "spread / _spread(x0), 1.0", ("test_guidance",)),
        ("rescaled share taken twice", "guidance", "rescale * (ratio - 1)", "rescale**2 * (ratio - 1)", ("test_guidance",)),
        ("eps kept where x0 was moved", "guidance", "prediction.eps - alpha / sigma.clamp(min=TINY) * by", "prediction.eps", ("test_guidance",)),
        ("x0 moved at sigma = 0", "guidance", "torch.where(sigma > TINY, by, 0.0)", "torch.where(sigma >= 0, by, 0.0)", ("test_guidance",)),
        ("gradient guidance downhill", "guidance", "scale * sigma**2 / alpha", "-scale * sigma**2 / alpha", ("test_guidance",)),
        ("gradient guidance without a sigma", "guidance", "scale * sigma**2 / alpha", "scale * sigma / alpha", ("test_guidance",)),
        ("gradient guidance without alpha", "guidance", "scale * sigma**2 / alpha", "scale * sigma**2", ("test_guidance",)),
        ("slope in x0 for that in x_t", "guidance", "torch.autograd.grad(value.sum(), x, ", "torch.autograd.grad(value.sum(), prediction.x0, ", ("test_guidance",)),
        ("slope shared by the batch", "guidance", "torch.autograd.grad(value.sum(), x, ", "torch.autograd.grad(value.mean(), x, ", ("test_guidance",)),
        ("gradient guidance at alpha = 0 let through", "guidance", "alpha > TINY, scale", "alpha > 0, scale", ("test_guidance",)),
        # --- denoiser
        ("pooled network hears tokens", "denoiser/layers", 'None if conditioning == "pooled" else condition_dim', "condition_dim", ("test_denoiser",)),
        ("token network hears the vector", "denoiser/layers", 'None if conditioning == "tokens" else condition_dim', "condition_dim", ("test_denoiser",)),
        ("dropped condition keeps its tokens", "condition", "self.mask & keep[:, None]", "self.mask", ("test_denoiser",)),
        ("dropped condition keeps its vector", "condition", "self.pooled * keep[:, None]", "self.pooled", ("test_denoiser",)),
        # --- training
        ("t = T never trained", "loss", "return 1 - (shift + stratum) / n", "return (shift + stratum) / n * 0.9", ("test_loss",)),
        ("times tied to positions in the batch", "loss", "stratum = torch.randperm(n, generator=generator, device=device)", "stratum = torch.arange(n, device=device)", ("test_loss",)),
        ("weight not squared", "loss", "weigh(level) * (level.sigma / det) ** 2", "weigh(level) * (level.sigma / det).abs()", ("test_loss",)),
        ("min-SNR from below", "loss", "return level.snr.clamp(max=5)", "return level.snr.clamp(min=5)", ("test_loss",)),
        ("labels dropped per batch", "loss", "torch.rand(len(x0), generator=generator, device=x0.device) < condition_dropout", "(torch.rand(1, generator=generator, device=x0.device) < condition_dropout).expand(len(x0))", ("test_loss",)),
        ("adams: a corrector that is never used", "sampling", "if before is not None:", "if False:", ("test_adams",)),
        ("adams: a wrong moment", "sampling", "one - math.sin(s) * (t - s)]", "one + math.sin(s) * (t - s)]", ("test_adams",)),
        ("adams: powers of guesses the wrong way round", "sampling", "increasing=True", "increasing=False", ("test_adams",)),
        ("adams: a polynomial in sigma", "sampling", "alpha = math.cos(_angle(level_t))", "alpha = -math.sin(_angle(level_t))", ("test_adams",)),
        ("EMA without warm-up", "step", "1 - min(self.decay, (1 + n) / (10 + n))", "1 - self.decay", ("test_training",)),
        ("a recorded step on the first batch for ever", "step", "place.copy_(tensor, non_blocking=True)", "pass", ("test_step",)),
        ("a result that the next step overwrites", "step", "return repeat().clone()", "return repeat()", ("test_step",)),
        ("a recorded learning rate that stays", "step", 'group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr', 'group["lr"] if isinstance(group["lr"], Tensor) else lr', ("test_step",)),
        ("nobody's condition withheld", "loss", "if condition is not None and drop is not None:", "if False:", ("test_step", "test_loss")),
        ("the batches of another process", "data/batches", "self.batches.number(self.batches.start + k)", "self.batches.number(k)", ("test_step",)),
        # --- exact, likelihood
        ("std for variance in the oracle", "exact", "shrink = alpha[:, None] * self.stds**2 / v\n        x0", "shrink = alpha[:, None] * self.stds / v\n        x0", ("test_exact",)),
        ("posterior spread of the prior", "exact", "mixture.stds = (self.stds**2 * (sigma**2)[:, None] / v).sqrt()[0]", "mixture.stds = self.stds", ("test_exact",)),
        ("size of a component forgotten", "exact", "return log_weights - (distances + log_volume) / 2", "return log_weights - distances / 2", ("test_exact",)),
        ("a condition that excludes what it names", "exact", "masked_fill(~condition.to(x.device), -math.inf)", "masked_fill(condition.to(x.device), -math.inf)", ("test_exact",)),
        ("covariance within components alone", "exact", "return within + (self.weights[:, None] * offset).T @ offset", "return within", ("test_exact",)),
        ("turned into the axes the wrong way round", "exact", '"bkf,kfg->bkg"', '"bkf,kgf->bkg"', ("test_exact",)),
        ("score with the sign of eps", "exact", "return -self._average(r, 1 / v, x, alpha)", "return self._average(r, 1 / v, x, alpha)", ("test_exact",)),
        ("KL of a step not halved", "likelihood", "_squares(x0 - guess) / 2)", "_squares(x0 - guess))", ("test_likelihood",)),
        ("SNR of one end of the step alone", "likelihood", "(level_s.snr - level_t.snr).to(x0)", "level_s.snr.to(x0)", ("test_likelihood",)),
        ("prior not halved", "likelihood", "prior = _squares(first.alpha / first.sigma * x0) / 2", "prior = _squares(first.alpha / first.sigma * x0)", ("test_likelihood",)),
        ("outermost bins that end", "likelihood", "high = high.masked_fill(x0 > 1 - half, math.inf)", "high = high.clone()", ("test_likelihood",)),
        ("volume shrinks where it grows", "likelihood", "return log_start + log_det", "return log_start - log_det", ("test_likelihood",)),
        ("divergence by Euler's method", "likelihood", "step * (divergence + divergence_ahead) / 2", "step * divergence", ("test_likelihood",)),
        ("width of a bin multiplied in twice", "likelihood", "- math.log(width)) / math.log(2)", "+ math.log(width)) / math.log(2)", ("test_likelihood",)),
        # --- text
        ("words that are not known are read", "text/tokens", "return torch.where(batch[\"attention_mask\"].bool() & ~unknown & says_something, ids, -1)", "return torch.where(batch[\"attention_mask\"].bool(), ids, -1)", ("test_text",)),
        ("CLIP's summary taken from the first token", "text/encoder", "last = (mask * position).argmax(dim=1)", "last = (mask * position).argmin(dim=1)", ("test_text_pretrained", "test_alignment")),
        ("frozen encoder in training mode", "text/encoder", "super().train(mode and not self.frozen)", "super().train(mode)", ("test_text_pretrained",)),
        ("cache kept when weights change", "text/encoder", "self._forget()  # another device", "pass  # another device", ("test_text_pretrained",)),
        # --- alignment
        ("captions never asked for their picture", "text/clip", "F.cross_entropy(logits.T[: len(x)], right)", "F.cross_entropy(logits, right)", ("test_alignment",)),
        ("temperature forgotten", "text/clip", "scale = self.model.logit_scale.exp().clamp(max=100)", "scale = self.model.logit_scale", ("test_alignment",)),
        ("alignment pushes away", "text/alignment", "distance = 1 - self._cosine(x0, vectors)", "distance = 1 + self._cosine(x0, vectors)", ("test_alignment",)),
        ("alignment at every level alike", "text/alignment", "((level.alpha**2).to(distance) * keep * distance)", "(keep * distance)", ("test_alignment",)),
        ("alignment with captions that were withheld", "text/alignment", "keep = keep & ~drop", "pass", ("test_alignment",)),
        # --- two critters
        ("held-out pairs leak into scenes", "critters/scene", 'other = sample_critter(rng, "train" if split == "train" else "all")', 'other = sample_critter(rng, "all")', ("test_pairs",)),
        ("right and left confused", "critters/captions", '"left of": ("right of", "to the right of")', '"left of": ("left of", "to the right of")', ("test_pairs",)),
        ("turned order, same words", "critters/captions", "joint.join(reversed(texts) if turned else texts)", "joint.join(texts)", ("test_pairs",)),
        ("side by side for one above the other", "critters/drawing", "along = RELATIONS.index(scene.relation)  #", "along = 1 - RELATIONS.index(scene.relation)  #", ("test_pairs",)),
        # --- conditions, labels, doors
        ("a label of nothing has a vector", "condition", "self.embedding(ids.clamp(min=0)) * given[:, None]", "self.embedding(ids.clamp(min=0))", ("test_condition",)),
        ("a label is no token", "condition", "Condition(vectors[:, None], given[:, None], vectors)", "Condition(vectors[:, None], given[:, None] & False, vectors)", ("test_condition",)),
        ("rows taken in their old order", "condition", "at = torch.as_tensor(rows, device=self.mask.device)", "at = torch.as_tensor(rows, device=self.mask.device).sort().values", ("test_condition",)),
        ("cut captions are not named", "text/tokens", "if ids.shape[1] >= max_length:", "if ids.shape[1] > max_length:", ("test_text",)),
        ("marks around nothing are read", "text/tokens", "& ~unknown & says_something, ids, -1)", "& ~unknown, ids, -1)", ("test_text",)),
        ("a compiled network loses its name", "files", 'key.replace("_orig_mod.", ""): value', "key: value", ("test_own_networks",)),
        ("an exported model one step late", "denoiser/diffusion", "level = schedule((time + 1) / self.steps)", "level = schedule(time / self.steps)", ("test_interop",)),
        ("an exported EDM input scaled twice", "denoiser/diffusion", "sample = sample * (level.sigma**2 + SIGMA_DATA**2).sqrt().to(sample)", "sample = sample * 1.0", ("test_interop",)),
        # --- guidance, one inside another
        ("negative ignored beside a condition", "guidance", "other = negative.expand(len(x_t))", "other = every.drop(torch.ones_like(every.mask[:, 0]))", ("test_guidance",)),
        ("rescaled outside its interval", "guidance", "dtype=x_t.dtype), 1.0), x_t)", "dtype=x_t.dtype), scale), x_t)", ("test_guidance",)),
        ("clamped on one side", "guidance", ".x0.clamp(low, high)", ".x0.clamp(max=high)", ("test_guidance",)),
        # --- data and metrics
        ("the same order every epoch", "data/batches", "np.random.default_rng((self.seed, epoch))", "np.random.default_rng(self.seed)", ("test_batches",)),
        ("captions of the first epoch for ever", "data/batches", "self.caption(row, epoch)", "self.caption(row, 0)", ("test_batches",)),
        ("captions of no picture", "data/batches", "[caption for caption in negative if caption]", "negative", ("test_batches",)),
        ("a spiral denser inside", "data/points", "angle = (low**2 + (high**2 - low**2) * torch.rand(n, generator=generator)).sqrt()", "angle = low + (high - low) * torch.rand(n, generator=generator)", ("test_points",)),
        ("moons that do not reach into each other", "data/points", "1 - angle.cos()) - 0.5", "-angle.cos())", ("test_points",)),
        ("a board of stripes", "data/points", "column = 2 * (square % 2) + row % 2", "column = 2 * (square % 2)", ("test_points",)),
        ("a ring of the wrong radius", "data/points", "radius = math.sqrt(2 * (1 - std**2))", "radius = math.sqrt(2)", ("test_points",)),
        ("a cat on its head", "data/points", "np.stack([columns, -rows], 1)", "np.stack([columns, rows], 1)", ("test_points",)),
        ("pixels in [0, 1]", "pixels", "return pixels.float() / 127.5 - 1", "return pixels.float() / 255", ("test_pixels", "test_classic_bugs")),
        ("null becomes a word", "data/folder", 'if value is None or value != value:\n        return ""', 'if value is None or value != value:\n        return str(value)', ("test_folder",)),
        ("16 bits cut at 255", "data/folder", ".clip(0, 65535) / 257)", ".clip(0, 255))", ("test_pictures",)),
        ("clear pixels show what they hide", "data/folder", "if not upright.has_transparency_data:", "if True:", ("test_pictures",)),
        ("a link out of the folder is followed", "data/folder", "if not path.resolve().is_relative_to(inside):", "if False:", ("test_pictures",)),
        ("an exported chain begins below noise", "schedule", 'timestep_spacing="trailing",', 'timestep_spacing="leading",', ("test_exported_schedules",)),
        ("a broken step is taken", "step", "elif not bool(self.good):", "elif False:", ("test_step",)),
        ("the test split is trained on", "data/folder", "if root in path.parents}", "}", ("test_folder",)),
        ("held-back pictures are trained on", "recipes", "Source(part(images, ~back), kept,", "Source(images, captions,", ("test_recipes",)),
        ("energy distance without the within terms", "metrics", "weights[len(x) :] = -1 / len(y)", "weights[len(x) :] = 1 / len(y)", ("test_metrics",)),
        ("an interval of the jackknife too narrow", "metrics", "error = math.sqrt((groups - 1) * float(without", "error = math.sqrt(float(without", ("test_metrics",)),
        ("a ball that counts its own centre", "metrics", "kthvalue(k + 1, dim=1)", "kthvalue(k, dim=1)", ("test_metrics_sets",)),
        ("recall by the balls of the data", "metrics", "apart < radius_x[:, None]", "apart < radius_y", ("test_metrics_sets",)),
        ("a limit that adds the bias", "metrics", "return 2 * distance(x.flatten(0, 1), y.flatten(0, 1)) - sum(halves) / 2", "return sum(halves) / 2", ("test_metrics_sets",)),
        ("a floor without the diagonal", "metrics", "(pairs.sum() + pairs.diagonal().sum()) / 2", "pairs.sum() / 2", ("test_metrics_sets",)),
        ("a correction that forgets false alarms", "metrics", "q = (p + b - 1) / skill", "q = p / skill", ("test_metrics_sets",)),
        ("a p-value that can be zero", "metrics", "return (1 + int(as_large.sum())) / (1 + permutations)", "return int(as_large.sum()) / permutations", ("test_metrics",)),
        ("a colour error that reads as binding", "critters/scores", 'right["binding"] += _both(r, scene.OWN) == _both(e, scene.OWN)', 'right["binding"] += all(same.values())', ("test_scores",)),
        ("held-out pairs in training", "critters/scene", 'tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT)', "_ALL_PAIRS", ("test_critters",)),
    )
]  # fmt: skip


class Loader(importlib.machinery.SourceFileLoader):
    """Reads one file with one piece of text exchanged."""

    mutant: Mutant

    def get_data(self, path: str) -> bytes:
        data = super().get_data(path)
        return data.replace(self.mutant.old.encode(), self.mutant.new.encode(), 1)

    def get_code(self, fullname: str):  # never from, nor into, a cache of compiled code
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class Finder:
    """Finds the mutated module before anyone else does."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname != f"minidiff.{self.mutant.file.replace('/', '.')}":
            return None
        loader = Loader(fullname, str(ROOT / "minidiff" / f"{self.mutant.file}.py"))
        loader.mutant = self.mutant
        # By its location, so that the module knows its __file__.
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


def caught(mutant: Mutant) -> bool:
    """Whether a test fails, in a child of this process (which has torch loaded already)."""
    child = os.fork()
    if child == 0:
        import pytest

        sys.meta_path.insert(0, Finder(mutant))  # type: ignore[arg-type]
        files = [str(ROOT / "tests" / f"{name}.py") for name in mutant.tests]
        quiet = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*quiet, *files])
        if code not in (0, 1):
            print(said.getvalue())
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        raise RuntimeError(f"{mutant.name}: pytest ended with exit code {code}, so nothing was shown")
    return code == 1


def main() -> int:
    """Run the mutants; exit code 1 if one survives."""
    os.chdir(ROOT)
    import diffusers  # noqa: F401  loaded once, for all children
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    wanted = [m for m in MUTANTS if not sys.argv[1:] or any(w in m.name for w in sys.argv[1:])]
    survivors = 0
    for mutant in wanted:
        source = (ROOT / "minidiff" / f"{mutant.file}.py").read_text()
        if source.count(mutant.old) != 1:
            print(f"STALE     {mutant.name}: its text stands {source.count(mutant.old)} times")
            survivors += 1
            continue
        start = time.monotonic()
        found = caught(mutant)
        survivors += not found
        print(
            f"{'caught' if found else 'SURVIVED'}  {mutant.name}  ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
    print(f"{len(wanted) - survivors} of {len(wanted)} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
