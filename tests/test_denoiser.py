import itertools

import diffusers
import pytest
import torch
from oracle import Mixture as MixtureLaw
from oracle import Oracle, denoiser, finite_set, gaussian, meaning, point_mass, processes, score

from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import CLOCKS, Backbone, Denoiser
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Rectified, Trig

float64 = torch.float64
GAUSSIAN = gaussian([0.3, -0.5], [[0.8, 0.3], [0.3, 0.4]])
MIXTURE = MixtureLaw([0.3, 0.7], [[-1.0, 0.5], [0.8, 0.2]], [[[0.1, 0.0], [0.0, 0.2]], [[0.3, -0.1], [-0.1, 0.2]]])
LAWS = {
    "gaussian": GAUSSIAN,
    "mixture": MIXTURE,
    "point": point_mass([0.4, -1.0]),
    "finite set": finite_set([[0.0, 1.0], [-1.0, 0.5], [0.7, -0.2]]),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
every_process = pytest.mark.parametrize("process", processes(), ids=str)
every_pair = pytest.mark.parametrize(
    ("native", "process"), list(itertools.product(processes(), processes())), ids=lambda p: str(p)
)


def noisy(law, process, number=64):
    """Samples of x_t at times of their own, all inside the signal-to-noise range of a VP table."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = -3 + 5 * torch.rand(number, generator=generator, dtype=float64)
    t = process.time_of(log_ratio.exp())
    eps = torch.randn(number, law.dimension, generator=generator, dtype=float64)
    return process.perturb(law.sample(number), eps, t), t


@every_law
@every_process
def test_oracle_obeys_tweedies_formula(law, process):
    """E[x0 | x_t] from the posterior against the gradient of the log-density: two roads to one number."""
    x_t, t = noisy(law, process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    by_score = (x_t + sigma[:, None] ** 2 * score(law, x_t, alpha, sigma)) / alpha[:, None]
    torch.testing.assert_close(law.denoise(x_t, alpha, sigma), by_score, rtol=1e-9, atol=1e-9)


ONE_DIMENSIONAL = MixtureLaw([0.3, 0.7], [[-1.0], [0.8]], [[[0.1]], [[0.3]]])


@every_process
@pytest.mark.parametrize(
    "law", [GAUSSIAN, point_mass([0.4, -1.0]), ONE_DIMENSIONAL], ids=["normal", "point", "mixture"]
)
def test_oracle_flow_solves_the_ode(law, process):
    """d/dr of the flow to r equals the velocity there; the exact map against the exact denoiser."""
    x_t, t = noisy(law, process, 16)
    r, step = 0.6 * t, 1e-5 * t

    def flow(r):
        return law.flow(x_t, (process.alpha(t), process.sigma(t)), (process.alpha(r), process.sigma(r)))

    speed = (flow(r + step) - flow(r - step)) / (2 * step)[:, None]
    arrived = flow(r)
    x0 = law.denoise(arrived, process.alpha(r), process.sigma(r))
    # central difference: the step squared, 1e-10, and rounding over the step, 1e-10 relative to t
    torch.testing.assert_close(speed, meaning(Prediction.VELOCITY, x0, arrived, r, process), rtol=1e-5, atol=1e-5)


def test_oracle_flow_is_differentiable_and_onto_a_finite_set_hits_its_points():
    alpha, sigma = torch.ones(5, dtype=float64), torch.full((5,), 0.9, dtype=float64)
    x = torch.linspace(-2, 2, 5, dtype=float64)[:, None].requires_grad_(True)
    moved = ONE_DIMENSIONAL.flow(x, (alpha, sigma), (alpha, 0.3 * sigma))
    (slope,) = torch.autograd.grad(moved.sum(), x)
    step = 1e-5
    ends = [ONE_DIMENSIONAL.flow(x.detach() + d, (alpha, sigma), (alpha, 0.3 * sigma)) for d in (step, -step)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    points = finite_set([[-1.0], [0.0], [2.0]])
    landed = points.consistency(x.detach(), alpha, sigma)
    assert all(min(abs(value - point) for point in (-1, 0, 2)) < 1e-9 for value in landed.flatten().tolist())


@every_pair
@pytest.mark.parametrize("scaled", [False, True], ids=["raw", "scaled"])
def test_denoiser_is_exact_in_every_pair_of_processes(native, process, scaled):
    x_t, t = noisy(MIXTURE, process)
    x0 = MIXTURE.denoise(x_t, process.alpha(t), process.sigma(t))
    for source, to in itertools.product(Prediction, Prediction):
        model = denoiser(MIXTURE, process, source, native=native, scaled=scaled)
        # two conversions, and the time goes there and back through the table
        torch.testing.assert_close(
            model(x_t, t, to=to), meaning(to, x0, x_t, t, process), rtol=1e-9, atol=1e-9, msg=f"{source} to {to}"
        )


@pytest.mark.parametrize("native", [Trig(sigma_data=0.6), Rectified()], ids=str)
@pytest.mark.parametrize("source", [Prediction.X0, Prediction.V, Prediction.VELOCITY, Prediction.F])
def test_pure_noise_is_seen_exactly_by_processes_that_reach_it(native, source):
    """alpha = 0: the ratio is infinite, and all that can be said about x0 is its mean."""
    process = Rectified()
    x_t, t = torch.randn(8, 2, dtype=float64), torch.ones(8, dtype=float64)
    model = denoiser(MIXTURE, process, source, native=native)
    mean = MIXTURE.mean.expand(8, 2)
    torch.testing.assert_close(model(x_t, t), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x_t, t, to=Prediction.EPS), x_t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x_t, t, to=Prediction.VELOCITY), x_t - mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("native", [VP.linear(), VP.scaled_linear(), VE()], ids=["vp linear", "vp scaled", "ve"])
@pytest.mark.parametrize("source", list(Prediction))
def test_pure_noise_is_asked_at_the_noisiest_time_of_processes_that_end_before(native, source):
    process = Rectified()
    x_t = torch.randn(8, 2, dtype=float64)
    t = torch.ones(8, dtype=float64)
    end = torch.full((8,), native.t_max, dtype=float64)
    model = denoiser(MIXTURE, process, source, native=native)
    alpha, sigma = native.alpha(end), native.sigma(end)
    expected = MIXTURE.denoise(x_t * (alpha**2 + sigma**2).sqrt()[:, None], alpha, sigma)
    torch.testing.assert_close(model(x_t, t), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x_t, t, to=Prediction.EPS), x_t, rtol=1e-12, atol=1e-12)


def test_zero_snr_tables_reach_pure_noise():
    table = VP.linear().alpha(torch.arange(1, 1001, dtype=float64)) ** 2
    table[-1] = 0
    x_t, t = torch.randn(8, 2, dtype=float64), torch.ones(8, dtype=float64)
    model = denoiser(MIXTURE, Rectified(), Prediction.V, native=VP(table))
    torch.testing.assert_close(model(x_t, t), MIXTURE.mean.expand(8, 2), rtol=1e-12, atol=1e-12)


class Straight(Backbone):
    """A network whose raw output is its input times its time: enough to see what it was given."""

    sample_shape, condition_names = (2,), ()

    def forward(self, x, time, cond):
        return x * time[:, None]

    def null(self, cond):
        raise ValueError("no unconditional branch")

    def blocks(self):
        return []


def test_edm_preconditioning_is_the_papers():
    """Karras et al. 2022, table 1, written out; the clock is 1000 times c_noise, the embedding's unit in diffusers."""
    sigma_data = 0.5
    model = Denoiser(Straight(), VE(sigma_data=sigma_data), Prediction.F, clock="edm", scale_input=True)
    x, sigma = torch.randn(32, 2, dtype=float64), torch.linspace(0.002, 80, 32, dtype=float64)
    s = sigma[:, None]
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (sigma_data**2 + s**2) ** 0.5
    c_in = 1 / (sigma_data**2 + s**2) ** 0.5
    c_noise = s.log() / 4
    torch.testing.assert_close(model(x, sigma), c_skip * x + c_out * (c_in * x) * (1000 * c_noise), rtol=1e-12, atol=0)


def test_clocks_tell_the_time_in_the_networks_unit():
    assert CLOCKS["steps"](torch.tensor([1.0, 1000.0]), VP.linear()).tolist() == [0, 999]
    assert CLOCKS["thousand"](torch.tensor([0.25]), Rectified()).tolist() == [250]
    assert CLOCKS["log_ratio"](torch.tensor([0.0, 1.0]), Rectified()).isfinite().all()


def test_float32_keeps_its_digits_near_the_data_in_a_foreign_process():
    """Composed in float64, the scalars lose nothing; through a float32 x0 the velocity here would be off by 1e-3."""
    process, native = Rectified(), VE()
    t = torch.full((256,), 1e-4, dtype=float64)
    x_t = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    model = Denoiser(Straight(), native, Prediction.VELOCITY, clock="thousand", process=process)
    exact = model(x_t.double(), t, to=Prediction.VELOCITY)
    torch.testing.assert_close(model(x_t, t, to=Prediction.VELOCITY).double(), exact, rtol=1e-5, atol=1e-5)


def test_gradients_flow_to_the_input_through_a_foreign_process():
    x_t, t = noisy(GAUSSIAN, Rectified(), 4)
    model = denoiser(GAUSSIAN, Rectified(), Prediction.EPS, native=VE())
    assert torch.autograd.gradcheck(lambda x: model(x, t), x_t.requires_grad_(True))


def test_seen_in_shares_the_network():
    model = denoiser(GAUSSIAN, VE())
    other = model.seen_in(Rectified())
    assert other.backbone is model.backbone and isinstance(other.process, Rectified) and other.native is model.native


def network(**options):
    torch.manual_seed(0)
    backbone = MLP(width=16, depth=3, **options).double()
    torch.nn.init.normal_(backbone.leave.weight)
    return Denoiser(backbone, VE(), Prediction.F, clock="log_ratio", scale_input=True)


def test_taps_give_the_features_of_the_same_pass_in_the_order_asked_for():
    model = network()
    x_t, t = noisy(GAUSSIAN, VE(), 8)
    seen = {}
    for place in (0, 2):
        model.backbone.layers[place].register_forward_hook(
            lambda part, i, output, place=place: seen.update({place: output})
        )
    prediction, features = model.with_features(x_t, t, taps=("layers.2", "layers.0"))
    assert torch.equal(prediction, model(x_t, t))
    assert torch.equal(features[0], seen[2]) and torch.equal(features[1], seen[0])


def test_features_alone_are_those_of_the_whole_pass_and_leave_no_hook():
    model = network()
    x_t, t = noisy(GAUSSIAN, VE(), 8)
    x_t.requires_grad_(True)
    behind = []
    model.backbone.leave.register_forward_hook(lambda *_: behind.append(1))
    short = model.features(x_t, t, taps=("layers.0", "layers.1"))
    assert not behind  # what lies behind the last tap was not computed
    _, whole = model.with_features(x_t, t, taps=("layers.0", "layers.1"))
    for ours, expected in zip(short, whole, strict=True):
        assert torch.equal(ours, expected)
        assert torch.equal(
            *(torch.autograd.grad(f.square().sum(), x_t, retain_graph=True)[0] for f in (ours, expected))
        )
    assert len(model.backbone.layers[1]._forward_hooks) == 0
    model(x_t, t)  # and the pass is whole again
    assert len(behind) == 2


def unet() -> torch.nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=[8, 16],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=10,
    )


