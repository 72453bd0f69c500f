import math

import pytest
import torch
from oracle import Affine, denoiser, gaussian, processes

from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Denoiser
from diffdistill.generator import STEP_RULES, Generator
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Rectified, Trig
from diffdistill.rng import Rng
from diffdistill.solvers import at, solve

float64 = torch.float64


def rng(*key, slots=4):
    return Rng((0, *key), range(slots), dtype=float64)


def network(process, *, rule="") -> Denoiser:
    torch.manual_seed(0)
    backbone = MLP(width=16, depth=2, told=["span"] if rule == "flow_map" else []).double()
    torch.nn.init.normal_(backbone.leave.weight)
    for embed in backbone.told.values():
        torch.nn.init.normal_(embed.leave.weight, std=0.2)
    return Denoiser(backbone, process, Prediction.F, clock="log_ratio", scale_input=True)


def test_bad_grids_are_refused_by_name():
    model = network(Rectified())
    for grid in ((), (0.5, 0.5), (0.5, 0.7), (1.2, 0.5), (1.0, 0.0), (1.0, -0.5)):
        with pytest.raises(ValueError, match=r"generator\.grid"):
            Generator(model, grid)
    with pytest.raises(
        ValueError, match="step_rule must be one of renoise, same_noise, flow_map, euler, ddim, heun, got 'jump'"
    ):
        Generator(model, (1.0,), step_rule="jump")


@pytest.mark.parametrize("process", processes(), ids=str)
def test_the_prior_is_pure_noise_of_the_first_time(process):
    noise = rng("prior", slots=4096)
    x = Generator(network(process), process.grid(4)).prior(noise)
    assert x.shape == (4096, 2)
    assert x.std().item() == pytest.approx(process.terminal_std, rel=0.05)  # 8192 draws: 0.8 percent


def to_the_data(rule: str) -> torch.Tensor | None:
    """What the last evaluation under a rule is told of where it leads."""
    return torch.zeros(4, dtype=float64) if rule == "flow_map" else None


@pytest.mark.parametrize("rule", STEP_RULES)
def test_one_time_is_the_one_step_path_bit_for_bit(rule):
    process = VE()
    one, many = (Generator(network(process, rule=rule), grid, step_rule=rule) for grid in ((80.0,), (80.0, 5.0, 1.0)))
    x = one.prior(rng("x"))
    direct = one.denoiser(x, torch.full((4,), 80.0, dtype=float64), toward=to_the_data(rule))
    assert torch.equal(one.sample(x, None, rng("s")), direct)
    assert torch.equal(one.rollout(x, None, rng("r"), stop=0), direct)
    assert torch.equal(
        many.rollout(x, None, rng("r"), stop=0), direct
    )  # at the first time the input is the noise itself


@pytest.mark.parametrize("process", processes(), ids=str)
def test_renoising_is_predict_then_perturb_with_fresh_noise(process):
    grid = process.grid(4)[:3]
    generator = Generator(network(process), grid)
    x = generator.prior(rng("x"))
    noise, state = rng("steps"), x
    for t, r in zip(grid[:2], grid[1:], strict=True):
        x0 = generator.denoiser(state, at(t, state)).detach()
        state = process.perturb(x0, noise.normal((2,)), at(r, state))
    expected = generator.denoiser(state, at(grid[2], state))
    assert torch.equal(generator.rollout(x, None, rng("steps"), stop=2), expected)
    assert torch.equal(generator.sample(x, None, rng("steps")), expected)


@pytest.mark.parametrize("process", processes(), ids=str)
def test_the_same_noise_is_that_which_sampling_began_with(process):
    grid = process.grid(4)[:3]
    generator = Generator(network(process), grid, step_rule="same_noise")
    x = generator.prior(rng("x"))
    eps, state = rng("x").normal((2,)), x
    for t, r in zip(grid[:2], grid[1:], strict=True):
        state = process.perturb(generator.denoiser(state, at(t, state)).detach(), eps, at(r, state))
    expected = generator.denoiser(state, at(grid[2], state))
    torch.testing.assert_close(generator.sample(x, None, rng("s")), expected, rtol=1e-10, atol=1e-10)


