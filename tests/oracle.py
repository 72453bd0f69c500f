"""Closed forms to test against: data laws whose denoiser, score and PF-ODE are known, as backbones of the real classes.

A law is a mixture of Gaussians in d dimensions with any covariances; a Gaussian is a mixture of one, a point mass has
covariance 0, a finite data set is a mixture of point masses. Formulas speak of (alpha, sigma) and of nothing else, so
that they hold in every process, and none of them calls the code under test for anything but these two numbers and their
derivatives.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.denoiser import Backbone, Condition, Denoiser
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Process, Rectified, Trig
from diffdistill.rng import Rng


def processes() -> list[Process]:
    """One of each law, with a sigma_data that is not 1 where the law has one."""
    return [VP.linear(sigma_data=0.7), VE(sigma_data=0.5), Rectified(shift=3.0, sigma_data=0.8), Trig(sigma_data=0.6)]


class Mixture:
    """sum_k weights[k] N(means[k], covariances[k]), in float64.

    Args:
        weights (K,), means (K, d), covariances (K, d, d), the last possibly singular.
    """

    def __init__(self, weights, means, covariances):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covariances = torch.as_tensor(covariances, dtype=torch.float64)
        self.variances, self.axes = torch.linalg.eigh(self.covariances)  # (K, d), (K, d, d)
        self.variances = self.variances.clamp(min=0)

    @property
    def dimension(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Of the whole mixture: the mean of the covariances plus the covariance of the means."""
        spread = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + (spread.T * self.weights) @ spread

    def sample(self, number: int, seed: int = 0) -> Tensor:
        """(number, d)."""
        generator = torch.Generator().manual_seed(seed)
        part = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        z = torch.randn(number, self.dimension, generator=generator, dtype=torch.float64)
        return self.means[part] + torch.einsum("nij,nj->ni", self.axes[part], self.variances[part].sqrt() * z)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """E[x0 | x], shape (N, d), for x (N, d) and alpha, sigma (N,); log_weights (N, K) replace the weights."""
        offset, variance = self._centred(x, alpha, sigma)
        posterior = torch.softmax(self._log_parts(offset, variance, log_weights), dim=1)
        shrunk = alpha[:, None, None] * self.variances / variance * offset
        means = self.means + torch.einsum("kij,nkj->nki", self.axes, shrunk)
        return torch.einsum("nk,nki->ni", posterior, means)

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log of the density of x_t at x, shape (N,)."""
        return self._log_parts(*self._centred(x, alpha, sigma), None).logsumexp(1)

    def flow(self, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        """Where the PF-ODE carries x from start = (alpha, sigma) to end = (alpha, sigma), each (N,); shape (N, d).

        One Gaussian: an affine map. A mixture in one dimension: the increasing map between the two distributions, which
        the PF-ODE is, since its trajectories do not cross. A mixture in more dimensions has no closed form.
        """
        if len(self.weights) == 1:
            (alpha, sigma), (alpha_end, sigma_end) = start, end
            offset, variance = self._centred(x, alpha, sigma)
            wanted = alpha_end[:, None, None] ** 2 * self.variances + sigma_end[:, None, None] ** 2
            moved = torch.einsum("ij,nj->ni", self.axes[0], ((wanted / variance).sqrt() * offset)[:, 0])
            return alpha_end[:, None] * self.means[0] + moved
        if self.dimension > 1:
            raise ValueError("the PF-ODE of a mixture has no closed form in more than one dimension")
        return self._monotone(x[:, 0], start, end)[:, None]

    def consistency(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The PF-ODE's end at the data, shape (N, d)."""
        return self.flow(x, (alpha, sigma), (torch.ones_like(alpha), torch.zeros_like(alpha)))

    def _monotone(self, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        """The y with P_end(X <= y) = P_start(X <= x), by bisection; x is taken on its lighter side, to keep digits."""
        below, above = self._tails(x, *start)
        left = below < above

        def too_low(y: Tensor) -> Tensor:
            below_y, above_y = self._tails(y, *end)
            return torch.where(left, below_y < below, above_y > above)

        reach = 40 * (end[0] * self.variances.max().sqrt() + end[1]) + end[0] * self.means.abs().max() + 1
        low, high = -reach, reach
        with torch.no_grad():
            for _ in range(200):
                middle = (low + high) / 2
                rise = too_low(middle)
                low, high = torch.where(rise, middle, low), torch.where(rise, high, middle)
        y = high
        if (end[1] == 0).all() and (self.variances == 0).all():
            return y  # the map onto a finite set is constant between its jumps
        slope = (self.log_density(x[:, None], *start) - self.log_density(y[:, None], *end)).exp().detach()
        return y + slope * (x - x.detach())  # the derivative of a monotone transport is the ratio of the densities

    def _tails(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """P(X <= x) and P(X > x) in one dimension."""
        std = (alpha[:, None] ** 2 * self.variances[:, 0] + sigma[:, None] ** 2).sqrt()
        z = (x[:, None] - alpha[:, None] * self.means[:, 0]) / std.clamp(min=1e-300)
        return torch.special.ndtr(z) @ self.weights, torch.special.ndtr(-z) @ self.weights

    def _centred(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x - alpha mean along the axes of each part, and the variances there, both (N, K, d)."""
        offset = torch.einsum("kij,nki->nkj", self.axes, x[:, None] - alpha[:, None, None] * self.means)
        return offset, alpha[:, None, None] ** 2 * self.variances + sigma[:, None, None] ** 2

    def _log_parts(self, offset: Tensor, variance: Tensor, log_weights: Tensor | None) -> Tensor:
        log_weights = self.weights.log() if log_weights is None else log_weights
        return log_weights - 0.5 * (offset**2 / variance + (2 * math.pi * variance).log()).sum(2)


def gaussian(mean: Sequence[float], covariance) -> Mixture:
    return Mixture([1.0], [list(mean)], np.asarray(covariance)[None])


def point_mass(place: Sequence[float]) -> Mixture:
    return gaussian(place, np.zeros((len(place), len(place))))


def finite_set(points: Sequence[Sequence[float]]) -> Mixture:
    number, dimension = len(points), len(points[0])
    return Mixture([1 / number] * number, points, np.zeros((number, dimension, dimension)))


def score(law: Mixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """grad log of the density of x_t, by differentiating the density itself."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(law.log_density(x, alpha, sigma).sum(), x)[0]


def meaning(kind: Prediction, x0: Tensor, x_t: Tensor, t: Tensor, process: Process) -> Tensor:
    """What `kind` denotes for the pair (x0, eps) that made x_t, written out case by case."""
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    eps = (x_t - alpha * x0) / sigma
    if kind is Prediction.X0:
        return x0
    if kind is Prediction.EPS:
        return eps
    if kind is Prediction.V:
        return alpha * eps - sigma * x0
    if kind is Prediction.VELOCITY:
        return process.d_alpha(t)[:, None] * x0 + process.d_sigma(t)[:, None] * eps
    if kind is Prediction.SCORE:
        return -eps / sigma
    std = process.sigma_data
    norm = (alpha**2 * std**2 + sigma**2).sqrt()
    skip, out = alpha * std**2 / norm**2, sigma * std / norm
    return (x0 - skip * x_t) / out


class Oracle(Backbone):
    """A backbone that knows the law of the data.

    Args:
        law: of the data. Labels k < K mean its part k alone, label K the whole mixture.
        process, source: what its inputs and outputs mean.
        scaled: its inputs come divided by their standard deviation.
        answer: "denoiser" for E[x0 | x_t], "consistency" for the PF-ODE's end, "flow_map" for the mean velocity over
            the span that it is told, as the x0 to which it leads.
    """

    def __init__(self, law: Mixture, process: Process, source: Prediction, *, scaled=False, answer="denoiser"):
        super().__init__()
        self.law, self.process, self.source, self.scaled, self.answer = law, process, source, scaled, answer
        self.sample_shape, self.condition_names = (law.dimension,), ("label",)
        self.num_classes = len(law.weights)
        self.calls = 0
        self.entrance = nn.Identity()  # a place to tap
        if answer == "flow_map":
            self.tell("span")

    def tell(self, name: str) -> None:
        self.told.add(name, 1, torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        self.calls += 1
        dtype, x, t = x.dtype, self.entrance(x).double(), time.double() / 1000
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if self.scaled:
            x = x * (alpha**2 * self.process.sigma_data**2 + sigma**2).sqrt()[:, None]
        if self.answer == "consistency":
            x0 = self.law.consistency(x, alpha, sigma)
        else:
            x0 = self.law.denoise(x, alpha, sigma, self._log_weights(cond, len(x)))
        if self.answer == "flow_map" and "span" in cond:
            x0 = torch.where(cond["span"][:, None] > 0, self._leap(x, alpha, sigma, cond["span"].double()), x0)
        return meaning(self.source, x0, x, t, self.process).to(dtype)

    def _leap(self, x: Tensor, alpha: Tensor, sigma: Tensor, span: Tensor) -> Tensor:
        """x_t - t u at x_t = x / (alpha + sigma) of the rectified flow, u the mean velocity from t to t - span."""
        t = sigma / (alpha + sigma)
        r, x = t - span, x / (alpha + sigma)[:, None]
        u = (x - self.law.flow(x, (1 - t, t), (1 - r, r))) / torch.where(span > 0, span, 1.0)[:, None]
        return x - t[:, None] * u

    def _log_weights(self, cond: Condition, number: int) -> Tensor:
        log_weights = self.law.weights.log().expand(number, -1)
        if "label" not in cond:
            return log_weights
        label = cond["label"][:, None]
        chosen = (label == torch.arange(self.num_classes)) | (label == self.num_classes)
        return torch.where(chosen, log_weights, -torch.inf)

    def null(self, cond: Condition) -> Condition:
        return {"label": torch.full_like(cond["label"], self.num_classes)}

    def blocks(self) -> Sequence[nn.Module]:
        return []


def denoiser(
    law: Mixture,
    process: Process,
    source: Prediction = Prediction.X0,
    *,
    native: Process | None = None,
    scaled: bool = False,
    answer: str = "denoiser",
) -> Denoiser:
    """An exact Denoiser for callers who speak `process`, whose network works in `native`."""
    native = process if native is None else native
    backbone = Oracle(law, native, source, scaled=scaled, answer=answer)
    return Denoiser(backbone, native, source, clock="thousand", scale_input=scaled, process=process)


class Affine(Backbone):
    """mean + scale x / std, with trainable mean and scale: a generator of Gaussians."""

    def __init__(self, mean: float, scale: float, std: float):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.std, self.sample_shape, self.condition_names = std, (1,), ()

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        return self.mean + self.scale * x / self.std

    def null(self, cond: Condition) -> Condition:
        raise ValueError("an affine generator has no unconditional branch")

    def blocks(self) -> Sequence[nn.Module]:
        return []


class Slope(Backbone):
    """slope * x: the right family for the denoiser of a centred Gaussian at one time."""

    sample_shape, condition_names = (1,), ()

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, time, cond):
        return self.slope * x

    def null(self, cond):
        raise ValueError("no unconditional branch")

    def blocks(self):
        return []


class Quadrature(Rng):
    """Gauss-Hermite nodes in place of normal draws: every expectation over `draws` of them is a weighted sum, exact to
    rounding for smooth integrands. Row r of draw k holds one node; `weights` (N,) sum to 1."""

    def __init__(self, draws: int, nodes: int):
        node, weight = np.polynomial.hermite_e.hermegauss(nodes)
        node, weight = torch.from_numpy(node), torch.from_numpy(weight / weight.sum())
        grids = torch.meshgrid(*[node] * draws, indexing="ij")
        self.nodes = [grid.reshape(-1, 1) for grid in grids]
        self.weights = math.prod(torch.meshgrid(*[weight] * draws, indexing="ij")).reshape(-1)
        super().__init__(("quadrature",), range(len(self.weights)), dtype=torch.float64)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self.nodes.pop(0)

    def uniform(self) -> Tensor:
        return torch.full((len(self.weights),), 0.5, dtype=torch.float64)