def dit() -> torch.nn.Module:
    options = dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, patch_size=2, num_embeds_ada_norm=10)
    return diffusers.DiTTransformer2DModel(in_channels=3, sample_size=8, **options)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize(("make", "tap"), [(unet, "mid_block"), (dit, "transformer_blocks.1")], ids=["unet", "dit"])
def test_short_passes_of_real_networks_have_the_same_features_and_gradients(make, tap, checkpointing):
    """Also where the tap lies inside what gradient checkpointing recomputes."""
    torch.manual_seed(0)
    backbone = DiffusersBackbone(make(), gradient_checkpointing=checkpointing).train()
    model = Denoiser(backbone, VE(), Prediction.F, clock="edm", scale_input=True)
    x_t, t = torch.randn(4, 3, 8, 8, requires_grad=True), torch.linspace(0.1, 5, 4, dtype=float64)
    cond, taps = {"label": torch.arange(4)}, (f"network.{tap}",)
    both = model.features(x_t, t, cond, taps=taps)[0], model.with_features(x_t, t, cond, taps=taps)[1][0]
    assert torch.equal(*both)
    inputs = [x_t, *model.parameters()]
    short, whole = (torch.autograd.grad(feature.square().sum(), inputs, allow_unused=True) for feature in both)
    assert any(gradient is not None for gradient in short[1:])
    for ours, expected in zip(short, whole, strict=True):
        assert (ours is None) == (expected is None) and (ours is None or torch.equal(ours, expected))


def test_an_unknown_tap_is_an_error():
    with pytest.raises(AttributeError, match="nowhere"):
        network().features(*noisy(GAUSSIAN, VE(), 2), taps=("nowhere",))


def test_oracle_tells_classes_apart():
    backbone = Oracle(MIXTURE, VE(), Prediction.X0)
    x, time = torch.zeros(3, 2, dtype=float64), torch.full((3,), 1e3 * 1e3, dtype=float64)
    answers = backbone(x, time, {"label": torch.tensor([0, 1, 2])})
    expected = torch.stack([MIXTURE.means[0], MIXTURE.means[1], MIXTURE.mean])
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)  # at sigma = 1000 little but the mean is known
