"""Exact denoisers: what a perfect network would say (used in every chapter).

A network is trained to guess ``E[x0 | x_t]``. For three kinds of data this mean can be written down,
so there is a right answer to hold networks and samplers against: a mixture of Gaussians; a finite set
of points, which is a mixture whose Gaussians have no width; and a single point.

Let x0 come from component k with probability w_k, and be N(mu_k, s_k²) there. Mixing it with noise,
``x_t = alpha*x0 + sigma*eps``, keeps every component Gaussian::

    p(x_t | k)      = N(alpha*mu_k, v_k),  v_k = alpha² s_k² + sigma²
    r_k             = w_k p(x_t | k) / sum_j w_j p(x_t | j)  (Bayes)
    E[x0  | x_t, k] = mu_k + (alpha s_k² / v_k) (x_t - alpha*mu_k)
    E[eps | x_t, k] =        (sigma      / v_k) (x_t - alpha*mu_k)

and the answers are the averages over k with the weights r_k. Given x_t and k, x0 is Gaussian around its
mean with variance ``s_k² sigma² / v_k``: that is the whole posterior, once more a mixture. Both lines
hold at alpha = 0, where x0 is the mean of all data, and at sigma = 0, where eps is 0 on average:
neither divides by alpha or sigma. The slope of the log-density is the same sum once more (Tweedie's
formula, Efron 2011)::

    score = grad log p_t(x_t)
          = - sum_k r_k (x_t - alpha*mu_k) / v_k = -E[eps | x_t] / sigma

A covariance that is not diagonal is diagonal in the basis of its eigenvectors. There everything above
holds number by number, so x_t - alpha*mu_k is turned into that basis first and back at the end.

For a finite data set r_k is a softmax over squared distances: the perfect denoiser of the training
set looks its answer up in the training set, and sampling with it only ever returns training images.
That a network does not is why diffusion models are useful.
"""

import copy
import math

import torch
from torch import Tensor

from minidiff.forward import NoiseLevel, Prediction

TINY_VARIANCE = 1e-40
"""Stands in for v_k = 0, where r_k then picks the nearest point; see :class:`FiniteData`."""


