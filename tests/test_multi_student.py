"""Multi-student distillation: shares and router, one student against its method inside, and one against all."""

import copy
import dataclasses
import json

import pytest
import torch
from cases import CASES, NUM_CLASSES, Case, Labelled, all_tensors, make_trainer
from oracle import Mixture, denoiser, gaussian
from test_dmd2 import CORNERS, Batched
from torch import Tensor

import diffdistill.rng
from diffdistill.backbones.mlp import MLP
from diffdistill.critic import Critic
from diffdistill.data import SomeLabels, Streams
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.losses import denoising
from diffdistill.method import (
    Action,
    AverageSpec,
    Loss,
    Method,
    MethodConfig,
    Networks,
    PlayerSpec,
    Sample,
    Source,
    Term,
    Update,
)
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.multi_student import MultiStudent
from diffdistill.methods.score_matching import ScoreMatching
from diffdistill.methods.sid import SiD
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.rng import Rng
from diffdistill.routed import Routed
from diffdistill.shares import Blocks, Lists, table
from diffdistill.teacher import Teacher
from diffdistill.times import LogNormal
from diffdistill.trainer import Schedule

SHORT = Schedule(steps=3, batch=12, accumulate=2, log_every=3, save_every=3)
GAN = {"gan_weight": 0.1, "gan_critic_weight": 0.1}


# what each share is


@pytest.mark.parametrize("num_classes", [1, 2, 7, 10, 1000])
@pytest.mark.parametrize("students", [1, 2, 3, 4, 7])
def test_blocks_are_disjoint_exhaustive_consecutive_and_even(students, num_classes):
    if students > num_classes:
        with pytest.raises(ValueError, match="without a class"):
            Blocks().divide(students, num_classes)
        return
    shares = Blocks().divide(students, num_classes)
    assert [label for share in shares for label in share] == list(range(num_classes))
    sizes = [len(share) for share in shares]
    assert len(sizes) == students and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shares", [Blocks(), Lists(((0, 5, 2), (1,), (6, 3, 4)))], ids=["blocks", "lists"])
def test_a_class_is_routed_to_the_student_whose_share_it_is_in(shares):
    divided = shares.divide(3, 7)
    routes = table(divided)
    assert len(routes) == 7
    for label in range(7):
        for student in range(3):
            assert (routes[label] == student) == (label in divided[student])


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        (((0, 1), (1, 2)), "class 1 to students 0 and 1"),
        (((0,), (2,)), "class 1 to no student"),
        (((0, 1, 2), ()), "student 1 of 2 without a class"),
        (((0, 1), (2, 3)), "names class 3, and the network has 0 to 2"),
        (((0, 1, 2),), "for 1 students, and method.students=2"),
    ],
)
def test_lists_that_are_no_partition_are_refused_by_class(lists, complaint):
    with pytest.raises(ValueError, match=complaint):
        Lists(lists).divide(2, 3)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="method.students must be at least 1"):
        MultiStudent.Config(students=0, inside=DMD2.Config())
    with pytest.raises(ValueError, match="method.only must be a student from 0 to 1"):
        MultiStudent.Config(students=2, inside=DMD2.Config(), only=2)
    with pytest.raises(ValueError, match="method.inside must not be multi_student"):
        MultiStudent.Config(students=2, inside=MultiStudent.Config(students=2, inside=DMD2.Config()))


# routing


def toy(students: int = 2, *, shares=None, only: int = -1, dtype=torch.float64, grid=(20.0, 1.0)) -> MultiStudent:
    options = {"students": students, "inside": DMD2.Config(), "only": only}
    case = Case("multi_student", options | ({} if shares is None else {"shares": shares}), grid=grid)
    method = case.make(dtype=dtype)
    with torch.no_grad():  # students that would sample differently
        for number, part in enumerate(method.generator.parts.values()):
            for parameter in part.denoiser.eval().parameters():
                parameter.mul_(1 + 0.1 * number)
    return method


