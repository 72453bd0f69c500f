import pytest
import torch
from oracle import Mixture, Slope, denoiser, gaussian, processes

from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Denoiser
from diffdistill.losses import denoising, gan_discriminator, gan_generator, inject, matching_direction
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.teacher import Teacher

float64 = torch.float64
MIXTURE = Mixture([0.3, 0.7], [[-1.0, 0.5], [0.8, 0.2]], [[[0.1, 0.0], [0.0, 0.2]], [[0.3, -0.1], [-0.1, 0.2]]])


def normal(*shape, seed=0, dtype=float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=float64).to(dtype)


def test_injects_gradient_is_the_direction_over_the_samples_size():
    x, direction = normal(5, 3, 4, 4).requires_grad_(True), normal(5, 3, 4, 4, seed=1)
    losses = inject(x, direction)
    assert losses.shape == (5,)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(gradient, direction / 48, rtol=1e-15, atol=0)
    (mean,) = torch.autograd.grad(inject(x, direction).mean(), x)
    torch.testing.assert_close(mean, direction / x.numel(), rtol=1e-15, atol=0)


def test_injects_value_is_that_of_the_papers_surrogate():
    x, direction = normal(5, 6), normal(5, 6, seed=1)
    surrogate = 0.5 * (x - (x - direction)).square().mean(1)
    torch.testing.assert_close(inject(x, direction), surrogate, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inject_keeps_directions_far_below_the_rounding_of_x(dtype):
    """|x| = 100, |direction| = 1e-3: x - direction is x in bfloat16, and off by half a percent in float32."""
    x = (100 + normal(4, 8)).to(dtype).requires_grad_(True)
    direction = 1e-3 * normal(4, 8, seed=1, dtype=torch.float32)
    loss = inject(x, direction)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(gradient, (direction / 8).to(dtype), rtol=1e-6, atol=0)  # rounded once, to x's dtype


def test_inject_takes_the_direction_as_a_constant():
    x = normal(4, 8).requires_grad_(True)
    (gradient,) = torch.autograd.grad(inject(x, x**2).sum(), x)
    torch.testing.assert_close(gradient, x.detach() ** 2 / 8, rtol=1e-15, atol=0)


def test_direction_is_the_published_formula():
    x, real, fake = normal(6, 3, 4, 4), normal(6, 3, 4, 4, seed=1), normal(6, 3, 4, 4, seed=2)
    p_real, p_fake = x - real, x - fake
    published = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    torch.testing.assert_close(matching_direction(x, real, fake, floor=1e-5), published, rtol=1e-12, atol=1e-12)


def test_with_the_sample_itself_for_a_critic_the_mean_size_of_the_direction_is_one():
    """Score distillation sampling: the critic is a point mass at the sample."""
    x, real = normal(6, 3, 4, 4), normal(6, 3, 4, 4, seed=1)
    size = matching_direction(x, real, x, floor=1e-5).abs().flatten(1).mean(1)
    torch.testing.assert_close(size, torch.ones(6, dtype=float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-2, 4.0, 1e3])
def test_direction_is_the_same_in_every_unit(scale):
    x, real, fake = normal(6, 5), normal(6, 5, seed=1), normal(6, 5, seed=2)
    one = matching_direction(x, real, fake, floor=1e-9)
    scaled = matching_direction(scale * x, scale * real, scale * fake, floor=1e-9)
    torch.testing.assert_close(scaled, one, rtol=1e-12, atol=0)


def test_each_sample_has_its_own_normaliser():
    x, real, fake = normal(6, 5), normal(6, 5, seed=1), normal(6, 5, seed=2)
    alone = torch.cat(
        [matching_direction(*parts, floor=1e-5) for parts in zip(x.split(1), real.split(1), fake.split(1), strict=True)]
    )
    torch.testing.assert_close(matching_direction(x, real, fake, floor=1e-5), alone, rtol=1e-14, atol=0)


def test_the_floor_keeps_a_sample_that_equals_the_teachers_finite():
    x = normal(2, 5)
    direction = matching_direction(x, x, x + 1e-6, floor=1e-5)
    torch.testing.assert_close(direction, torch.full_like(x, 0.1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", processes(), ids=str)
def test_direction_does_not_depend_on_what_the_network_predicts(process):
    """Wrappers of one denoiser by any prediction, guided or not, give one direction."""
    t = process.time_of((-2 + 3 * torch.rand(32, dtype=float64)).exp())
    x = MIXTURE.sample(32, seed=3)
    x_t = process.perturb(x, normal(32, 2), t)
    cond = {"label": torch.arange(32) % 2}
    critic = denoiser(gaussian([0.1, 0.0], [[1.0, 0.2], [0.2, 0.6]]), process)(x_t, t)
    for guidance in (1.0, 2.5):
        directions = []
        for source in Prediction:
            teacher = Teacher(denoiser(MIXTURE, process, source, scaled=source is Prediction.F), guidance=guidance)
            directions.append(matching_direction(x, teacher(x_t, t, cond), critic, floor=1e-5))
        for direction in directions[1:]:
            torch.testing.assert_close(direction, directions[0], rtol=1e-8, atol=1e-8)


def test_score_difference_identities():
    """S_f - S_r = (alpha / sigma^2)(mu_f - mu_r) = -(e_f - e_r) / sigma, in every process."""
    other = gaussian([0.1, 0.0], [[1.0, 0.2], [0.2, 0.6]])
    for process in processes():
        t = process.time_of((-2 + 3 * torch.rand(16, dtype=float64)).exp())
        x_t = normal(16, 2)
        fake, real = denoiser(other, process), denoiser(MIXTURE, process)
        difference = {to: fake(x_t, t, to=to) - real(x_t, t, to=to) for to in Prediction}
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        scores = difference[Prediction.SCORE]
        torch.testing.assert_close(alpha / sigma**2 * difference[Prediction.X0], scores, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(-difference[Prediction.EPS] / sigma, scores, rtol=1e-8, atol=1e-8)


def weight(space, alpha, sigma, process):
    """What each space's squared error weighs that of x0 by."""
    std = process.sigma_data
    return {
        Prediction.X0: torch.ones_like(alpha),
        Prediction.EPS: alpha**2 / sigma**2,
        Prediction.V: (alpha**2 + sigma**2) ** 2 / sigma**2,
        Prediction.SCORE: alpha**2 / sigma**4,
        Prediction.F: (alpha**2 * std**2 + sigma**2) / (sigma * std) ** 2,
    }[space]


@pytest.mark.parametrize("process", processes(), ids=str)
@pytest.mark.parametrize("space", list(Prediction))
def test_each_space_is_a_weight_on_the_error_of_x0(process, space):
    t = process.time_of((-2 + 3 * torch.rand(16, dtype=float64)).exp())
    x0, eps = MIXTURE.sample(16), normal(16, 2)
    model = denoiser(gaussian([0.1, 0.0], [[1.0, 0.2], [0.2, 0.6]]), process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    if space is Prediction.VELOCITY:
        expected = ((alpha * process.d_sigma(t) - sigma * process.d_alpha(t)) / sigma) ** 2
    else:
        expected = weight(space, alpha, sigma, process)
    error = (model(process.perturb(x0, eps, t), t) - x0).square().mean(1)
    torch.testing.assert_close(denoising(model, x0, eps, t, None, space=space), expected * error, rtol=1e-9, atol=0)


def test_f_on_ve_is_edms_weight():
    process, t = VE(sigma_data=0.5), torch.tensor([0.01, 0.5, 20.0], dtype=float64)
    edm = (t**2 + 0.5**2) / (t * 0.5) ** 2
    torch.testing.assert_close(weight(Prediction.F, torch.ones_like(t), t, process), edm)
    torch.testing.assert_close(edm, 1 / t**2 + 1 / 0.5**2)


@pytest.mark.parametrize("process", processes(), ids=str)
@pytest.mark.parametrize("space", list(Prediction))
def test_the_optimum_is_the_posterior_mean_in_every_space(process, space):
    """The normal equation: the loss is quadratic in the slope, so that one Newton step from anywhere is its minimum."""
    number, std = 200_000, 1.2
    t = process.time_of(torch.full((number,), 0.7, dtype=float64))
    x0, eps = std * normal(number, 1), normal(number, 1, seed=1)
    eps = eps - (eps * x0).mean() / x0.square().mean() * x0  # the sample's moments made those of the law
    eps, x0 = eps / eps.square().mean().sqrt(), x0 * std / x0.square().mean().sqrt()
    backbone = Slope()
    model = Denoiser(backbone, process, Prediction.X0, clock="thousand")
    loss = denoising(model, x0, eps, t, None, space=space).mean()
    (first,) = torch.autograd.grad(loss, backbone.slope, create_graph=True)
    (second,) = torch.autograd.grad(first, backbone.slope)
    alpha, sigma = process.alpha(t)[0], process.sigma(t)[0]
    expected = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close((-first / second).detach(), expected, rtol=1e-10, atol=0)


def test_gan_losses_are_softplus_and_their_optimum_is_the_log_ratio():
    real, fake = normal(7), normal(7, seed=1)
    torch.testing.assert_close(gan_discriminator(real, fake), (1 + fake.exp()).log() + (1 + (-real).exp()).log())
    torch.testing.assert_close(gan_generator(fake), (1 + (-fake).exp()).log())
    q, p = torch.tensor([0.3, 0.1, 0.6], dtype=float64), torch.tensor([0.5, 0.3, 0.2], dtype=float64)
    logit = (q / p).log().requires_grad_(True)
    loss = (q * torch.nn.functional.softplus(-logit) + p * torch.nn.functional.softplus(logit)).sum()
    (gradient,) = torch.autograd.grad(loss, logit)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_losses_are_one_float32_number_a_sample():
    x, logits = normal(4, 3, dtype=torch.bfloat16), normal(4, dtype=torch.bfloat16)
    model = Denoiser(MLP(dimension=3, width=8, depth=1), VE(), Prediction.F, clock="log_ratio", scale_input=True)
    t = torch.ones(4, dtype=float64)
    made = [
        inject(x, x),
        gan_generator(logits),
        gan_discriminator(logits, logits),
        denoising(model, x.float(), x.float(), t, None, space=Prediction.F),
    ]
    assert all(loss.shape == (4,) and loss.dtype == torch.float32 for loss in made)
