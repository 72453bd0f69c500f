import itertools
import math

import pytest
import torch
from oracle import Mixture, denoiser, gaussian, point_mass, processes

from diffdistill.prediction import Prediction, convert
from diffdistill.process import VE, VP, Rectified, Trig
from diffdistill.teacher import Teacher

float64 = torch.float64
GAUSSIAN = gaussian([0.3, -0.5], [[0.8, 0.3], [0.3, 0.4]])
MIXTURE = Mixture([0.3, 0.7], [[-1.0], [0.8]], [[[0.1]], [[0.3]]])
every_process = pytest.mark.parametrize("process", processes(), ids=str)


def noisy(law, process, number=32):
    generator = torch.Generator().manual_seed(0)
    t = process.time_of((-3 + 5 * torch.rand(number, generator=generator, dtype=float64)).exp())
    return torch.randn(number, law.dimension, generator=generator, dtype=float64), t


@every_process
@pytest.mark.parametrize("to", list(Prediction))
def test_guidance_commutes_with_conversion(process, to):
    """Guiding one prediction and converting equals converting and guiding, and each is one call of the network."""
    teacher = Teacher(denoiser(MIXTURE, process, Prediction.V), guidance=2.5)
    x_t, t = noisy(MIXTURE, process)
    cond = {"label": torch.arange(len(t)) % 2}
    calls = teacher.denoiser.backbone.calls
    guided = teacher(x_t, t, cond, to=to)
    assert teacher.denoiser.backbone.calls == calls + 1
    for space in Prediction:
        other = convert(teacher(x_t, t, cond, to=space), x_t, t, process, source=space, to=to)
        torch.testing.assert_close(other, guided, rtol=1e-9, atol=1e-9)


def test_guidance_is_u_plus_w_times_c_minus_u():
    process = VE()
    teacher = Teacher(denoiser(MIXTURE, process), guidance=3.0)
    x_t, t = noisy(MIXTURE, process)
    cond = {"label": torch.zeros(len(t), dtype=torch.long)}
    first_part = torch.tensor([0.0, -math.inf], dtype=float64)
    conditional = MIXTURE.denoise(x_t, process.alpha(t), process.sigma(t), first_part)
    unconditional = MIXTURE.denoise(x_t, process.alpha(t), process.sigma(t))
    torch.testing.assert_close(teacher(x_t, t, cond), unconditional + 3 * (conditional - unconditional))
    torch.testing.assert_close(teacher(x_t, t, cond, guidance=1.0), conditional)
    torch.testing.assert_close(teacher(x_t, t, cond, guidance=0.0), unconditional)


def test_a_teachers_weights_are_frozen_but_its_input_is_not():
    model = denoiser(GAUSSIAN, VE())
    model.backbone.register_parameter("weight", torch.nn.Parameter(torch.ones(())))
    teacher = Teacher(model)
    assert not model.training and not model.backbone.weight.requires_grad
    x_t, t = noisy(GAUSSIAN, VE(), 4)
    assert torch.autograd.gradcheck(lambda x: teacher(x, t), x_t.requires_grad_(True))


ORDERS = {"euler": 1, "ddim": 1, "heun": 2}


