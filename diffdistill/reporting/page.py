"""The report's page: each section from what was read, or a line that says which key would fill it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffdistill.pages.chart import Rule, Series, line_chart
from diffdistill.pages.chart import number as short
from diffdistill.pages.document import (
    Cell,
    document,
    facts,
    folded,
    heading,
    paragraph,
    picture,
    section,
    side_by_side,
    table,
)
from diffdistill.reporting.reading import Told, differing
from diffdistill.reporting.samples import Nearest

METRICS = {  # of an evaluation, in the order of the page
    "frechet_distance": "Frechet distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "class_accuracy": "class accuracy",
    "diversity": "diversity",
}
LOGARITHMIC = ("frechet_distance", "gradient_norm")
MANY = 24  # charts of readings, at most


@dataclass
class Made:
    """What was sampled for a run's part of the page.

    Attributes:
        classes: PNG of samples by class, and the classes of its columns; empty bytes where samples are no pictures.
        nearest: samples above their nearest training images; None where no extractor is named.
        num_parameters, evaluations: of what samples.
    """

    classes: tuple[bytes, Sequence[int | str]] = (b"", ())
    nearest: Nearest | None = None
    num_parameters: int = 0
    evaluations: float = 0.0
    missing: list[str] = field(default_factory=list)


def page(told: Sequence[Told], made: Sequence[Made], *, rows: Sequence[Mapping[str, Any]], facts_of: Mapping) -> str:
    """The whole page.

    Args:
        told, made: of each run.
        rows: of a table of quality against cost, as `diffdistill evaluate --out` writes it; none for no chart.
        facts_of: name and text of how the page was made.
    """
    names = ", ".join(one.name for one in told)
    body = [
        "<header>",
        heading(f"Report: {names}", 1),
        paragraph(_verdict(told), "lead"),
        "</header>",
        section("Numbers", _numbers(told, made)),
        section("Warnings", _warnings(told)),
        section("Quality while training", _metrics(told)),
        section("Quality against cost", _front(rows)),
        section("Samples over time", _over_time(told)),
        section("Samples by class, and the training images nearest to them", _samples(told, made)),
        section("Losses and readings", _readings(told)),
        section("Configuration", _configuration(told)),
        section("How this was made", [facts(list(facts_of.items()))]),
    ]
    return document(f"Report: {names}", body)


def _note(text: str) -> str:
    return paragraph(text, "note")


def _verdict(told: Sequence[Told]) -> str:
    said = []
    for one in told:
        steps = one.config.train.steps
        at = one.cost.get("updates", 0)
        state = "complete" if at >= steps else f"at update {at:,} of {steps:,}"
        found = [line for line in one.kind("evaluate") if "frechet_distance" in line]
        last = f", Frechet distance {short(found[-1]['frechet_distance'], padded=True)}" if found else ""
        said.append(f"{one.name}: {one.config.method_name}, {state}{last}.")
    return " ".join(said)


def _numbers(told: Sequence[Told], made: Sequence[Made]) -> list[str]:
    last = [next(iter(reversed(one.kind("evaluate"))), {}) for one in told]
    used = [name for name in METRICS if any(name in line for line in last)]
    lines = []
    for one, line, what in zip(told, last, made, strict=True):
        cells = [Cell(short(line[n], padded=True), value=repr(line[n])) if n in line else Cell("–") for n in used]
        lines.append((one.name, [*cells, *_costs(one, what)], ""))
    costs = ["evaluations a sample", "parameters", "updates", "training time", "seconds an update", "peak memory"]
    extractors = {f"{line['extractor']}, {line['num_samples']:,} samples" for line in last if "extractor" in line}
    measured = f"The last evaluation while training, on {' and '.join(sorted(extractors))}. " if used else ""
    caption = f"{measured}Training time counts the updates alone."
    notes = [] if used else [_note(f"No run was evaluated while training; {MISSING_METRICS}.")]
    return [table(caption, ["", *(METRICS[name] for name in used), *costs], lines), *notes]


MISSING_METRICS = "evaluate.every=500 evaluate.features=FOLDER does so"


def _costs(one: Told, what: Made) -> list[Cell]:
    cost = one.cost

    def cell(value: Any, text: str) -> Cell:
        return Cell("–") if not value else Cell(text.format(value), value=repr(value))

    seconds = cost.get("training_seconds")
    peak = cost.get("peak_bytes")
    return [
        cell(what.evaluations, "{:g}"),
        cell(what.num_parameters, "{:,}"),
        cell(cost.get("updates"), "{:,}"),
        cell(seconds and seconds / 60, "{:.1f} min"),
        cell(cost.get("seconds_per_update"), "{:.3g}"),
        cell(peak and peak / 2**20, "{:,.0f} MiB"),
    ]


def _warnings(told: Sequence[Told]) -> list[str]:
    lines = [
        (f"{one.name}, step {line['step']}", [Cell(line["text"])], "failed")
        for one in told
        for line in one.kind("warning")
    ]
    if not lines:
        return [_note("None: every reading stayed where it should lie.")]
    return [table("Readings that left their range, and what to do.", ["", "what the run said"], lines)]


def _metrics(told: Sequence[Told]) -> list[str]:
    curves = [one.curves("evaluate") for one in told]
    charts = []
    for name, title in METRICS.items():
        series = _series(
            told, [{k: v for k, v in each.items() if k.rpartition("/")[2] == name} for each in curves], name
        )
        if series:
            charts.append(_chart(series, title, name))
    return [side_by_side(charts)] if charts else [_note(f"No run was evaluated while training; {MISSING_METRICS}.")]


def _series(told: Sequence[Told], curves: Sequence[Mapping[str, Sequence]], name: str) -> list[Series]:
    """A curve of each run, or of each of its weights; colours and marks follow the run and the weights."""
    found = []
    for one, each in zip(told, curves, strict=True):
        for key, points in each.items():
            weights = key.rpartition("/")[0]
            label = one.name if len(told) > 1 or not weights else ""
            found.append(Series(" ".join(part for part in (label, weights) if part) or one.name, points, len(found)))
    return found


def _chart(series: Sequence[Series], title: str, name: str, rules: Sequence[Rule] = ()) -> str:
    logarithmic = name.rpartition("/")[2] in LOGARITHMIC
    return line_chart(series, title=title, x_label="updates", y_label="", rules=rules, logarithmic=logarithmic)


def _front(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return [
            _note(
                "No table was given: diffdistill evaluate RUN... --teacher-steps 1,4,18 --out table.json writes one, "
                "for --table table.json."
            )
        ]
    sources: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row["name"].partition(" at ")[0].partition(",")[0]
        sources.setdefault(name, []).append((row["evaluations"], row["frechet_distance"]))
    series = [Series(name, sorted(points), place) for place, (name, points) in enumerate(sources.items())]
    chart = line_chart(
        series,
        title="Frechet distance against evaluations of the network for a sample",
        x_label="evaluations",
        y_label="FD",
        logarithmic=True,
        x_logarithmic=True,
    )
    lines = [
        (row["name"], [Cell(f"{row['evaluations']:g}"), Cell(short(row["frechet_distance"], padded=True))], "")
        for row in rows
    ]
    caption = "Lower and further left is better; every mark is one number of steps."
    return [side_by_side([chart, f"<div>{table(caption, ['', 'evaluations', 'FD'], lines)}</div>"], wide=True)]


def _over_time(told: Sequence[Told]) -> list[str]:
    parts = []
    for one in told:
        if not one.pictures:
            parts.append(_note(f"{one.name} drew no pictures; pictures.every=500 does so."))
            continue
        if len(told) > 1:
            parts.append(heading(one.name, 3))
        shown = [
            picture(png, alt=f"Samples of {one.name} at update {step}", caption=f"update {step:,}")
            for step, png in one.pictures
        ]
        parts.append(side_by_side(shown))
    if any(one.pictures for one in told):
        parts.insert(0, _note("Each place of a run's pictures starts from the same noise and class, at every update."))
    return parts


def _samples(told: Sequence[Told], made: Sequence[Made]) -> list[str]:
    parts = []
    for one, what in zip(told, made, strict=True):
        png, classes = what.classes
        if png:
            said = f"{one.name}: " + (
                f"columns are the classes {', '.join(map(str, classes))}" if classes else "no classes"
            )
            parts.append(picture(png, alt=f"Samples of {one.name}", caption=said))
        if what.nearest is not None:
            said = (
                f"{one.name}: rows 1 and 3 are samples; below each, the training image nearest to it in the features "
                f"of {what.nearest.extractor}. Samples are {what.nearest.share:.2f} times as far from their nearest as "
                "training images are from theirs; far below 1 would mean copies."
            )
            parts.append(picture(what.nearest.png, alt=f"Nearest training images of {one.name}", caption=said))
    notes = [_note(f"{one.name}: {line}") for one, what in zip(told, made, strict=True) for line in what.missing]
    return [*([side_by_side(parts, wide=True)] if parts else []), *notes]


def _readings(told: Sequence[Told]) -> list[str]:
    curves = [one.curves("train") for one in told]
    names = dict.fromkeys(name for each in curves for name in each)
    charts = []
    for group, members in _groups(list(names), alone=len(told) > 1).items():
        if len(told) > 1:
            series = [
                Series(one.name, each[members[0]], place)
                for place, (one, each) in enumerate(zip(told, curves, strict=True))
                if members[0] in each
            ]
        else:
            series = [
                Series(name.removeprefix(f"{group}/") or name, curves[0][name], place)
                for place, name in enumerate(members)
            ]
        rules = [Rule("should be", told[0].reference[group])] if group in told[0].reference and len(told) == 1 else []
        charts.append(_chart(series, group, group, rules))
    if not charts:
        return [_note("Nothing was logged; train.log_every=50 does so.")]
    more = [] if len(charts) <= MANY else [_note(f"{len(charts) - MANY} more readings are in log.jsonl.")]
    said = "Losses have the scale of their method, and are not comparable between methods."
    return [_note(said), side_by_side(charts[:MANY]), *more]


def _groups(names: Sequence[str], *, alone: bool) -> dict[str, list[str]]:
    """Names by chart: those of one reading at several noise levels together, all others alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        leaf = name.rpartition("/")[2]
        levels = leaf.startswith(("below_", "above_")) or "_to_" in leaf
        if not (alone and levels):  # of several runs only what one curve tells
            found.setdefault(name.rpartition("/")[0] if levels else name, []).append(name)
    return dict(sorted(found.items(), key=lambda item: item[0].count("/")))  # losses first


def _configuration(told: Sequence[Told]) -> list[str]:
    parts = []
    if len(told) > 1:
        rows = [(key, [Cell(value) for value in values], "") for key, values in differing(told).items()]
        if rows:
            parts.append(table("Keys that differ.", ["", *(one.name for one in told)], rows))
        else:
            parts.append(_note("The recipes are the same."))
    return [*parts, *(folded(f"{one.name}: config.yaml", one.recipe) for one in told)]
