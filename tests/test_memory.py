"""What an update keeps in memory for its backward pass: bytes of saved tensors, counted."""

import dataclasses

import pytest
import torch
from cases import NUM_CLASSES, UNET, all_tensors, make_trainer
from torch.autograd.graph import saved_tensors_hooks

from diffdistill import networks
from diffdistill.method import Sample
from diffdistill.player import only
from diffdistill.rng import Rng, drawn_from
from diffdistill.tangents import Rotational
from diffdistill.trainer import Schedule

SCHEDULE = Schedule(steps=1, batch=4, log_every=0, save_every=0)
DETACHED = ("diff_instruct", "dmd", "dmd2", "f_distill")
ATTACHED = ("sid", "sim", "uni_instruct")


def unet_trainer(name, tmp_path, *, recomputing=False, **options):
    """A small UNet with dropout, one step, and the method's defaults but for the options."""
    case = dataclasses.replace(UNET, method=name, options={"ratio": 1} | options, grid=(20.0,))
    trainer = make_trainer(case, tmp_path, schedule=SCHEDULE)
    if recomputing:
        method = trainer.method
        for model in (method.generator.denoiser, method.critic.denoiser, method.teacher.denoiser):
            networks.recompute_activations(model)
    return trainer


class Saved:
    """Bytes that a forward pass keeps for the backward pass, each storage once, and those of `but` not at all."""

    def __init__(self, *but):
        self.storages, self._but = {}, {tensor.untyped_storage().data_ptr() for tensor in but}

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._but:
            self.storages[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def saved(trainer, act) -> int:
    """Bytes kept by what `act(rng)` computes in a generator update, without weights."""
    method = trainer.method
    weights = [*method.generator.denoiser.parameters(), *method.critic.parameters()]
    counter = Saved(*weights, *method.teacher.denoiser.parameters())
    rng = Rng((0,), range(4), dtype=torch.float64)
    with only("generator", trainer.players), drawn_from(trainer.players["generator"].dropouts, rng):
        with saved_tensors_hooks(counter.keep, lambda tensor: tensor):
            kept = act(rng)
        del kept
    return counter.num_bytes


COND = {"label": torch.arange(4) % NUM_CLASSES}


def made(trainer, rng):
    return trainer.method._fake({"conditions": Sample(cond=COND)}, rng, 0)[0]


def sampled(trainer) -> int:
    """Of the generator's samples alone."""
    return saved(trainer, lambda rng: made(trainer, rng))


def matched(trainer) -> int:
    """Of samples and their comparison by the two scores."""
    return saved(trainer, lambda rng: trainer.method.match(made(trainer, rng), COND, rng).value)


def one_sample(trainer) -> int:
    return 4 * torch.Size(trainer.method.generator.denoiser.sample_shape).numel() * 8


@pytest.mark.parametrize("name", DETACHED)
def test_a_detached_comparison_keeps_the_generators_forward_and_its_direction(name, tmp_path):
    trainer = unet_trainer(name, tmp_path)
    surrogate = matched(trainer) - sampled(trainer)
    # the direction, as large as the samples, and a few numbers per sample
    assert one_sample(trainer) <= surrogate < 1.1 * one_sample(trainer)


@pytest.mark.parametrize("name", ["diff_instruct", "dmd2"])
def test_a_detached_update_keeps_nothing_else(name, tmp_path):
    trainer = unet_trainer(name, tmp_path)
    (term, *_) = trainer.method.plan(0)[0].terms
    batch = trainer.data.draw(Rng((0,), range(4), dtype=torch.float64))
    whole = saved(trainer, lambda rng: term.loss(batch, rng).value)
    assert whole - sampled(trainer) < 1.1 * one_sample(trainer)


@pytest.mark.parametrize("name", ATTACHED)
def test_an_attached_comparison_keeps_two_networks_more_and_less_where_it_recomputes(name, tmp_path):
    plain, frugal = unet_trainer(name, tmp_path), unet_trainer(name, tmp_path, recomputing=True)
    forward = sampled(plain)
    # teacher and critic are the same network as the generator, whose forward keeps masks and the inputs of its layers
    # as well, for dropout and for the gradient of the weights
    assert matched(plain) - forward > 1.5 * forward
    assert matched(frugal) - sampled(frugal) < 0.5 * (matched(plain) - forward)


@pytest.mark.parametrize("name", [*DETACHED, *ATTACHED])
def test_recomputing_changes_nothing_with_dropout_on(name, tmp_path):
    plain, frugal = (unet_trainer(name, tmp_path, recomputing=recomputing) for recomputing in (False, True))
    for trainer in (plain, frugal):
        assert all(player.dropouts for player in trainer.players.values())
        trainer.one_step()
    ours, theirs = all_tensors(frugal), all_tensors(plain)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)  # float64, the same operations


class Held:
    """Bytes that all graphs together hold at their most, each storage once, and those of `but` not at all."""

    def __init__(self, *but):
        self.peak, self._now, self._times = 0, 0, {}
        self._but = {tensor.untyped_storage().data_ptr() for tensor in but}

    def pack(self, tensor):
        return self._Kept(self, tensor)

    @staticmethod
    def unpack(kept):
        return kept.tensor

    class _Kept:
        """A tensor for as long as its graph lives."""

        def __init__(self, held, tensor):
            self.tensor, self._held, storage = tensor, held, tensor.untyped_storage()
            self._address = storage.data_ptr()
            times = held._times[self._address] = held._times.get(self._address, 0) + 1
            if times == 1 and self._address not in held._but:
                held._now += storage.nbytes()
                held.peak = max(held.peak, held._now)

        def __del__(self):
            held = self._held
            held._times[self._address] -= 1
            if not held._times[self._address] and self._address not in held._but:
                held._now -= self.tensor.untyped_storage().nbytes()


def held_by_a_step(trainer) -> int:
    """Bytes at the peak of one whole step, without weights."""
    method = trainer.method
    weights = [parameter for player in trainer.players.values() for parameter in player.spec.parameters.values()]
    held = Held(*weights, *method.teacher.denoiser.parameters())
    with saved_tensors_hooks(held.pack, held.unpack):
        trainer.one_step()
    assert held._now == 0  # every graph is gone
    return held.peak


def test_rcms_two_terms_hold_one_graph_at_a_time(tmp_path):
    # by differences, as in the shipped recipe: under hooks PyTorch never lets go of what forward mode saved (2.13)
    options = {"warmup_steps": 0, "discrete": True, "tangents": Rotational(0.1)}
    both, consistency, score = (
        held_by_a_step(unet_trainer("rcm", tmp_path / name, **options, **weights))
        for name, weights in [
            ("both", {}),
            ("consistency", {"score_weight": 0.0}),
            ("score", {"consistency_weight": 0.0}),
        ]
    )
    assert both <= max(consistency, score)
    assert both < 0.6 * (consistency + score)  # neither is so small that the sum would be no more