class GaussianMixture:
    """A mixture of Gaussians, and what follows from it exactly.

    Computed in float64 on the device of ``means``; answers come back in the dtype and on the device
    of the question.

    Args:
        means: ``(K, *D)``, one mean per component; D is the shape of a sample, (2,) or (3, 64, 64).
        stds: standard deviations >= 0: one number for all, (K,) one per component, or ``(K, *D)``.
        weights: (K,) probabilities of the components, scaled to sum to 1; None for equal ones.
        covariances: in place of ``stds``: (F, F), one for all, or (K, F, F), with F the number of
            values of a sample; symmetric, without negative eigenvalues.

    Raises:
        ValueError: shapes that do not fit, a negative std, weight or eigenvalue, a number that is not
            finite, or both stds and covariances.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor | float | None = None,
        weights: Tensor | None = None,
        *,
        covariances: Tensor | None = None,
    ) -> None:
        k, self.shape = len(means), means.shape[1:]
        if means.ndim < 2 or means.numel() == 0:
            raise ValueError(f"means of shape {tuple(means.shape)}: give (K, *D), e.g. (8, 2)")
        self.axes: Tensor | None = None  # (K, F, F): eigenvectors as columns; None for the usual axes
        if covariances is not None:
            if stds is not None:
                raise ValueError("both stds and covariances are given: give one of them")
            stds, self.axes = _principal_axes(covariances, k, self.shape.numel())
            stds = stds.reshape(means.shape)
        stds = torch.as_tensor(1.0 if stds is None else stds)
        if stds.shape == (k, 1):
            stds = stds[:, 0]
        if stds.shape not in ((), (k,), means.shape):
            wanted = f"one number, ({k},) or {tuple(means.shape)}"
            raise ValueError(f"stds of shape {tuple(stds.shape)}: give {wanted}")
        weights = torch.ones(k) if weights is None else weights
        if weights.shape != (k,):
            raise ValueError(f"weights of shape {tuple(weights.shape)}: give ({k},), one per mean")
        self.dtype = means.dtype if means.is_floating_point() else torch.get_default_dtype()
        self.means = _float64(means).flatten(1)  # (K, F), F = number of values of a sample
        stds = stds.flatten(1) if stds.ndim > 1 else stds.expand(k)[:, None]
        self.stds = _float64(stds).to(self.means)  # (K, F), or (K, 1): the same for all F
        self.axes = None if self.axes is None else self.axes.to(self.means)
        self.weights = _float64(weights).to(self.means)  # (K,)
        for name, values in (("mean", self.means), ("std", self.stds), ("weight", self.weights)):
            bad = values[~values.isfinite() | ((values < 0) & (name != "mean"))]
            if len(bad):
                wanted = "a finite number" if name == "mean" else "finite and not negative"
                raise ValueError(f"a {name} is {bad[0].item():g}: it must be {wanted}")
        if not self.weights.sum() > 0:
            raise ValueError("weights are all 0: at least one component must be possible")
        self.weights = self.weights / self.weights.sum()

    def denoise(self, x_t: Tensor, level: NoiseLevel, condition: Tensor | None = None) -> Prediction:
        """E[x0 | x_t] and E[eps | x_t]: the best guess there is, in the sense of squared error.

        Args:
            x_t: noisy samples, ``(B, *D)``.
            level: of shape () or (B,); alpha = 0 and sigma = 0 are allowed.
            condition: what is known about x0: a bool tensor (K,) or (B, K) that is True for the
                components it may come from. None: any. So guidance can be studied exactly.

        Returns:
            Prediction, shaped and typed like ``x_t``.

        Raises:
            ValueError: shapes do not fit, or the condition leaves no component.
        """
        x, alpha, sigma, v = self._at(x_t, level)
        r = self._log_joint(x, alpha, v, condition).softmax(dim=1)  # (B, K)
        shrink = alpha[:, None] * self.stds**2 / v
        x0 = r @ self.means + self._average(r, shrink, x, alpha)
        eps = sigma * self._average(r, 1 / v, x, alpha)
        return Prediction(x0.reshape(x_t.shape).to(x_t), eps.reshape(x_t.shape).to(x_t))

    def responsibilities(self, x_t: Tensor, level: NoiseLevel, condition: Tensor | None = None) -> Tensor:
        """r_k = p(k | x_t), (B, K): which component was it? Arguments as in :meth:`denoise`."""
        x, alpha, _, v = self._at(x_t, level)
        return self._log_joint(x, alpha, v, condition).softmax(dim=1).to(x_t)

    def posterior(self, x_t: Tensor, level: NoiseLevel) -> "GaussianMixture":
        """All that can be said about x0: the distribution p(x0 | x_t), a mixture again.

        Its mean is :meth:`denoise`'s x0; its covariance is what no denoiser can know.

        Args:
            x_t: one noisy sample, ``(1, *D)``.
            level: of shape () or (1,).

        Raises:
            ValueError: ``x_t`` holds more than one sample.
        """
        if len(x_t) != 1:
            raise ValueError(f"x_t holds {len(x_t)} samples: ask for one posterior at a time")
        x, alpha, sigma, v = self._at(x_t, level)
        mixture = copy.copy(self)
        mixture.weights = self._log_joint(x, alpha, v).softmax(dim=1)[0]  # (K,)
        shrink = (alpha[:, None] * self.stds**2 / v)[0]  # (K, 1 or F)
        offset = self._turn(x[:, None] - alpha[:, None] * self.means)[0]  # (K, F)
        mixture.means = self.means + self._turn_back((shrink * offset)[None])[0]
        mixture.stds = (self.stds**2 * (sigma**2)[:, None] / v).sqrt()[0]
        return mixture

    def score(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """grad log p_t(x_t), shaped and typed like ``x_t`` ``(B, *D)``; equal to -eps/sigma.

        Raises:
            ValueError: sigma = 0 and a component of std 0: points without noise have no density.
        """
        x, alpha, _, v = self._at(x_t, level, density=True)
        r = self._log_joint(x, alpha, v).softmax(dim=1)
        return -self._average(r, 1 / v, x, alpha).reshape(x_t.shape).to(x_t)

    def log_density(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """log p_t(x_t) in nats, (B,). Raises ValueError where :meth:`score` does."""
        x, alpha, _, v = self._at(x_t, level, density=True)
        return self._log_joint(x, alpha, v).logsumexp(dim=1).to(x_t)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` clean samples x0, ``(n, *D)``, typed like ``means``; ``generator`` lives on the CPU."""
        k = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        k, offset = k.to(self.means.device), self.stds[k] * eps.to(self.means)  # offset (n, F)
        if self.axes is not None:
            offset = torch.einsum("nfg,ng->nf", self.axes[k], offset)
        return (self.means[k] + offset).reshape(n, *self.shape).to(self.dtype)

    @property
    def mean(self) -> Tensor:
        """E[x0], ``(*D,)`` float64."""
        return (self.weights @ self.means).reshape(self.shape)

    @property
    def covariance(self) -> Tensor:
        """Cov[x0] of the F values of a sample, (F, F) float64: within plus between components."""
        variances = self.stds.expand_as(self.means) ** 2  # (K, F)
        if self.axes is None:
            within = (self.weights @ variances).diag()
        else:
            within = torch.einsum("k,kfg,kg,khg->fh", self.weights, self.axes, variances, self.axes)
        offset = self.means - self.weights @ self.means
        return within + (self.weights[:, None] * offset).T @ offset

    def _at(
        self, x_t: Tensor, level: NoiseLevel, density: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, F), alpha and sigma (b, 1), v (b, K, 1 or F); b is 1 if one level serves all."""
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"x_t of shape {tuple(x_t.shape)}: give (B, *{tuple(self.shape)})")
        x = _float64(x_t).to(self.means).flatten(1)
        _, alpha, sigma = (part.reshape(-1, 1) for part in level.like(x))
        v = (alpha**2)[:, None] * self.stds**2 + (sigma**2)[:, None]
        if density and not bool((v > 0).all()):
            raise ValueError("points have no density at sigma = 0: ask at a level with noise")
        return x, alpha, sigma, v.clamp(min=TINY_VARIANCE)

    def _log_joint(self, x: Tensor, alpha: Tensor, v: Tensor, condition: Tensor | None = None) -> Tensor:
        """log(w_k p(x_t | k)), (B, K)."""
        mu, log_weights = self.means, self.weights.log()
        if v.shape[2] == 1:  # |x - alpha mu|² multiplied out: many wide images need no (B, K, F)
            squares = (x**2).sum(1, keepdim=True) - 2 * alpha * x @ mu.T + alpha**2 * (mu**2).sum(1)
            distances = squares.clamp(min=0) / v[:, :, 0]
        else:
            distances = (self._turn(x[:, None] - alpha[:, None] * mu) ** 2 / v).sum(2)
        log_volume = (2 * math.pi * v).log().mean(2) * x.shape[1]
        if condition is not None:
            one, many = (len(mu),), (len(x), len(mu))
            if condition.dtype != torch.bool or condition.shape not in (one, many):
                got = f"{condition.dtype} of shape {tuple(condition.shape)}"
                raise ValueError(f"condition is {got}: give bool of shape {one} or {many}")
            log_weights = log_weights.masked_fill(~condition.to(x.device), -math.inf)
            if bool((log_weights == -math.inf).all(-1).any()):
                raise ValueError("the condition leaves no component that x0 may come from")
        return log_weights - (distances + log_volume) / 2

    def _average(self, r: Tensor, factor: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        """sum_k r_k factor_k (x_t - alpha*mu_k), (B, F), for a factor (b, K, 1 or F)."""
        if factor.shape[2] == 1:  # multiplied out, as above
            weights = r * factor[:, :, 0]
            return weights.sum(1, keepdim=True) * x - alpha * (weights @ self.means)
        offset = factor * self._turn(x[:, None] - alpha[:, None] * self.means)  # (B, K, F)
        return torch.einsum("bk,bkf->bf", r, self._turn_back(offset))

    def _turn(self, offset: Tensor) -> Tensor:
        """(B, K, F) from the usual axes into those of each component."""
        return offset if self.axes is None else torch.einsum("bkf,kfg->bkg", offset, self.axes)

    def _turn_back(self, offset: Tensor) -> Tensor:
        """(B, K, F) from the axes of each component into the usual ones."""
        return offset if self.axes is None else torch.einsum("bkg,kfg->bkf", offset, self.axes)


class FiniteData(GaussianMixture):
    """A finite set of points: a mixture of K = N Gaussians with no width and equal weights.

    The exact denoiser of a training set (Karras et al. 2022, appendix B.3). Where sigma is exactly
    0, x0 is the nearest point and eps is 0.

    Args:
        points: ``(N, *D)``, for instance training images (N, C, H, W).

    Raises:
        ValueError: as for :class:`GaussianMixture`.
    """

    def __init__(self, points: Tensor) -> None:
        super().__init__(points, stds=0.0)


def _principal_axes(covariances: Tensor, k: int, f: int) -> tuple[Tensor, Tensor]:
    """Standard deviations (K, F) along the eigenvectors, the columns of (K, F, F)."""
    if covariances.shape not in ((f, f), (k, f, f)):
        wanted = f"({f}, {f}) or ({k}, {f}, {f})"
        raise ValueError(f"covariances of shape {tuple(covariances.shape)}: give {wanted}")
    matrices = _float64(covariances).expand(k, f, f)
    if not torch.allclose(matrices, matrices.mT):
        raise ValueError("a covariance is not symmetric")
    values, axes = torch.linalg.eigh(matrices)
    if bool((values < -1e-9 * values.abs().amax().clamp(min=1)).any()):
        raise ValueError(f"a covariance has the negative eigenvalue {values.min().item():g}")
    return values.clamp(min=0).sqrt(), axes


def _float64(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)  # MPS has no float64
