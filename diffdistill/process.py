"""The forward process x_t = alpha(t) x0 + sigma(t) eps, with t = 0 at the data and t = t_max at the noise.

Every law is four functions of time and an inverse. Everything else (noising, transitions, change of process) is written
once, on top of them, in `Process`. Times have shape (N,); on devices that have float64 they are float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


def lift(coefficient: Tensor, like: Tensor) -> Tensor:
    """`coefficient` of shape (N,) in the dtype of `like`, shaped to broadcast against `like` of shape (N, ...)."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class Process(ABC):
    """A Gaussian path from data to noise.

    `sigma_data` is the standard deviation of the data the process was set up for; EDM's preconditioning reads it.
    """

    t_max: float
    sigma_data: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient at t of shape (N,)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient at t of shape (N,)."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha with respect to t, shape (N,)."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma with respect to t, shape (N,)."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """The time, in [0, t_max], at which sigma / alpha equals `ratio` of shape (N,).

        Ratios above the largest one of the process give t_max.
        """

    @abstractmethod
    def warp(self, u: Tensor) -> Tensor:
        """The process's customary spacing of times: u in [0, 1], shape (N,), to a time in [0, t_max], increasing."""

    @property
    @abstractmethod
    def terminal_std(self) -> float:
        """Standard deviation of the noise that sampling starts from at t_max."""

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha at t of shape (N,); infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps, for x0 and eps of one shape (N, ...) and t of shape (N,)."""
        return lift(self.alpha(t), x0) * x0 + lift(self.sigma(t), x0) * eps

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of x_t given x_s, s <= t: x_t = a x_s + b eps.

        Args:
            s, t: times of shape (N,), in [0, t_max], with alpha(s) > 0.
        Returns:
            a and b, each (N,). b is 0 where s == t, and NaN where s > t: noise cannot be taken away.
        Raises:
            ValueError: shapes differ.
        Source: composition of Gaussians, a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2, where b^2 is
            factored as (sigma_t - a sigma_s)(sigma_t + a sigma_s) so that it vanishes exactly at s == t.
        """
        if s.shape != t.shape:
            raise ValueError(f"transition needs s and t of one shape, got {tuple(s.shape)} and {tuple(t.shape)}")
        a = self.alpha(t) / self.alpha(s)
        carried = a * self.sigma(s)
        added = (self.sigma(t) - carried).clamp(min=0)  # rounding may leave a difference just below 0
        b = (added * (self.sigma(t) + carried)).sqrt()
        return a, torch.where(s <= t, b, torch.nan)

    def prior_std(self, t: float) -> float:
        """Standard deviation of the pure noise that a generator starting at time t is fed.

        At t_max that is `terminal_std` (a VP table's last sigma is not exactly 1; samplers start from 1 all the same);
        at an earlier time, sigma(t).
        """
        if t == self.t_max:
            return self.terminal_std
        return self.sigma(torch.tensor([t], dtype=torch.float64)).item()

    def grid(self, steps: int, *, first: float = 1.0) -> tuple[float, ...]:
        """`steps` descending times warp(first), ..., evenly spaced before the warp; t = 0 is not among them."""
        u = first * (1 - torch.arange(steps, dtype=torch.float64) / steps)
        return tuple(self.warp(u).tolist())

    def same_law(self, other: "Process") -> bool:
        """Whether x_t means the same in both: equal t_max and, at 257 times, equal alpha and sigma."""
        if self.t_max != other.t_max:
            return False
        t = torch.linspace(0, self.t_max, 257, dtype=torch.float64)
        return torch.equal(self.alpha(t), other.alpha(t)) and torch.equal(self.sigma(t), other.sigma(t))

    def __str__(self) -> str:
        return type(self).__name__


