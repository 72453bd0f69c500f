"""Experts that hand a sample on: who is asked when, and what a step of theirs is."""

import copy

import pytest
import torch
from oracle import denoiser, gaussian, processes

from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Denoiser
from diffdistill.evaluation.sampling import sample_images
from diffdistill.generator import Generator
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Rectified
from diffdistill.relay import Relay
from diffdistill.rng import Rng

float64 = torch.float64


def network(process, seed=0) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(MLP(width=16, depth=2).double(), process, Prediction.F, clock="log_ratio", scale_input=True)


def rng(slots=range(5)):
    return Rng((0,), slots, dtype=float64)


@pytest.mark.parametrize("rule", ["euler", "ddim"])
@pytest.mark.parametrize("phases", [(1, 1, 1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("process", processes(), ids=str)
def test_a_relay_of_identical_experts_is_one_generator(process, phases, rule):
    grid = [share * process.t_max for share in (0.95, 0.7, 0.4, 0.2)]
    model, first, experts = network(process), 0, []
    for length in phases:
        experts.append(Generator(copy.deepcopy(model), grid[first : first + length], step_rule=rule))
        first += length
    relay, whole = Relay(experts), Generator(model, grid, step_rule=rule)
    noise = relay.prior(rng())
    assert torch.equal(noise, whole.prior(rng()))
    # the same formulas, in another order of rounding
    torch.testing.assert_close(relay.sample(noise, {}, rng()), whole.sample(noise, {}, rng()), rtol=1e-10, atol=1e-10)


def test_each_expert_serves_the_times_down_to_the_next_ones_first():
    process, asked = Rectified(), []
    experts = []
    for name, grid in (("high", (1.0, 0.75)), ("low", (0.5, 0.25))):
        model = denoiser(gaussian([0.0], [[1.0]]), process)
        model.backbone.register_forward_pre_hook(
            lambda _, inputs, n=name: asked.append((n, inputs[1][0].item() / 1000))
        )
        experts.append(Generator(model, grid, step_rule="euler"))
    relay = Relay(experts)
    noise = relay.prior(rng())
    relay.sample(noise, {}, rng())
    assert asked == [("high", 1.0), ("high", 0.75), ("low", 0.5), ("low", 0.25)]
    asked.clear()
    relay.simulate(noise, {}, stop=2)
    assert asked == [("high", 1.0), ("high", 0.75)]


@pytest.mark.parametrize("process", processes(), ids=str)
def test_a_step_to_the_edge_carries_a_known_share_of_the_predicted_sample(process):
    """dx_s / dx0 is (t - s) / t for Euler on a rectified flow, and alpha_s - alpha_t sigma_s / sigma_t for DDIM."""
    t, s = 0.7 * process.t_max, 0.4 * process.t_max
    x, x0 = rng().normal((1,)), Rng((1,), range(5), dtype=float64).normal((1,)).requires_grad_(True)
    relay = Relay([Generator(network(process), (t,), step_rule="ddim")])
    (share,) = torch.autograd.grad(relay.move(x, x0, t, s).sum(), x0)
    at_t, at_s = (torch.tensor([time], dtype=float64) for time in (t, s))
    closed = process.alpha(at_s) - process.alpha(at_t) * process.sigma(at_s) / process.sigma(at_t)
    torch.testing.assert_close(share, closed.expand(5)[:, None], rtol=1e-10, atol=0)
    if isinstance(process, Rectified):
        euler = Relay([Generator(network(process), (t,), step_rule="euler")])
        (share,) = torch.autograd.grad(euler.move(x, x0, t, s).sum(), x0)
        torch.testing.assert_close(share, torch.full_like(share, (t - s) / t), rtol=1e-12, atol=0)
    assert relay.move(x, x0, t, 0.0) is x0


def test_simulation_has_no_gradient_and_the_prediction_has():
    relay = Relay([Generator(network(VE(), seed), (t,), step_rule="euler") for seed, t in ((0, 80.0), (1, 1.0))])
    x = relay.simulate(relay.prior(rng()), {}, stop=1)
    assert not x.requires_grad
    relay.predict(x, {}, stop=1).sum().backward()
    first, second = (list(expert.denoiser.parameters()) for expert in relay.experts)
    assert all(p.grad is None for p in first) and all(p.grad is not None for p in second)


def test_a_relay_is_sampled_like_any_generator():
    """Samples are a function of seed and index, in evaluation mode, whatever the batch."""
    relay = Relay([Generator(network(VE(), seed), (t,), step_rule="euler") for seed, t in ((0, 80.0), (1, 1.0))])
    assert list(relay.parts) == ["0/generator", "1/generator"]
    whole, _ = sample_images(relay, 7, seed=3, batch=7)
    parts, _ = sample_images(relay, 7, seed=3, batch=2)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["renoise", "heun"])
def test_rules_that_are_not_a_step_of_one_evaluation_along_the_ode_are_refused(rule):
    with pytest.raises(ValueError, match=f"generator.step_rule must be one of euler, ddim; got {rule}"):
        Relay([Generator(network(VE()), (80.0,), step_rule=rule)])


def test_experts_that_do_not_fit_are_refused():
    def expert(process, t, rule="euler"):
        return Generator(network(process), (t,), step_rule=rule)

    with pytest.raises(ValueError, match="share one process"):
        Relay([expert(VE(), 80.0), expert(VP.linear(), 1.0)])
    with pytest.raises(ValueError, match="one step rule"):
        Relay([expert(VE(), 80.0), expert(VE(), 1.0, "ddim")])
    with pytest.raises(ValueError, match="strictly decreasing"):
        Relay([expert(VE(), 1.0), expert(VE(), 80.0)])
