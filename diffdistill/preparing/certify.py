"""`diffdistill check-teacher`: is this wrapper the pipeline? Its samples, its guidance, what its output means."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.prediction import Prediction, convert
from diffdistill.preparing.hearing import Listener
from diffdistill.preparing.opening import times_of
from diffdistill.process import VP, lift
from diffdistill.prompts import Prompts
from diffdistill.teacher import Teacher

SAMPLES, PROBE_STEPS = 2, 8
ROUNDING = 1e-4  # relative, of a few steps through a network in float32
PROBE_RATIO = 0.1  # sigma / alpha of the probe's clean end; the other is pure noise
UNLIKE = 0.7  # of shares between -1 and 1, at two times: an output of nothing has 1 from eps and from x0
OF_TABLES = (Prediction.EPS, Prediction.V, Prediction.X0)
OF_FLOWS = (Prediction.VELOCITY, Prediction.EPS, Prediction.X0)


@dataclass(frozen=True)
class Certificate:
    """What was found.

    Args:
        differences: by guidance scale, the largest difference of our samples from the pipeline's, over the largest
            value.
        round_trip: the largest error of x_t put together again from the predicted x0 and eps.
        readings: by what the output could mean, how far its share of x_t is from what that meaning has.
        said: what the scheduler's config says that the output means.
    """

    differences: Mapping[float, float]
    round_trip: float
    readings: Mapping[Prediction, float]
    said: Prediction

    @property
    def holds(self) -> bool:
        """Whether the wrapper is the pipeline, with guidance and without."""
        return max(*self.differences.values(), self.round_trip) < ROUNDING

    @property
    def warning(self) -> str:
        """What the probe says against the config; empty where they agree."""
        best = min(self.readings, key=self.readings.get)
        if self.readings[best] > UNLIKE:
            return f"the network's outputs look like no prediction at all, {self.said.value} or other; is it trained?"
        if best is self.said:
            return ""
        return (
            f"the config says that the network predicts {self.said.value}, and its outputs look like {best.value}"
            f"{' (or untrained)' if best is Prediction.V else ''}; if so, let teacher.denoiser say it"
        )

    def __str__(self) -> str:
        lines = [
            f"guidance {scale:g}: {difference:.1e} of the largest value away from the stock pipeline"
            for scale, difference in self.differences.items()
        ]
        lines.append(f"x0 and eps make x_t again to {self.round_trip:.1e}")
        said = ", ".join(f"{reading.value} {error:.2g}" for reading, error in self.readings.items())
        lines.append(f"distance of the outputs from what each meaning would have: {said}")
        lines += [f"warning: {self.warning}"] if self.warning else []
        if not self.holds and self.differences[1.0] < ROUNDING:
            lines.append("without guidance the two agree; with it, the pipeline takes another step than u + w (c - u)")
        return "\n".join([*lines, "certified" if self.holds else "NOT the pipeline's own sampling"])


def certify(listener: Listener, model: Denoiser, prompts: Prompts, *, steps: int, guidance: float) -> Certificate:
    """The pipeline and our wrapper of its network, from the same noises.

    Args:
        model: of the same weights as the pipeline's network.
        steps: of both; one that divides the length of a table, because DDIMScheduler rounds the length of its steps.
        guidance: the scale that is tried beside none; 1 where the pipeline has no negative prompt.
    """
    labels = torch.arange(SAMPLES) % len(prompts.texts)
    texts, cond = [prompts.texts[label] for label in labels], {"label": labels}
    differences = {}
    solver = "euler" if model.source is Prediction.VELOCITY else "ddim"
    asked = {"steps": steps, "first_step_only": False}
    for scale in dict.fromkeys((1.0, guidance)):
        tape = listener.unguided(texts, **asked) if scale == 1 else listener.guided(texts, scale, **asked)
        times = (*times_of(listener.pipeline, prompts.meaning), 0.0)
        ours = Teacher(model, guidance=scale).solve(tape.steps[0].before, times, cond, solver=solver)
        theirs = tape.steps[-1].after
        differences[scale] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    x, t = tape.steps[0].before, torch.full((SAMPLES,), 0.7 * model.process.t_max, dtype=torch.float64)
    with torch.no_grad():
        x0, eps = (model(x, t, cond, to=to) for to in (Prediction.X0, Prediction.EPS))
    again = lift(model.process.alpha(t), x) * x0 + lift(model.process.sigma(t), x) * eps
    trip = ((again - x).abs().max() / x.abs().max()).item()
    return Certificate(differences, trip, probe(model, cond, x), model.source)


@torch.no_grad()
def probe(model: Denoiser, cond: Mapping[str, Tensor], noise: Tensor) -> dict[Prediction, float]:
    """How far the network's outputs are from what each meaning would have, at pure noise and near the data.

    An output's share of x_t, <output, x_t> / <x_t, x_t>, is 1 for eps at pure noise and for x0 near the data, -1 for a
    flow's velocity near the data and 1 at pure noise, and about 0 for v at both ends.

    Args:
        noise: standard normal, (N, *sample_shape).
    """
    native = model.native
    made = Teacher(model).solve(noise, (*native.grid(PROBE_STEPS), 0.0), cond, solver="ddim")
    near = native.time_of(torch.full((len(noise),), PROBE_RATIO, dtype=torch.float64))
    far = torch.full_like(near, native.t_max)
    draws = torch.Generator(noise.device).manual_seed(0)
    fresh = torch.randn(noise.shape, generator=draws, device=noise.device, dtype=noise.dtype)
    errors = dict.fromkeys(OF_TABLES if isinstance(native, VP) else OF_FLOWS, 0.0)
    for t, x_t in ((far, noise), (near, native.perturb(made / made.std(), fresh, near))):
        output = model(x_t, t, cond, to=model.source)
        share = ((output * x_t).sum() / x_t.square().sum()).item()
        alpha, sigma = native.alpha(t[:1]), native.sigma(t[:1])
        for reading in errors:
            x0 = alpha / (alpha**2 + sigma**2)  # the share of the denoiser of a unit Gaussian
            wanted = convert(x0, torch.ones_like(x0), t[:1], native, source=Prediction.X0, to=reading)
            errors[reading] += abs(share - wanted.item())
    return errors