@pytest.mark.parametrize("students", [1, 2, 3])
def test_each_row_is_sampled_by_its_student_from_the_noise_it_would_get_alone(students):
    """Two steps, so that fresh noise is drawn between them: it must be the row's, whoever else is in the batch."""
    sampler = toy(students).generator
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 0])
    rng = Rng(("sample",), range(5, 12), dtype=torch.float64)
    made = sampler.sample(sampler.prior(rng), {"label": labels}, rng)
    for number, student in sampler.students.items():
        alone = Rng(("sample",), range(5, 12), dtype=torch.float64)
        all_rows = student.sample(student.prior(alone), {"label": labels}, alone)
        mine = torch.tensor([sampler.table[label] == number for label in labels.tolist()])
        # the order of sums in a matrix product depends on the number of rows
        torch.testing.assert_close(made[mine], all_rows[mine], rtol=1e-12, atol=1e-12)
        assert students == 1 or not torch.allclose(made[~mine], all_rows[~mine])


def test_rows_of_a_stream_draw_what_they_would_draw_in_the_whole():
    whole, rng = (Rng(("rows",), range(4, 10)) for _ in range(2))
    assert torch.equal(whole.normal((2,)), rng.normal((2,)))
    part = rng.rows([3, 0])
    second, third = whole.normal((3,)), whole.integers(1000)
    assert torch.equal(part.normal((3,)), second[[3, 0]]) and torch.equal(part.integers(1000), third[[3, 0]])


