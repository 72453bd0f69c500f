"""Whether a run is well: warnings in plain words as a pure function of the lines of its log.

    watch = Watch(start=40)
    for line in log:  # in order
        alerts = watch.see(line["step"], line, references)

`alerts_of` does that for a whole log, so that a report says what the run said. README tells what the readings mean.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

AGREEMENT = (0.3, 3.0)  # good runs: 0.85 to 1.3 behind their warm-up
CRITIC_LOSS = 1.5  # times its running mean
PEAK, LOUDNESS = 1.3, 1.3  # times the teacher's
ALIKE, FALLEN = 0.5, 0.75  # of the teacher's spread; of the run's own best spread so far
ACCURACY, LOGIT_GAP = 0.9, 3.0  # good runs: at most 0.7 and 0.8
GAN_SHARE = 0.6  # good runs: at most 0.42, with 300 times the customary weight
DIRECTION = 3.0  # times its running mean
DIFFERENCE = 1.0  # times the root mean square of the teacher's samples
_PLAYER = re.compile(r"(\d+/)*[^/]+")  # the part of a reading's name that is its player's
RECENT_STEPS, LONG_STEPS = 10, 100  # half-lives of the two running means
WARM_STEPS = 20  # that a run is left alone behind the warm-up of its learning rates


@dataclass(frozen=True)
class Alert:
    """One warning: its kind, the reading that left its range, its value, the limit, and what to do, in one line."""

    warning: str
    reading: str
    value: float
    limit: float
    text: str


@dataclass(frozen=True)
class Seen:
    """One reading after a line: its mean over the last steps, over many before them, its best so far, the reference."""

    recent: float
    before: float | None
    best: float
    reference: float | None


class Watch:
    """Follows a run line by line; a warning is told again only once the run is twice as long as when it was told.

    Args:
        start: steps behind a reading's first one from which on it counts; those of a warm-up say little, that of a
            player which joins in the middle of a run too.
        settings: the key of a recipe whose settings the warnings speak of.
    """

    def __init__(self, start: int = WARM_STEPS, settings: str = "method"):
        self.start, self.settings = start, settings
        self._last = 0
        self._recent: dict[str, float] = {}
        self._long: dict[str, float] = {}
        self._born: dict[str, int] = {}  # the step of the line before a reading's first one
        self._first: dict[str, int] = {}  # the same of the first one that counts
        self._best: dict[str, float] = {}
        self._told: dict[str, int] = {}

    def see(self, step: int, readings: Mapping[str, Any], references: Mapping[str, float]) -> list[Alert]:
        """What the train line of this step gives reason to warn of; nothing where it has seen this step, or a later."""
        if step <= self._last:
            return []
        numbers = {name: float(value) for name, value in readings.items() if isinstance(value, int | float)}
        for name in numbers:
            self._born.setdefault(name, self._last)
        seen = {
            name: self._follow(name, step, value, references.get(name))
            for name, value in numbers.items()
            if step > self._born[name] + self.start
        }
        self._last = step
        found: dict[str, Alert] = {}
        for alert in _alerts(seen):
            key = f"{alert.warning} of {_PLAYER.match(alert.reading)[0]}"
            if key not in found and step >= 2 * self._told.get(key, 0):
                found[key] = replace(alert, text=alert.text.replace("method.", f"{self.settings}."))
        self._told |= dict.fromkeys(found, step)
        return list(found.values())

    def _follow(self, name: str, step: int, value: float, reference: float | None) -> Seen:
        """Take in one value; both means weigh it by the steps that it stands for."""
        steps, before = step - self._last, self._long.get(name)
        first = self._first.setdefault(name, self._last)
        recent = _moved(self._recent.get(name), value, 1 - 0.5 ** (steps / RECENT_STEPS))
        # a plain mean while young
        long = _moved(before, value, max(1 - 0.5 ** (steps / LONG_STEPS), steps / (step - first)))
        best = max(self._best.get(name, recent), recent)
        self._recent[name], self._long[name], self._best[name] = recent, long, best
        young = step - first < 3 * RECENT_STEPS
        return Seen(recent, None if young else before, best, reference)

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON."""
        return {
            "last": self._last,
            "recent": dict(self._recent),
            "long": dict(self._long),
            "born": dict(self._born),
            "first": dict(self._first),
            "best": dict(self._best),
            "told": dict(self._told),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._last = state["last"]
        self._recent, self._long = dict(state["recent"]), dict(state["long"])
        self._first, self._best, self._told = dict(state["first"]), dict(state["best"]), dict(state["told"])
        self._born = dict(state.get("born", dict.fromkeys(self._first, 0)))  # an earlier version does not say


def alerts_of(log: Iterable[Mapping[str, Any]], start: int = WARM_STEPS) -> list[tuple[int, Alert]]:
    """The steps and alerts of a whole log, read line by line."""
    watch, references, found = Watch(start), {}, []
    for line in log:
        if line["kind"] == "reference":
            references = {name: value for name, value in line.items() if isinstance(value, float)}
        elif line["kind"] == "train":
            readings = {name: value for name, value in line.items() if name not in ("kind", "step", "seconds")}
            found += [(line["step"], alert) for alert in watch.see(line["step"], readings, references)]
    return found


def _moved(mean: float | None, value: float, weight: float) -> float:
    return value if mean is None else mean + weight * (value - mean)


def _alerts(seen: Mapping[str, Seen]) -> Sequence[Alert]:
    """Everything out of its range, by the last part of a reading's name, so that it serves methods to come."""
    found = []

    def alert(kind: str, name: str, limit: float, text: str) -> None:
        found.append(Alert(kind, name, seen[name].recent, limit, text.replace("VALUE", f"{seen[name].recent:.3g}")))

    for name, it in seen.items():
        *rest, last = name.split("/")
        match last:
            case "agreement" | "edge_agreement" if it.recent > AGREEMENT[1]:
                alert("critic_lagging", name, AGREEMENT[1], _LAGGING)
            case "agreement" if it.recent < AGREEMENT[0]:
                alert("critic_lagging", name, AGREEMENT[0], _MISLED)
            case "score" if it.before is not None and it.recent > CRITIC_LOSS * it.before:
                alert("critic_lagging", name, CRITIC_LOSS * it.before, _LOSING)
            case "peak" if it.reference is not None and it.recent > PEAK * it.reference:
                alert("saturation", name, PEAK * it.reference, _LOUD)
            case "rms" if it.reference is not None and it.recent > LOUDNESS * it.reference:
                alert("saturation", name, LOUDNESS * it.reference, _LOUD)
            case "spread" if it.reference is not None and _collapsed(it):
                alert("collapse", name, it.reference, _ALIKE)
            case "accuracy" if it.recent > ACCURACY:
                alert("discriminator_winning", name, ACCURACY, _WON)
            case "logit_gap" if it.recent > LOGIT_GAP:
                alert("discriminator_winning", name, LOGIT_GAP, _WON)
            case "gan_share" if it.recent > GAN_SHARE:
                alert("gan_dominating", name, GAN_SHARE, _LED)
            case "direction" if it.before is not None and it.recent > DIRECTION * it.before:
                alert("exploding_direction", name, DIRECTION * it.before, _RISING)
        if rest and rest[-1] == "difference":
            loud = seen.get("/".join((*rest[:-1], "rms")))
            if loud is not None and loud.reference is not None and it.recent > DIFFERENCE * loud.reference:
                alert("exploding_direction", name, DIFFERENCE * loud.reference, _NONSENSE)
    return found


def _collapsed(spread: Seen) -> bool:
    """Far below the teacher's and not rising, or much lower than it was; a one-step start is blurred, and rises."""
    still = spread.before is not None and spread.recent < 1.02 * spread.before
    fallen = spread.recent < FALLEN * min(spread.best, spread.reference)
    return fallen if spread.best > ALIKE * spread.reference else still and spread.recent < ALIKE * spread.reference


_LAGGING = (
    "the critic lags behind the generator: its samples show VALUE times the difference that the critic sees (well: "
    "about 1). Raise players.critic.learning_rate or method.ratio, or lower players.generator.learning_rate"
)
_MISLED = (
    "the critic is wrong about the generator: its samples show only VALUE of the difference that the critic sees "
    "(well: about 1). Lower players.generator.learning_rate, raise method.ratio, or lower "
    "players.critic.learning_rate if its loss jumps; with a GAN term, lower method.gan_critic_weight"
)
_LOSING = (
    "the critic's loss on fresh samples has risen to VALUE, well above its running mean: the generator runs away from "
    "it. Raise method.ratio or players.critic.learning_rate, or lower players.generator.learning_rate"
)
_LOUD = (
    "the samples saturate: values of size VALUE, well beyond the teacher's. Lower players.generator.learning_rate or "
    "teacher.guidance, or raise method.ratio"
)
_ALIKE = (
    "the samples collapse: they differ from each other by only VALUE, far less than the teacher's. Lower "
    "players.generator.learning_rate or method.gan_weight, raise method.ratio, and go back to an earlier checkpoint"
)
_WON = (
    "the discriminator wins (VALUE), and tells the generator little. Lower method.gan_critic_weight or "
    "players.critic.learning_rate (ladd: players.discriminator.learning_rate), or start from a better generator"
)
_LED = (
    "the GAN term leads the generator: a share of VALUE of its direction, and the scores have the rest. Lower "
    "method.gan_weight, by as many times as the share is to shrink"
)
_RISING = (
    "the generator's direction has grown to VALUE, several times its running mean. Lower "
    "players.generator.learning_rate and players.critic.learning_rate, and go back to an earlier checkpoint"
)
_NONSENSE = (
    "critic and teacher differ by VALUE, more than whole samples are large: one of them computes nonsense. Lower "
    "players.critic.learning_rate, and check teacher.denoiser and teacher.guidance"
)
