"""Training one recipe in a process of its own, so that its memory is its own, and so is its end."""

import json
import math
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from diffdistill import api, checkpoint, run
from diffdistill.comparing.entrants import Entrant
from diffdistill.config import ConfigError
from diffdistill.recipe import as_yaml
from diffdistill.trainer import Budget

RECIPES = "recipes"  # of the output: what is trained, as `diffdistill train` reads it
BUDGET = "budget.json"
TAIL_CHARACTERS = 4000


def is_complete(entrant: Entrant, budget: Budget) -> bool:
    """Whether a run has reached the end of its recipe or of the budget."""
    found = checkpoint.latest(entrant.folder)
    if found is None:
        return False
    state = checkpoint.read_state(found)
    enough = state["step"] >= min(entrant.config.train.steps, budget.steps)
    return enough or (state.get("training_seconds") or 0.0) >= budget.seconds


def hold_budget(output: Path, budget: Budget) -> None:
    """Keep the budget beside the runs.

    Raises:
        ConfigError: an earlier one was larger, or of the other kind: what was trained then cannot be taken back.
    """
    file, ours = output / BUDGET, _plain(budget)
    if file.is_file():
        before = json.loads(file.read_text())
        if before.keys() != ours.keys() or any(ours[name] < before[name] for name in ours):
            raise ConfigError(
                f"{output} was trained with a budget of {_in_words(before)}, and {_in_words(ours)} is asked for; give "
                "at least that budget, or another --out"
            )
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ours) + "\n")


def train(entrant: Entrant, budget: Budget, *, output: Path) -> str:
    """Train to the end of the budget, going on from what is there; why it failed, or "" where it did not.

    Raises:
        ConfigError: another process is training it.
        Stopped: after a signal, when the run has saved and left.
    """
    with run.held(entrant.folder, writes=True):
        pass  # asked here, where the answer ends the comparison and not this entrant alone
    recipe = output / RECIPES / f"{entrant.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(as_yaml(entrant.config, f"{entrant.source}, as it is compared."))
    limits = {"--budget": (budget.seconds, f"{budget.seconds!r}s"), "--steps": (budget.steps, f"{budget.steps:.0f}")}
    options = [word for name, (limit, text) in limits.items() if math.isfinite(limit) for word in (name, text)]
    command = [sys.executable, "-m", "diffdistill", "train", str(recipe), *options]
    # a session of its own: Ctrl-C comes to this process alone, which passes it on, so that each hears of it once
    child = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    tail = ""
    with _passed_on(child) as passed:
        while chunk := child.stderr.read1(4096):
            text = chunk.decode(errors="replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            tail = (tail + text)[-TAIL_CHARACTERS:]
        status = child.wait()
    child.stderr.close()
    if passed:
        raise api.Stopped(passed[0], f"stopped while training {entrant.name}; run the same command again to go on")
    return "" if status == 0 else _reason(tail, status)


@contextmanager
def _passed_on(child: subprocess.Popen):
    """Within the block, Ctrl-C and SIGTERM go to the child, which saves and leaves; the list of those that came."""
    came: list[int] = []

    def pass_on(number, frame):
        came.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(tail: str, status: int) -> str:
    """What a failed process said last, in one line."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}" + (", often for lack of memory" if status == -9 else "")
    lines = [line.strip() for line in tail.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].removeprefix("diffdistill: ") if lines else f"ended with status {status}"


def _plain(budget: Budget) -> dict[str, float]:
    return {name: value for name, value in vars(budget).items() if math.isfinite(value)}


def _in_words(limits: dict[str, float]) -> str:
    return " and ".join(f"{value:g} {name}" for name, value in limits.items())