def test_a_router_refuses_what_it_cannot_route():
    method = toy(2, only=1)
    sampler = method.generator
    assert list(sampler.parts) == ["1/generator"] and sampler.classes == [2]
    rng = Rng(("sample",), range(2), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no student here makes class 0; here are the classes \[2\]"):
        sampler.sample(sampler.prior(rng), {"label": torch.tensor([2, 0])}, rng)
    with pytest.raises(ValueError, match="the condition has no label"):
        sampler.sample(sampler.prior(rng), {}, rng)
    student = sampler.students[1]
    with pytest.raises(ValueError, match="no class is routed to student 1"):
        Routed({1: student}, (0, 0, 2))
    with pytest.raises(ValueError, match="knows 3 classes, and the table 2"):
        Routed({1: student}, (0, 1))


def test_a_network_without_classes_is_refused():
    case = Case("multi_student", {"students": 2, "inside": DMD2.Config()}, backbone=lambda: MLP(width=16), guidance=1.0)
    with pytest.raises(ValueError, match="divides classes, and this network has none"):
        case.make()


# training


@pytest.mark.parametrize(
    ("name", "inside", "options"),
    [
        ("dmd2", DMD2.Config(ratio=2, **GAN), {"ratio": 2, **GAN}),
        ("sid", SiD.Config(alpha=1.2), {"alpha": 1.2}),
    ],
    ids=["dmd2 with gan", "sid"],
)
def test_one_student_is_the_method_inside_bit_for_bit(name, inside, options, tmp_path, monkeypatch):
    """All draws are keyed by names of players and streams, which are those of the method inside but for their 0/."""
    plain = make_trainer(Case(name, options), tmp_path / "inside", schedule=SHORT)
    plain.run()
    hashed = diffdistill.rng._hash

    def unprefixed(*key):
        return hashed(*[part.removeprefix("0/") if isinstance(part, str) else part for part in key])

    monkeypatch.setattr(diffdistill.rng, "_hash", unprefixed)
    case = Case("multi_student", {"students": 1, "inside": inside})
    one = make_trainer(case, tmp_path / "one", schedule=SHORT)
    one.run()
    ours, theirs = all_tensors(one), all_tensors(plain)
    assert {key.removeprefix("0/") for key in ours} == theirs.keys()
    assert all(torch.equal(ours[f"0/{key}"], theirs[key]) for key in theirs)


@pytest.mark.parametrize("students", [2, 3])
def test_a_student_alone_is_the_student_among_all_bit_for_bit(students, tmp_path):
    options = {"students": students, "inside": DMD2.Config(ratio=2, **GAN)}
    joint = make_trainer(Case("multi_student", options), tmp_path / "joint", schedule=SHORT)
    joint.run()
    together = all_tensors(joint)
    for only in range(students):
        case = Case("multi_student", options | {"only": only})
        alone = make_trainer(case, tmp_path / str(only), schedule=SHORT)
        alone.run()
        own = all_tensors(alone)
        assert own.keys() == {key for key in together if key.startswith(f"{only}/")}
        assert all(torch.equal(own[key], together[key]) for key in own)
        logs = [(run / "log.jsonl").read_text().splitlines() for run in (alone.output, joint.output)]
        assert len(logs[0]) == len(logs[1]) == 2  # the references, and the last step
        for ours, theirs in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
            assert all(ours[key] == theirs[key] for key in ours if key != "seconds")


class Seen:
    """A stream's draws, kept."""

    def __init__(self, inner: Streams):
        self.inner, self.batches = inner, []

    def draw(self, rng: Rng):
        self.batches.append(self.inner.draw(rng))
        return self.batches[-1]


def test_terms_read_only_the_conditions_and_images_of_their_share(tmp_path):
    """And a term whose batch lacks the other students' streams still runs."""
    case = CASES["multi_student"]
    method = case.make()
    assert method.shares == ((0, 1), (2,))
    assert method.streams() == {"0/conditions", "0/images", "1/conditions", "1/images"}
    data = Seen(case.streams(method))
    trainer = make_trainer(case, tmp_path, schedule=SHORT, data=data)
    trainer.run()
    for number, share in enumerate(method.shares):
        for kind in ("conditions", "images"):
            drawn = {label for batch in data.batches for label in batch[f"{number}/{kind}"].cond["label"].tolist()}
            assert drawn == set(share)
    batch = data.batches[0]
    for term in method.plan(0)[0].terms:
        number = term.player[0]
        own = {name: sample for name, sample in batch.items() if name.startswith(f"{number}/")}
        rng = Rng((term.name,), range(6), dtype=torch.float64)
        assert len(own) == 2 and torch.isfinite(term.loss(own, rng).value).all()


class Echo(Method):
    """Follows pairs, and copies and averages its generator: what a method inside may do besides score matching."""

    @dataclasses.dataclass(frozen=True)
    class Config(MethodConfig):
        pass

    reference, needs_teacher, reads, trains = "none", False, "pairs", "generator"

    def __init__(self, config, networks):
        self.config, self.generator = config, networks.new_generator()
        self.target, self.acts = copy.deepcopy(self.generator.denoiser).requires_grad_(False), []

    def players(self):
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def streams(self):
        return frozenset({"pairs"})

    def averages(self):
        return {"target": AverageSpec("generator", self.target, lambda step: 0.5)}

    def plan(self, step):
        note = Action("note", lambda specs: self.acts.append(specs["generator"].modules[0] is self.generator.denoiser))
        return (note, Update((Term("generator", "echo", self._echo),)))

    def _echo(self, batch, rng):
        pairs = batch["pairs"]
        made = self.generator.rollout(pairs.noise, pairs.cond, rng, stop=0)
        return Loss((made - pairs.x0).square().mean(1))


def test_pairs_actions_and_averages_belong_to_their_student_and_pairs_are_not_narrowed(tmp_path):
    case = Case("multi_student", {"students": 2, "inside": Echo.Config()}, grid=(20.0,))
    method = case.make()
    assert {name: method.source(name) for name in method.streams()} == {
        "0/pairs": Source("pairs"),
        "1/pairs": Source("pairs"),
    }

    class Pairs:
        def draw(self, rng: Rng):
            def drawn(name):
                own = rng.fork(name)
                return Sample(own.normal((2,)), {"label": own.integers(NUM_CLASSES)}, own.normal((2,)))

            return {name: drawn(name) for name in ("0/pairs", "1/pairs")}

    trainer = make_trainer(case, tmp_path, schedule=SHORT, data=Pairs())
    trainer.run()
    for number, student in trainer.method.students.items():
        assert student.acts == [True] * SHORT.steps
        average = trainer.players[f"{number}/generator"].averages[f"target_{number}"]
        assert all(a is b for a, b in zip(average.copies, student.target.parameters(), strict=True))


def test_the_regression_of_dmd_inside_is_on_all_pairs_for_every_student():
    """Whoever the student is: from equal weights, equal draws of the pairs give equal losses and gradients."""
    case = CASES["multi_student-dmd"]
    method = case.make()
    drawn = case.streams(method).draw(Rng(("pairs",), range(60), dtype=torch.float64))
    assert all(set(drawn[f"{k}/pairs"].cond["label"].tolist()) == set(range(NUM_CLASSES)) for k in range(2))
    terms = {term.player[0]: term for term in method.plan(0)[0].terms if term.name == "regress"}
    assert set(terms) == {"0", "1"}
    values, gradients = [], []
    for number, term in terms.items():
        method.students[int(number)].generator.denoiser.eval()
        rng = Rng(("term",), range(60), dtype=torch.float64)
        loss = term.loss({f"{number}/pairs": drawn["0/pairs"]}, rng).value
        loss.sum().backward()
        values.append(loss)
        gradients.append([p.grad for p in method.players()[f"{number}/generator"].parameters.values()])
    assert torch.equal(*values) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# teacher score matching


def test_matching_the_teacher_costs_nothing_where_the_student_is_the_teacher():
    """Exactly 0, and so its gradient; and not where the student is another network or the teacher is guided."""
    process = VE(sigma_max=20.0)
    torch.manual_seed(0)

    def network() -> Denoiser:
        backbone = MLP(width=16, num_classes=NUM_CLASSES)
        torch.nn.init.normal_(backbone.leave.weight)
        return Denoiser(backbone, process, Prediction.F, clock="edm", scale_input=True).double()

    teacher, other = network(), network()

    def value(student: Denoiser, guidance: float = 1.0) -> Tensor:
        networks = Networks(
            lambda: Generator(copy.deepcopy(student).requires_grad_(True), (20.0,)),
            lambda: Critic(copy.deepcopy(student)),
            Teacher(teacher, guidance=guidance),
        )
        method = ScoreMatching(ScoreMatching.Config(), networks)
        rng = Rng(("match",), range(8), dtype=torch.float64)
        images = Labelled(torch.randn(30, 2, dtype=torch.float64)).draw(rng.fork("images"))
        loss = method.plan(0)[0].terms[0].loss({"images": images}, rng).value
        loss.sum().backward()
        gradients = [p.grad for p in method.generator.denoiser.parameters() if p.grad is not None]
        assert gradients and (loss.sum() > 0) == any(g.abs().sum() > 0 for g in gradients)
        assert all(p.grad is None for p in teacher.parameters())
        return loss

    assert (value(teacher) == 0).all()
    assert (value(other) > 1e-6).all() and (value(teacher, guidance=2.0) > 1e-12).all()


def test_the_weight_over_noise_levels_is_that_of_edm():
    """(sigma^2 + sd^2) / (sigma sd)^2 on the squared difference of denoised samples (Karras et al. 2022, table 1)."""
    process = VE(sigma_max=20.0, sigma_data=0.5)
    case = Case("score_matching", {}, guidance=1.0)
    method = case.make()
    method.generator.denoiser.eval()  # without dropout
    rng, key = Rng(("weight",), range(8), dtype=torch.float64), ("weight",)
    images = Labelled(torch.randn(30, 2, dtype=torch.float64)).draw(rng.fork("images"))
    loss = method.plan(0)[0].terms[0].loss({"images": images}, rng).value
    again = Rng(key, range(8), dtype=torch.float64)
    t = LogNormal()(again.uniform(), process)
    x_t = process.perturb(images.x0, again.normal((2,)), t)
    gap = method.generator.denoiser(x_t, t, images.cond) - method.teacher(x_t, t, images.cond)
    expected = (t**2 + 0.25) / (0.25 * t**2) * gap.square().mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)  # x0 loses some digits where sigma is small