def test_the_same_noise_is_not_added_to_what_keeps_some():
    model = Denoiser(network(VE()).backbone, VE(), Prediction.F, clock="log_ratio", boundary=0.002)
    with pytest.raises(ValueError, match=r"those of generator\.boundary=0\.002 keep some; take step_rule=renoise"):
        Generator(model, (80.0, 1.0), step_rule="same_noise")


@pytest.mark.parametrize("rule", STEP_RULES)
def test_no_gradient_comes_from_before_the_stop(rule):
    """The last evaluation alone carries gradient: as if its input were a constant."""
    process = VE()
    generator = Generator(network(process, rule=rule), (80.0, 5.0, 1.0), step_rule=rule)
    parameters = list(generator.denoiser.parameters())
    x = generator.prior(rng("x")).requires_grad_(True)
    for stop in range(3):
        last = generator.rollout(x, None, rng("r"), stop=stop)
        gradients = torch.autograd.grad(last.square().sum(), [*parameters, x], retain_graph=True, allow_unused=True)
        assert (gradients[-1] is None) == (stop > 0)
        seen = []
        hook = generator.denoiser.backbone.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0])
        )
        generator.rollout(x, None, rng("r"), stop=stop)
        hook.remove()
        t = torch.full((4,), generator.grid[stop], dtype=float64)
        scale = (0.25 + t**2).sqrt()[:, None]
        alone = generator.denoiser(seen[-1].detach() * scale, t, toward=to_the_data(rule))
        expected = torch.autograd.grad(alone.square().sum(), parameters, allow_unused=True)
        for ours, theirs in zip(gradients[:-1], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_sampling_leaves_no_graph():
    generator = Generator(network(VE()), (80.0, 1.0))
    assert not generator.sample(generator.prior(rng("x")), None, rng("s")).requires_grad


@pytest.mark.parametrize("process", [VE(), Rectified()], ids=str)
@pytest.mark.parametrize("rule", ["euler", "ddim", "heun"])
def test_sampling_by_the_ode_is_the_solver_down_to_the_data(process, rule):
    grid = process.grid(4, first=0.9)[:3]
    generator = Generator(denoiser(gaussian([0.3, -0.5], [[0.8, 0.3], [0.3, 0.4]]), process), grid, step_rule=rule)
    x = generator.prior(rng("x"))

    def predict(x_t, t, *, to):
        return generator.denoiser(x_t, t, to=to)

    expected = solve(predict, process, x, (*grid, 0.0), solver=rule)
    torch.testing.assert_close(generator.sample(x, None, rng("s")), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", [VP.scaled_linear(), VE(), Rectified(), Trig()], ids=str)
def test_an_exact_consistency_function_samples_the_data_law_in_one_step_and_in_four(process):
    """Re-noising is exact for it; what is left is the start: pure noise, though x_t at t_max holds some data."""
    law = gaussian([0.3, -0.5], [[0.8, 0.3], [0.3, 0.4]])
    generator = Generator(denoiser(law, process, answer="consistency"), process.grid(4)[:3])
    draws = rng("x", slots=20_000)
    for samples in (generator.rollout(generator.prior(draws), None, draws, stop=stop) for stop in (0, 2)):
        # three standard errors of 20,000 samples, and for the start of the SD table alpha = 0.07 of a mean of 0.6
        assert (samples.mean(0) - law.mean).abs().max() < 3 * 0.9 / math.sqrt(20_000) + 0.05
        assert (samples.T.cov() - law.covariance).abs().max() < 3 * 0.8 * math.sqrt(2 / 20_000) + 0.01


def test_an_affine_generator_draws_its_gaussian():
    generator = Generator(Denoiser(Affine(0.3, 1.2, 80.0), VE(), Prediction.X0, clock="thousand"), (80.0,))
    draws = rng("x", slots=1000)
    x = generator.prior(draws)
    torch.testing.assert_close(generator.sample(x, None, draws), 0.3 + 1.2 * x / 80)
