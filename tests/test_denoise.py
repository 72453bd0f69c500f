"""Plain training: the loss has the exact denoiser for its optimum, and conditions are dropped by slot."""

import pytest
import torch
from oracle import Mixture, denoiser

from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.method import Networks, Sample
from diffdistill.methods.denoise import Denoise
from diffdistill.prediction import Prediction
from diffdistill.process import VE, Rectified
from diffdistill.rng import Rng
from diffdistill.times import Uniform

float64 = torch.float64
LAW = Mixture([0.4, 0.6], [[-1.0, 0.0], [0.7, 0.3]], [[[0.05, 0.0], [0.0, 0.05]], [[0.08, 0.03], [0.03, 0.05]]])


def network(process, *, classes=0):
    torch.manual_seed(0)
    backbone = MLP(width=64, depth=2, num_classes=classes).double()
    return Denoiser(backbone, process, Prediction.F, clock="log_ratio", scale_input=True)


def method(model, **config):
    return Denoise(
        Denoise.Config(**config), Networks(lambda: Generator(model, model.process.grid(2)[:1]), lambda: None)
    )


def rng(*key, slots=range(64)):
    return Rng((0, *key), slots, dtype=float64)


def loss(method, batch, draws):
    ((term,),) = (update.terms for update in method.plan(0))
    return term.loss(batch, draws).value


@pytest.mark.parametrize("space", list(Prediction))
def test_the_loss_is_the_squared_error_of_its_space(space):
    process = Rectified()
    model = denoiser(LAW, process, Prediction.VELOCITY)
    x0, draws = LAW.sample(64), rng("draws")
    t, eps = Uniform()(draws.uniform(), process), draws.normal((2,))
    x_t = process.perturb(x0, eps, t)
    a, b = space.coefficients(t, process)
    expected = (model(x_t, t, to=space) - a[:, None] * x0 - b[:, None] * eps).square().mean(1)
    ours = loss(method(model, space=space, times=Uniform()), {"images": Sample(x0=x0)}, rng("draws"))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_training_arrives_at_the_exact_denoiser():
    process = VE(sigma_max=10.0, sigma_data=1.0)
    chosen = method(network(process))
    spec = chosen.players()["generator"]
    steps = 400
    optimizer = torch.optim.AdamW(list(spec.parameters.values()), lr=4e-3, weight_decay=0.0)
    data = LAW.sample(20_000, seed=1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        x0 = data[torch.randint(len(data), (256,), generator=generator)]
        loss(chosen, {"images": Sample(x0=x0)}, rng(step, slots=range(256))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    t = torch.full((2000,), 0.5, dtype=float64)
    x_t = process.perturb(LAW.sample(2000, seed=2), torch.randn(2000, 2, generator=generator, dtype=float64), t)
    exact = LAW.denoise(x_t, torch.ones_like(t), t)
    error = (chosen.generator.denoiser(x_t, t).detach() - exact).square().mean().sqrt()
    # a twentieth of the spread of what is learnt; an untrained network is off by half of it
    assert error < 0.05 * exact.std(), error


def test_conditions_are_dropped_by_slot_at_their_rate():
    chosen = method(network(VE(), classes=3), condition_dropout=0.25)
    seen = []
    chosen.generator.denoiser.backbone.label.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for slots in (range(4000), range(2000, 4000)):
        number = len(slots)
        images = Sample(x0=torch.zeros(number, 2, dtype=float64), cond={"label": torch.ones(number, dtype=torch.long)})
        loss(chosen, {"images": images}, rng("drop", slots=slots))
    assert set(seen[0].tolist()) == {1, 3}  # 3 is the null label of three classes
    dropped = (seen[0] == 3).double().mean().item()
    assert dropped == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    assert torch.equal(seen[0][2000:], seen[1])


def test_bad_settings_are_refused_by_name():
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"condition_dropout must be in .* got {value}"):
            Denoise.Config(condition_dropout=value)
