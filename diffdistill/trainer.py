"""Trainer: the one loop, the same for every method."""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor
from tqdm import tqdm

from diffdistill import checkpoint
from diffdistill.best import Best
from diffdistill.health import WARM_STEPS, Alert, Watch
from diffdistill.memory import peak_bytes
from diffdistill.method import Action, Batch, Method, Term, Update
from diffdistill.player import Player, only
from diffdistill.readings import Readings
from diffdistill.rng import Rng, drawn_from


class Data(Protocol):
    """The named streams of a run."""

    def draw(self, rng: Rng) -> Batch:
        """What every stream gives for the slots of `rng`."""


@dataclass(frozen=True)
class Schedule:
    """How long a run is and what happens at which step; an interval of 0 means never."""

    steps: int
    batch: int
    accumulate: int = 1
    log_every: int = 50
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Budget:
    """Where a run may end before its recipe does, as if that were its last step; no learning rate follows it.

    Attributes:
        seconds: of training, over all starts of the run: evaluation, pictures and checkpoints are not counted. The step
            that passes it is the last one; on CUDA, where the host hears of it later, one of the next two.
        steps: of the run.
    """

    seconds: float = math.inf
    steps: float = math.inf

    def __post_init__(self):
        if not self.seconds > 0 or not self.steps >= 1:
            raise ValueError(f"a budget must be positive, got {self.seconds} seconds and {self.steps} steps")


UNLIMITED = Budget()


@dataclass(frozen=True)
class Every:
    """Something to do at the top of the loop at every `interval`-th step, and once after the last.

    Attributes:
        act: returns the lines of kind "evaluate" that are logged, if any.
        judges: whether these tell which checkpoint is the best, so that one is written before.
    """

    interval: int
    act: Callable[["Trainer", int], Sequence[Mapping[str, float | str]] | None]
    judges: bool = False

    def due(self, step: int, steps: int) -> bool:
        return self.interval > 0 and (step % self.interval == 0 or step == steps)


REFERENCE_SAMPLES = 64


class NonFinite(RuntimeError):
    """A loss or gradient was not finite; the run stopped before the optimizer stepped."""