# convergence

LAW = Mixture([1 / 3] * 3, CORNERS.means, CORNERS.covariances)
BATCH = 128  # of each of two students, so that a step costs what one student's costs at 256


@pytest.fixture(scope="module")
def start() -> Denoiser:
    """A small network that has learnt to denoise each part of the law by its label."""
    torch.manual_seed(0)
    process = VE(sigma_min=0.02, sigma_max=10.0, sigma_data=1.0)
    backbone = MLP(width=64, depth=2, num_classes=NUM_CLASSES)
    model = Denoiser(backbone, process, Prediction.F, clock="log_ratio", scale_input=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0, foreach=True)
    parts = torch.stack([one(label).sample(5000, seed=label) for label in range(NUM_CLASSES)]).float()
    steps = 600
    for step in range(steps):
        draws = Batched(("start", step), range(256))
        label = draws.integers(NUM_CLASSES)
        x0, t = parts[label, draws.integers(5000)], LogNormal(-0.4, 1.2)(draws.uniform(), process)
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        denoising(model, x0, draws.normal((2,)), t, {"label": label}, space=Prediction.F).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def one(label: int) -> Mixture:
    return gaussian(LAW.means[label].tolist(), LAW.covariances[label])


def test_two_students_reach_the_law_of_an_exact_teacher_class_by_class(start):
    """Means and covariances within 5 percent of the spread of all, by students of two classes and of one."""
    torch.manual_seed(1)
    networks = Networks(
        lambda: Generator(copy.deepcopy(start), (10.0,)),
        lambda: Critic(copy.deepcopy(start)),
        Teacher(denoiser(LAW, start.process)),
    )
    method = MultiStudent(MultiStudent.Config(students=2, inside=DMD2.Config(ratio=3)), networks)
    streams = {f"{k}/conditions": SomeLabels(torch.tensor(share)) for k, share in enumerate(method.shares)}
    players = {name: list(spec.parameters.values()) for name, spec in method.players().items()}
    optimizers = {
        name: torch.optim.AdamW(own, lr=2e-3, betas=(0.0, 0.999), weight_decay=0.0, foreach=True)
        for name, own in players.items()
    }
    generators = [parameter for name in method.generator.parts for parameter in players[name]]
    average, steps = [parameter.detach().clone() for parameter in generators], 250
    for step in range(steps):
        for index, update in enumerate(method.plan(step)):
            batch = {name: s.draw(Batched((step, index, name), range(BATCH))) for name, s in streams.items()}
            for number, term in enumerate(update.terms):
                for name, own in players.items():
                    for parameter in own:
                        parameter.requires_grad_(name == term.player)
                term.loss(batch, Batched((step, index, 1 + number), range(BATCH))).value.mean().backward()
            for name in update.players:
                optimizers[name].param_groups[0]["lr"] = 2e-3 * min(1, 2 - 2 * step / steps)
                optimizers[name].step()
                optimizers[name].zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in generators], 0.02 if step > 100 else 0.5)
    for parameter, mean in zip(generators, average, strict=True):
        parameter.data.copy_(mean)
    draws = Rng(("evaluate",), range(20_000))
    label = torch.arange(20_000) % NUM_CLASSES
    x = method.generator.sample(method.generator.prior(draws), {"label": label}, draws).double()
    spread = LAW.covariance.trace().sqrt()
    for number in range(NUM_CLASSES):
        own = x[label == number]
        assert (own.mean(0) - LAW.means[number]).norm() < 0.05 * spread
        assert (own.T.cov() - LAW.covariances[number]).norm() < 0.05 * LAW.covariance.norm()
    assert (x.T.cov() - LAW.covariance).norm() < 0.05 * LAW.covariance.norm()