@every_process
@pytest.mark.parametrize("solver", ORDERS)
def test_solve_converges_at_its_order(process, solver):
    """The slope of log error over log step on a Gaussian, whose map is exact."""
    first, last = {VP: (800.0, 32.0), VE: (4.0, 0.5), Rectified: (0.9, 0.1), Trig: (1.4, 0.2)}[type(process)]
    teacher = Teacher(denoiser(GAUSSIAN, process))
    x, _ = noisy(GAUSSIAN, process)
    ends = [torch.full((len(x),), t, dtype=float64) for t in (first, last)]
    start, end = ((process.alpha(t), process.sigma(t)) for t in ends)
    exact = GAUSSIAN.flow(x, start, end)
    # VP is a table with a kink at each entry, so its grids step from entry to entry: 768 = 3 * 256
    steps = (24, 48, 96)
    errors = []
    for number in steps:
        times = torch.linspace(first, last, number + 1, dtype=float64).tolist()
        errors.append((teacher.solve(x, times, solver=solver) - exact).abs().max().item())
    slopes = [math.log2(before / after) for before, after in itertools.pairwise(errors)]
    assert slopes == pytest.approx([ORDERS[solver]] * 2, abs=0.25), errors


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_a_point_is_reached_in_one_step(solver):
    """A point mass has straight trajectories: in a straight process Euler's step is exact, DDIM's in every process."""
    law = point_mass([0.4, -1.0])
    for process in processes() if solver == "ddim" else [VE(), Rectified()]:
        teacher = Teacher(denoiser(law, process))
        x, t = noisy(GAUSSIAN, process)
        landed = teacher.solve(x, (t, 0.0), solver=solver)
        torch.testing.assert_close(landed, law.mean.expand_as(landed), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.combinations(processes(), 2)), ids=lambda process: str(process)
)
@pytest.mark.parametrize("answer", ["consistency", "ode"])
def test_snr_matching_leaves_the_trajectories_unchanged(first, second, answer):
    """A start at one signal-to-noise ratio, scaled from one process to the other, ends in the same place."""
    x, t = noisy(GAUSSIAN, first)
    other = second.time_of(first.ratio(t))
    size, other_size = ((p.alpha(t) ** 2 + p.sigma(t) ** 2).sqrt()[:, None] for p, t in ((first, t), (second, other)))
    x_other = x * other_size / size
    if answer == "consistency":  # the exact map, asked in `first` of a network that lives in `second`
        ends = [denoiser(GAUSSIAN, first, native=native, answer="consistency")(x, t) for native in (first, second)]
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-10)
        native = denoiser(GAUSSIAN, second, answer="consistency")(x_other, other)
        torch.testing.assert_close(native, ends[0], rtol=1e-10, atol=1e-10)
        return
    # the solver, along matched times: DDIM depends on nothing but the ratio, so the numbers agree at any step size
    teacher = Teacher(denoiser(GAUSSIAN, second))
    ratios = [first.ratio(t) * factor for factor in (1.0, 0.7, 0.4, 0.15, 0.05)]
    walks = [
        Teacher(denoiser(GAUSSIAN, process, native=second)).solve(
            start, [*[process.time_of(ratio) for ratio in ratios], 0.0], solver="ddim"
        )
        for process, start in ((first, x), (second, x_other))
    ]
    torch.testing.assert_close(walks[0], walks[1], rtol=1e-9, atol=1e-9)
    fine = [first.ratio(t) * 0.98**number for number in range(300)]
    landed = teacher.solve(x_other, [*[second.time_of(ratio) for ratio in fine], 0.0], solver="ddim")
    exact = GAUSSIAN.consistency(x, first.alpha(t), first.sigma(t))
    assert (landed - exact).abs().max() < 0.02  # first order: half a step of 2 percent


@every_process
def test_heun_takes_per_sample_times_some_of_which_are_the_data(process):
    teacher = Teacher(denoiser(GAUSSIAN, process))
    x, t = noisy(GAUSSIAN, process, 6)
    r = torch.where(torch.arange(6) % 2 == 0, 0.0, 0.5 * t)
    mixed = teacher.solve(x, (t, r))
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed[0::2], teacher.solve(x[0::2], (t[0::2], 0.0)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed[1::2], teacher.solve(x[1::2], (t[1::2], r[1::2])), rtol=1e-12, atol=1e-12)


def test_solve_spares_what_it_would_discard():
    teacher = Teacher(denoiser(GAUSSIAN, VE()))
    teacher.solve(torch.zeros(1, 2, dtype=float64), VE().grid(18) + (0.0,), solver="heun")
    assert teacher.denoiser.backbone.calls == 35  # Karras et al. 2022: 18 steps of Heun are 35 evaluations


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="unknown solver 'rk4'; known are euler, ddim, heun"):
        Teacher(denoiser(GAUSSIAN, VE())).solve(torch.zeros(1, 2), (1.0, 0.0), solver="rk4")