class Trainer:
    """Runs a method's plan.

    Args:
        method, players: what happens, and who trains; `players` has the names of method.players().
        data: the streams that the method reads.
        accelerator: device, precision, trackers and collectives.
        seed: of every draw.
        output: the run's folder.
        hooks: evaluation and pictures; what they return is logged.
        dtype: of noise and data; float64 for exact tests.
        watch_from: the step behind which readings out of their range are warned of.
        best: which evaluation is the best, whose checkpoint is kept; None to keep none.
        patience: evaluations without a better one that end the run; 0: none do.
    """

    def __init__(
        self,
        method: Method,
        players: Mapping[str, Player],
        data: Data,
        accelerator: Accelerator,
        schedule: Schedule,
        *,
        seed: int,
        output: Path,
        hooks: Sequence[Every] = (),
        dtype: torch.dtype = torch.float32,
        watch_from: int = WARM_STEPS,
        best: Best | None = None,
        patience: int = 0,
    ):
        ranks = accelerator.num_processes
        if schedule.batch % (ranks * schedule.accumulate):
            raise ValueError(
                f"train.batch={schedule.batch} must be divisible by the number of processes ({ranks}) times "
                f"train.accumulate={schedule.accumulate}; choose a multiple of {ranks * schedule.accumulate}"
            )
        self.method, self.players, self.data, self.accelerator = method, players, data, accelerator
        self.schedule, self.seed, self.output, self.hooks, self.dtype = schedule, seed, Path(output), hooks, dtype
        self.best, self._patience, self.gave_up = best, patience, False
        self.step, self.attempt = 0, 0
        self.training_seconds = 0.0  # over all starts of the run, without checkpoints and hooks
        self._clocked = True  # since the first step
        for name, spec in method.averages().items():
            players[spec.player].follow_with(name, spec.module, spec.decay)
        self._readings, self._watch = Readings(accelerator), Watch(watch_from, method.settings)
        self._references: dict[str, float] | None = None  # what readings should come to
        # 1 until something is not finite, then 0 for good: every later step of every player is skipped on the device
        self._healthy = torch.ones((), device=accelerator.device)
        self._flags: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []
        # the host reads a step's flags once the next step is queued, so as never to wait for CUDA; a CPU has no queue
        self._behind = 1 if accelerator.device.type == "cuda" else 0
        self._stop_signal: int | None = None  # that came to this process
        self._stopped: int | None = None  # that all processes have agreed on
        self._budget, self._spent = UNLIMITED, False  # whether the budget's time is up, as the loop knows
        self._time_up = False  # and as all processes have agreed
        self._since: float | None = None  # when the clock was started, while it runs
        self._peak_bytes = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows the bar."""
        return self.accelerator.is_main_process

    def run(self, budget: Budget = UNLIMITED) -> int | None:
        """Train to the end, or to the budget's; the number of the signal that stopped it early, or None.

        Raises:
            NonFinite: naming step, player and term, when no retries are left.
        """
        while True:
            try:
                return self._run(budget)
            except NonFinite as error:
                folder = checkpoint.latest(self.output)
                if self.attempt >= self.schedule.retries or folder is None:
                    raise
                self._retry(folder, error)

    def _retry(self, folder: Path, error: NonFinite) -> None:
        """Back to a checkpoint, to go on from there with other draws."""
        attempt = self.attempt + 1
        self.accelerator.wait_for_everyone()  # until all have found the checkpoint, the log stays as it is
        self._flags.clear()
        self._healthy.fill_(1)
        self.resume(folder)
        self.attempt = attempt
        text = f"{error.args[0].partition(';')[0]}; going on from {folder.name} with other draws"
        self.log("retry", {"attempt": attempt, "text": text})
        if self.main:
            tqdm.write(f"retry {attempt} of {self.schedule.retries}: {text}", file=sys.stderr)

    def _run(self, budget: Budget) -> int | None:
        """Train until the end, a signal, or a step that is not finite."""
        steps = self.schedule.steps
        if budget.seconds < math.inf and not self._clocked:
            raise ValueError(
                f"{self.output} was begun before the time of training was kept, so it has no budget of time; give one "
                "of steps, or begin anew in another output"
            )
        self._budget = budget
        self._spent = self._time_up = self.training_seconds >= budget.seconds
        bar = tqdm(
            desc=self.output.name,
            total=steps,
            initial=self.step,
            unit="step",
            disable=not self.main,
            dynamic_ncols=True,
            mininterval=1,
        )
        first, self._stop_signal, self._stopped = True, None, None
        with self._signals_noted(), bar:
            if self._references is None and self.schedule.log_every:
                self._note_references()
            while True:
                self._top(resumed=first and self.step > 0)
                first = False
                if self._ended:
                    self._read_flags(behind=0)
                    return None
                with self._on_the_clock():
                    self.one_step()
                    self._read_flags(behind=self._behind)
                self._spent = self._time_up  # here alone: what is due at the top of the loop is asked several times
                bar.update()
                if self._stopped:
                    self._log_if_due()
                    self.save()
                    return self._stopped

    @property
    def _ended(self) -> bool:
        return self._spent or self.gave_up or self.step >= min(self.schedule.steps, self._budget.steps)

    @contextmanager
    def _on_the_clock(self):
        """The time that the block takes counts as training."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self.training_seconds += time.perf_counter() - self._since
            self._since = None

    def one_step(self) -> None:
        """One pass through the method's plan."""
        names: list[str] = []
        flags: list[Tensor] = []
        for index, item in enumerate(self.method.plan(self.step)):
            if isinstance(item, Action):
                item.act({name: player.spec for name, player in self.players.items()})
                for name in item.restarts:
                    for average in self.players[name].averages.values():
                        average.restart()
            else:
                update_names, update_flags = self.update(index, item)
                names += update_names
                flags.append(update_flags)
        self._post_flags(names, flags)
        self.step += 1

    def save(self) -> None:
        """Write a checkpoint of the present step.

        Raises:
            NonFinite: the present step was not finite, so there is nothing good to save.
            CheckpointError: it could not be written.
        """
        self._read_flags(behind=0)
        log_bytes = 0
        if self.main and self._log_path.exists():
            checkpoint.to_disk(self._log_path)
            log_bytes = self._log_path.stat().st_size
        state = {
            "step": self.step,
            "attempt": self.attempt,
            "readings": self._readings.state(),
            "training_seconds": self.training_seconds if self._clocked else None,
            "peak_bytes": max(self._peak_bytes, peak_bytes(self.accelerator.device)),
            "log_bytes": log_bytes,
            "references": self._references,
            "watch": self._watch.state(),
        }
        folder = self.output / "checkpoints" / f"step-{self.step:08d}"
        checkpoint.save(folder, self.players, state, writes=self.main)
        if self.main:
            found = self.best and self.best.found(self.output)
            also = {found.step} if found else set()
            checkpoint.keep(self.output, last=self.schedule.keep_last, every=self.schedule.keep_every, also=also)
        self.accelerator.wait_for_everyone()

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of this very recipe; log lines written after it are dropped.

        Raises:
            CheckpointError: it is damaged or of another recipe, or the log is shorter than it was then.
        """
        state = checkpoint.load(folder, self.players)
        if self.main:
            checkpoint.clear(folder.parent)  # a run that ended before its last checkpoints were tidied saves no more
        if self.main and self._log_path.exists():
            size = self._log_path.stat().st_size
            if size < state["log_bytes"]:
                raise checkpoint.CheckpointError(
                    f"{self._log_path} has {size} bytes but had {state['log_bytes']} when {folder.name} was written; "
                    "restore it, or delete it to go on with a new log"
                )
            os.truncate(self._log_path, state["log_bytes"])
        self.step, self.attempt = state["step"], state["attempt"]
        self._readings.load(state["readings"])
        seconds = state.get("training_seconds")  # a checkpoint of an earlier version does not say
        self.training_seconds, self._clocked = seconds or 0.0, seconds is not None
        self._peak_bytes = state.get("peak_bytes", 0)
        if "watch" in state:  # as above
            self._references = state["references"]
            self._watch.load(state["watch"])

    def log(self, kind: str, readings: Mapping[str, float]) -> None:
        """One JSON line, with the seconds of training so far, and the same scalars to the trackers."""
        if not self.main:
            return
        line = json.dumps({"kind": kind, "step": self.step, **readings, "seconds": round(self.training_seconds, 3)})
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with self._log_path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise checkpoint.CheckpointError(
                f"could not write {self._log_path}: {error}; free some space or change output, then run the same "
                "command again: it goes on from the last checkpoint"
            ) from error
        under = "/".join([kind, *([readings["weights"]] if "weights" in readings else [])])
        self.accelerator.log({f"{under}/{name}": value for name, value in readings.items()}, step=self.step)

    def show(self, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (height, width, 3), to the trackers."""
        for tracker in self.accelerator.trackers:
            form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: picture[None]}, step=self.step, **form)

    @property
    def _log_path(self) -> Path:
        return self.output / checkpoint.LOG

    def _top(self, *, resumed: bool) -> None:
        """What is due before a step: logs, a checkpoint, then the hooks. Resuming re-enters at the hooks."""
        every, last = self.schedule.save_every, self.step if self._ended else self.schedule.steps
        saves = not resumed and self.step and every and (self.step % every == 0 or self.step == last)
        hooks = [hook for hook in self.hooks if hook.due(self.step, last)]
        saves = saves or (not resumed and self.best and any(hook.judges for hook in hooks))
        if self._flags and (saves or hooks):
            with self._on_the_clock():  # for the step that the device still works on, before it does anything else
                self._read_flags(behind=0)
        if not resumed:
            self._log_if_due()
        if saves:
            self.save()
        for hook in hooks:
            for readings in hook.act(self, self.step) or ():
                self.log("evaluate", readings)
            if hook.judges and self._patience:
                self.gave_up = self._waited()

    def _waited(self) -> bool:
        """Whether the run's patience is over, as the first process knows, who writes the log."""
        found = self.best.found(self.output) if self.main else None
        over = found is not None and found.since >= self._patience
        if self.accelerator.num_processes == 1:
            return over
        told = torch.tensor(float(over), device=self.accelerator.device)
        torch.distributed.broadcast(told, src=0)
        return bool(told.item())

    def _log_if_due(self) -> None:
        every = self.schedule.log_every
        if self.step and every and (self.step % every == 0 or self._ended):
            self._read_flags(behind=0)  # flush waits for the device anyway, and a bad number must not reach the log
            readings = {**self._readings.flush(), **self._gaps()}
            self.log("train", readings)
            for alert in self._watch.see(self.step, readings, self._references or {}):
                self._warn(alert)

    def _warn(self, alert: Alert) -> None:
        """Into the log, and on stderr above the bar."""
        self.log("warning", dataclasses.asdict(alert))
        if self.main:
            tqdm.write(f"step {self.step}: {alert.text}", file=sys.stderr)

    def _gaps(self) -> dict[str, float]:
        """How far each average lies from its player's parameters."""
        gaps = {f"{n}/gap/{average}": gap for n, p in self.players.items() for average, gap in p.gaps().items()}
        values = torch.stack(list(gaps.values())).tolist() if gaps else []
        return dict(zip(gaps, values, strict=True))

    def _note_references(self) -> None:
        """Ask the method what readings should come to, over REFERENCE_SAMPLES samples that the ranks share out."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        count, per_micro = max(REFERENCE_SAMPLES, ranks), self.schedule.batch // (ranks * self.schedule.accumulate)
        readings, last = Readings(self.accelerator), count * (rank + 1) // ranks
        key = (self.seed, self.attempt, self.step, "references")
        for first in range(count * rank // ranks, last, per_micro):
            slots = range(first, min(first + per_micro, last))
            batch = self.data.draw(self._rng((*key, "data"), slots))
            for name, reading in self.method.references(batch, self._rng(key, slots)).items():
                readings.add(name, reading)
        self._references = readings.flush()
        if self._references:
            self.log("reference", self._references)

    def update(self, index: int, update: Update) -> tuple[list[str], Tensor]:
        """All backward passes of an update, then the steps.

        Returns:
            The names of what must be finite, and for each 1 where it was not on some rank, else 0.
        """
        bad: dict[str, Tensor] = {}
        last_term = {term.player: term for term in update.terms}
        micros = list(self._micro_batches())
        for number, slots in enumerate(micros):
            key = (self.seed, self.attempt, self.step, index)
            batch = self.data.draw(self._rng((*key, "data"), slots))
            for term in update.terms:
                player = self.players[term.player]
                rng = self._rng((*key, term.player, term.name), slots)
                player.reduce_on_backward(number == len(micros) - 1 and last_term[term.player] is term)
                with only(term.player, self.players), drawn_from(player.dropouts, rng), _noted(term):
                    value = self._backward(term, batch, rng)
                name = f"term {term.name} of player {term.player}"
                flag = (~value.isfinite()).any().float()
                bad[name] = torch.maximum(bad[name], flag) if name in bad else flag
        norms = {name: self.players[name].gradient_norm() for name in update.players}
        for name, norm in norms.items():
            self._readings.add(f"{name}/gradient_norm", norm, share=1 / self.accelerator.num_processes)
            bad[f"the gradient of player {name}"] = 1 - norm.isfinite().float()
        flags = torch.stack(list(bad.values()))
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        self._healthy = self._healthy * (1 - flags.max())
        for name, norm in norms.items():
            self.players[name].apply(self.step, norm, self._healthy)
        return list(bad), flags

    def _backward(self, term: Term, batch: Batch, rng: Rng) -> Tensor:
        """One term's forward and backward pass; its value, one number per sample."""
        # Without the cache of cast weights: what a pass under no_grad put there would have no gradient in the next one.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            loss = term.loss(batch, rng)
        if loss.value.shape != (len(rng.slots),):
            raise ValueError(
                f"term {term.name} of player {term.player} must give one value per sample, {len(rng.slots)} here, got "
                f"shape {tuple(loss.value.shape)}"
            )
        (loss.value.sum() / self.schedule.batch).backward()
        value = loss.value.detach()
        self._readings.add(f"{term.player}/{term.name}", value)
        for name, reading in loss.readings.items():
            self._readings.add(f"{term.player}/{term.name}/{name}", reading)
        return value

    def _micro_batches(self) -> Iterator[range]:
        """The slots of this rank, in `accumulate` parts."""
        per_rank = self.schedule.batch // self.accelerator.num_processes
        per_micro = per_rank // self.schedule.accumulate
        start = self.accelerator.process_index * per_rank
        for first in range(start, start + per_rank, per_micro):
            yield range(first, first + per_micro)

    def _rng(self, key: tuple, slots: range) -> Rng:
        return Rng(key, slots, device=self.accelerator.device, dtype=self.dtype)

    def _post_flags(self, names: list[str], flags: Sequence[Tensor]) -> None:
        """Send this step's flags towards the host without waiting: one per name, then what this process has to say.

        That is the signal that came, if any, and whether the budget's time is up.
        """
        seconds = self.training_seconds + (0.0 if self._since is None else time.perf_counter() - self._since)
        spent = seconds >= self._budget.seconds
        said = torch.tensor([float(self._stop_signal or 0), float(spent)], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
        sent = torch.cat([*flags, said])
        event = None
        if sent.is_cuda:
            sent = sent.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._flags.append((self.step, names, sent, event))

    def _read_flags(self, *, behind: int) -> None:
        """Look at the flags of all but the newest `behind` steps, and note the signal and the end that ranks agree on.

        Whoever reads first, a log line or a checkpoint too, the loop must hear of both.
        """
        while len(self._flags) > behind:
            step, names, flags, event = self._flags.pop(0)
            if event is not None:
                event.synchronize()
            *values, signal_number, spent = flags.tolist()
            bad = [name for name, value in zip(names, values, strict=True) if value]
            if bad:
                raise NonFinite(
                    f"step {step}: {bad[0]} was not finite; the weights are those from before that update, and the "
                    f"last checkpoint in {self.output / 'checkpoints'} is good. Running on would fail the same way: "
                    "begin a new recipe from it, with a lower learning rate for that player or with precision fp32; if "
                    "a rare draw is to blame, train.retries=3 goes back to it for others"
                )
            self._stopped = self._stopped or (int(signal_number) or None)
            self._time_up = self._time_up or bool(spent)

    @contextmanager
    def _signals_noted(self):
        """SIGTERM and Ctrl-C are noted, so that the loop can save and leave; a second one acts at once."""

        def note(number, frame):
            self._stop_signal = number
            signal.signal(number, before[number] or signal.SIG_DFL)

        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.getsignal(number) for number in numbers}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _noted(term: Term):
    """Within the block, running out of device memory is noted with the term's name, for whoever reports it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(f"term {term.name} of player {term.player}")
        raise