class VP(Process):
    """Variance preserving, from a table of alphas_cumprod: index n of the table is t = n + 1, since t = 0 is the data.

    With theta = atan(sigma / alpha), alpha = cos theta and sigma = sin theta hold exactly. Between two entries of the
    table the log-SNR is linear in t; on [0, 1] sigma / alpha is, since the log-SNR of the data is infinite; and
    where the table ends at zero SNR, alpha / sigma is linear on the last interval, by the same symmetry.

    The path is continuous with a kink at each entry of the table. There the derivatives are the mean of both sides: a
    one-sided slope belongs to a time half a step away, and would bias every Euler or Heun solution by the same amount
    however many steps it takes.

    Source: Ho et al. 2020 (linear betas); Rombach et al. 2022 (scaled linear); Nichol and Dhariwal 2021 (cosine).
    """

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor, *, sigma_data: float = 1.0):
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must be a list of at least two numbers, got shape {tuple(table.shape)}")
        if not (table.diff() < 0).all() or table[0] >= 1 or table[-1] < 0:
            raise ValueError("alphas_cumprod must decrease strictly inside [0, 1); check the beta schedule")
        self.t_max = float(len(table))
        self.sigma_data = sigma_data
        self.ends_at_zero_snr = table[-1].item() == 0
        finite = table[:-1] if self.ends_at_zero_snr else table
        self._log_ratio = {torch.device("cpu"): 0.5 * ((1 - finite) / finite).log()}

    @staticmethod
    def linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, **options) -> "VP":
        """DDPM's table: betas evenly spaced (Ho et al. 2020)."""
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return VP((1 - betas).cumprod(0), **options)

    @staticmethod
    def scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, **options) -> "VP":
        """Stable Diffusion's table: square roots of the betas evenly spaced."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return VP((1 - betas).cumprod(0), **options)

    @staticmethod
    def cosine(steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999, **options) -> "VP":
        """Improved DDPM's table (Nichol and Dhariwal 2021), with betas clipped at `beta_max`."""
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        bar = torch.cos((grid + offset) / (1 + offset) * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=beta_max)
        return VP((1 - betas).cumprod(0), **options)

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].sin()

    def d_alpha(self, t: Tensor) -> Tensor:
        angle, speed = self._angle(t)
        return -angle.sin() * speed

    def d_sigma(self, t: Tensor) -> Tensor:
        angle, speed = self._angle(t)
        return angle.cos() * speed

    def time_of(self, ratio: Tensor) -> Tensor:
        table = self._table(ratio.device)
        log_ratio = ratio.to(table.dtype).log()
        left = torch.searchsorted(table, log_ratio.contiguous(), right=True).clamp(1, len(table) - 1) - 1
        t = left + 1 + (log_ratio - table[left]) / (table[left + 1] - table[left])
        if self.ends_at_zero_snr:
            t = torch.where(log_ratio > table[-1], self.t_max - (table[-1] - log_ratio).exp(), t)
        t = torch.where(log_ratio < table[0], (log_ratio - table[0]).exp(), t)
        return t.clamp(max=self.t_max)

    def warp(self, u: Tensor) -> Tensor:
        return u * self.t_max

    @property
    def terminal_std(self) -> float:
        return 1.0

    def _table(self, device: torch.device) -> Tensor:
        """log(sigma / alpha) at t = 1, 2, ..., kept on each device that asked for it."""
        if device not in self._log_ratio:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._log_ratio[device] = self._log_ratio[torch.device("cpu")].to(device, dtype)
        return self._log_ratio[device]

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """atan(sigma / alpha) and its derivative with respect to t."""
        table = self._table(t.device)
        left = (t.detach().floor().long() - 1).clamp(0, len(table) - 2)
        before = (t.detach().ceil().long() - 2).clamp(0, len(table) - 2)  # differs from `left` only at an entry
        slope = table[left + 1] - table[left]
        ratio = (table[left] + (t - 1 - left) * slope).exp()
        slope = (slope + table[before + 1] - table[before]) / 2
        angle, speed = ratio.atan(), slope * ratio / (1 + ratio**2)
        first = table[0].exp()
        near_data = t < 1
        angle = torch.where(near_data, (first * t).atan(), angle)
        speed = torch.where(near_data, first / (1 + (first * t) ** 2), speed)
        if self.ends_at_zero_snr:
            rest = (-table[-1]).exp() * (self.t_max - t)
            near_noise = t > self.t_max - 1
            angle = torch.where(near_noise, math.pi / 2 - rest.atan(), angle)
            speed = torch.where(near_noise, (-table[-1]).exp() / (1 + rest**2), speed)
        return angle, speed


class VE(Process):
    """Variance exploding, t = sigma (Karras et al. 2022, table 1, column EDM)."""

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"VE needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.t_max, self.rho, self.sigma_data = sigma_min, float(sigma_max), rho, sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(max=self.t_max)

    def warp(self, u: Tensor) -> Tensor:
        lowest = (self.sigma_min / self.t_max) ** (1 / self.rho)
        return self.t_max * (1 - (1 - lowest) * (1 - u)) ** self.rho  # Karras et al. 2022, table 1; exact at u = 1

    def grid(self, steps: int, *, first: float = 1.0) -> tuple[float, ...]:
        """The steps of Karras et al. 2022, table 1: from warp(first) to sigma_min, both included if steps > 1."""
        u = torch.linspace(first, 0.0, steps, dtype=torch.float64)
        return tuple(self.warp(u).tolist())

    @property
    def terminal_std(self) -> float:
        return self.t_max


class Rectified(Process):
    """The straight path x_t = (1 - t) x0 + t eps, with t = 1 at the noise (Liu et al. 2022; Lipman et al. 2022).

    `shift` changes no coefficient, only the customary spacing of times: warp(u) = shift u / (1 + (shift - 1) u), which
    multiplies sigma / alpha by `shift` (Esser et al. 2024).
    """

    def __init__(self, *, shift: float = 1.0, sigma_data: float = 1.0):
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}; 1 is no shift")
        self.t_max, self.shift, self.sigma_data = 1.0, shift, sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)  # this form holds at 0 and at infinity, and keeps the digits of a small ratio

    def warp(self, u: Tensor) -> Tensor:
        return u / (u + (1 - u) / self.shift)  # this form is exactly 1 at u = 1

    @property
    def terminal_std(self) -> float:
        return 1.0


class Trig(Process):
    """TrigFlow: x_t = cos(t) x0 + sin(t) sigma_data eps on [0, pi / 2] (Lu and Song 2024)."""

    def __init__(self, *, sigma_data: float = 1.0):
        self.t_max, self.sigma_data = math.pi / 2, sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin() * self.sigma_data

    def d_alpha(self, t: Tensor) -> Tensor:
        return -t.sin()

    def d_sigma(self, t: Tensor) -> Tensor:
        return t.cos() * self.sigma_data

    def time_of(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_data).atan()

    def warp(self, u: Tensor) -> Tensor:
        return u * (math.pi / 2)

    @property
    def terminal_std(self) -> float:
        return self.sigma_data


PROCESSES: dict[str, type[Process]] = {"vp": VP, "ve": VE, "rectified": Rectified, "trig": Trig}
