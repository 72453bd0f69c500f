"""Losses as pure functions of tensors. Each returns one value per sample, shape (N,), in float32 or higher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.denoiser import Condition, Denoiser
from diffdistill.prediction import Prediction
from diffdistill.process import lift


def full(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def inject(x: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient with respect to each sample of x is `direction` divided by the sample's size.

    Its value is that of mean((x - sg[x - direction])^2) / 2, the surrogate of the DMD papers, but its gradient is exact
    also where |direction| is far below the rounding of x.
    """
    direction = full(direction).detach()
    product = (full(x) * direction).flatten(1).mean(1)
    return 0.5 * direction.square().flatten(1).mean(1) + product - product.detach()


def matching_direction(x: Tensor, x0_real: Tensor, x0_fake: Tensor, *, floor: float) -> Tensor:
    """DMD's normalised score difference (mu_fake - mu_real) / mean|x - mu_real|, the mean taken per sample.

    The published code has no floor, and maps the infinities that follow to large numbers; here the normaliser is at
    least `floor`. Source: Yin et al. 2024b (DMD), in the form of the released code,
    which drops the factor alpha of the paper's weight.
    """
    x, x0_real, x0_fake = full(x).detach(), full(x0_real).detach(), full(x0_fake).detach()
    return (x0_fake - x0_real) / lift(normaliser(x, x0_real, floor=floor), x)


def normaliser(x: Tensor, x0_real: Tensor, *, floor: float) -> Tensor:
    """mean|x - mu_real| of each sample, at least `floor`, shape (N,), detached."""
    return (full(x) - full(x0_real)).detach().abs().flatten(1).mean(1).clamp(min=floor)


def denoising(
    denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Condition | None, *, space: Prediction
) -> Tensor:
    """Denoising score matching, the mean squared error of the prediction `space`.

    Each space is a weight on ||mu - x0||^2: 1 for X0, alpha^2 / sigma^2 for EPS, EDM's 1 / sigma^2 + 1 / sigma_data^2
    for F on VE. All have one optimum.
    """
    x_t = denoiser.process.perturb(x0, eps, t)
    a, b = space.coefficients(t, denoiser.process)
    target = lift(a, x0) * x0 + lift(b, x0) * eps
    return (full(denoiser(x_t, t, cond, to=space)) - full(target)).square().flatten(1).mean(1)


def gan_generator(logits_fake: Tensor) -> Tensor:
    """The non-saturating loss softplus(-D(fake)) (Goodfellow et al. 2014)."""
    return F.softplus(-full(logits_fake))


def gan_discriminator(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)); at its optimum D is the log ratio of real to fake density."""
    return F.softplus(full(logits_fake)) + F.softplus(-full(logits_real))


def pair_distance(made: Tensor, target: Tensor, *, huber: float | None) -> Tensor:
    """How far `made` is from `target` in each sample: the mean square, or pseudo-Huber where `huber` is given.

    Pseudo-Huber is sqrt(mean d^2 + huber^2) - huber, so that its c is huber times the root of the sample's size.

    Source: Song and Dhariwal 2023 (iCT), for the pseudo-Huber distance.
    """
    square = (full(made) - full(target)).square().flatten(1).mean(1)
    return square if huber is None else (square + huber**2).sqrt() - huber


def hinge_generator(logits_fake: Tensor) -> Tensor:
    """-D(fake), the generator's side of the hinge loss (Lim and Ye 2017)."""
    return -full(logits_fake)


def hinge_discriminator(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)): logits beyond 1 on the right side are left alone."""
    return F.relu(1 - full(logits_real)) + F.relu(1 + full(logits_fake))


def approximate_r1(logits: Tensor, logits_near: Tensor) -> Tensor:
    """(D(x) - D(x + sigma n))^2, which is about sigma^2 |grad D|^2 in the mean over standard normal n.

    Source: Lin et al. 2025 (APT), the R1 penalty of Mescheder et al. 2018 without a second derivative.
    """
    return (full(logits) - full(logits_near)).square()


def identity_distillation(x: Tensor, x0_real: Tensor, x0_fake: Tensor, *, alpha: float | Tensor) -> Tensor:
    """SiD's mean of d (mu_real - x - alpha d), d = mu_real - mu_fake, over each sample.

    Attached: the gradient runs through x and through the inputs of both networks. With an ideal critic, alpha = 1/2
    gives the gradient of the Fisher divergence, and alpha = 1 that of SIM's, whose sampling law is held fixed.

    Args:
        alpha: a number, or one per sample, shape (N,).

    Source: Zhou et al. 2024 (SiD), the loss of the released code without its weight.
    """
    x, x0_real, x0_fake = full(x), full(x0_real), full(x0_fake)
    difference = x0_real - x0_fake
    if isinstance(alpha, Tensor):
        alpha = lift(alpha, x)
    return (difference * (x0_real - x - alpha * difference)).flatten(1).mean(1)


def score_implicit(x: Tensor, x0_real: Tensor, x0_fake: Tensor, *, huber: float | None) -> Tensor:
    """SIM's loss -d'(y).(S_fake - grad log q), in terms of denoised samples, for each sample.

    Attached in all three places where the noisy sample enters: in y through both networks, and in the second factor.
    The distance is pseudo-Huber, sqrt(mean y^2 + huber^2), or the mean square where `huber` is None. Means over a
    sample stand for the paper's sums, so that its c is huber times the root of the sample's size.

    Source: Luo et al. 2024 (SIM), the score-gradient theorem; the form by denoised samples is derived from it.
    """
    x, x0_real, x0_fake = full(x), full(x0_real), full(x0_fake)
    difference = x0_real - x0_fake
    product = (difference * (x0_fake - x)).flatten(1).mean(1)
    if huber is None:
        return 2 * product
    return product / (difference.square().flatten(1).mean(1) + huber**2).sqrt()


def consistency_tangent(
    x_t: Tensor,
    velocity: Tensor,
    student: Tensor,
    derivative: Tensor,
    t: Tensor,
    *,
    warmup: float = 1.0,
    form: str = "scm",
    before: Tensor | None = None,
) -> Tensor:
    """cos t df/dt along dx/dt = velocity, for TrigFlow's f = cos t x - sin t F, with warmup < 1 the start of it.

        g = -cos^2 t (F - dx/dt) - warmup (sin t cos t x + sin t cos t dF/dt)

    It is 0 at the exact consistency function; with warmup = 0 it leads to the velocity, which is flow matching. The
    form "rcm" has cos t sqrt(1 - warmup^2 sin^2 t) in the place of cos^2 t, and is the same from warmup = 1 on. On data
    that are a single point both are 0 at every warmup.

    Args:
        x_t, velocity, student: of shape (N, ...), `student` being F, sigma_data times the unit-variance F of the paper.
        derivative: sin t cos t dF/dt, as `Tangents` give it.
        t: shape (N,).
        before: t - h, shape (N,), for the discrete form: where `derivative` is the rotational difference of step h,
            sin h g is then cos t (f(x_t, t) - f(x_(t-h), t - h)) at every h.
    Source: Lu and Song 2024 (sCM), the rearranged tangent; Zheng et al. 2025 (rCM) for the other form, there with
        warmup before x alone in the released code; the discrete form is an identity of rotations.
    """
    before = t if before is None else before
    x_t, velocity, student, derivative = full(x_t), full(velocity), full(student), full(derivative)
    kept = before.cos() if form == "scm" else (1 - (warmup * before.sin()).square()).sqrt()
    follow = lift(t.cos() * kept, x_t) * (student - velocity)
    rest = lift(t.cos() * before.sin(), x_t) * x_t + lift(before.sin() / t.sin(), x_t) * derivative
    return (-follow - warmup * rest).detach()  # detached: the target is a constant of the loss


def normalised_tangent(g: Tensor, *, by: str, constant: float) -> Tensor:
    """g / (norm + constant) by the norm "l2" of a sample or its "rms", g cut to [-1, 1] by "clip", or g by "none".

    A sample with a value or norm that is not finite becomes NaN, and never 0 or 1, so that the run stops.

    Source: Lu and Song 2024 (sCM), for l2 and clip with constant 0.1; rms is another constant's l2, found in the wild.
    """
    norm = g.flatten(1).norm(dim=1)
    match by:
        case "l2":
            made = g / lift(norm + constant, g)
        case "rms":
            made = g / lift(norm / g[0].numel() ** 0.5 + constant, g)
        case "clip":
            made = g.clamp(-1.0, 1.0)
        case "none":
            made = g
        case _:
            raise ValueError(f"a tangent is normalised by l2, rms, clip or none, got {by!r}")
    return made + lift(norm - norm, g)  # 0, or NaN where the norm is not finite
