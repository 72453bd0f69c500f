"""The comparison's page, from its results alone."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
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

Row = Mapping[str, Any]


def number(value: float) -> str:
    """A number at three digits."""
    return short(value, padded=True)


def page(results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page as HTML.

    Args:
        results: what results.json holds.
        pictures: the PNG of each row that was measured, by the row's name.
    """
    rows, ruler = results["rows"], results["ruler"]
    students = [row for row in rows if row["kind"] == "student"]
    measured = [row for row in students if "metrics" in row]
    names = ", ".join(row["name"] for row in students)
    body = [
        "<header>",
        heading(f"Distilling {results['teacher']['path'].rstrip('/').rpartition('/')[2]}: {names}", 1),
        paragraph(_verdict(rows, measured), "lead"),
        paragraph(_terms(results), "note"),
        "</header>",
        section("Numbers", [_numbers(rows, ruler), *map(_note, _notes(students, ruler))]),
        section("Samples", [_note(_columns(rows, ruler)), _samples(rows, pictures)]),
    ]
    charts = [*_distance_chart(rows, students), *_loss_charts(students)]
    if charts:
        body.append(section("Curves", [_note(_about_curves(students)), side_by_side(charts)]))
    body += [section("Recipes", [_recipe(row) for row in students]), section("How this was made", _made(results))]
    return document(f"Comparison: {names}", body)


def _note(text: str) -> str:
    return paragraph(text, "note")


def _verdict(rows: Sequence[Row], measured: Sequence[Row]) -> str:
    if not measured:
        return "None of the runs could be measured."
    best = min(measured, key=lambda row: row["metrics"]["frechet_distance"])
    teacher = rows[0]
    ours, theirs = best["metrics"]["frechet_distance"], teacher["metrics"]["frechet_distance"]
    times = teacher["evaluations"] / best["evaluations"]
    return (
        f"{best['name']} comes closest to real images: Frechet distance {number(ours)}, {number(ours / theirs)} times "
        f"that of its teacher ({number(theirs)}), at {_count(best['evaluations'])} instead of "
        f"{_count(teacher['evaluations'])} network evaluations a sample ({times:.3g} times fewer)."
    )


def _terms(results: Mapping[str, Any]) -> str:
    budget, students = results["budget"], [row for row in results["rows"] if row["kind"] == "student"]
    limits = [] if budget is None else [_limit(name, value) for name, value in budget.items()]
    trained = f"Trained for {' and '.join(limits)} each, one after the other on one machine. " if limits else ""
    if not all(row["trained_here"] for row in students):
        earlier = ", ".join(row["name"] for row in students if not row["trained_here"])
        trained += f"Trained before this comparison, and not under one clock: {earlier}. "
    return f"{trained}One teacher, one evaluation, the same noises and classes for every row."


def _limit(name: str, value: float) -> str:
    return f"{_duration(value)} of training" if name == "seconds" else f"{value:,.0f} updates"


COLUMNS: tuple[tuple[str, str, Callable[[float], str], int], ...] = (
    # title, key of the metrics, its text, and whether more (1) or less (-1) is better
    ("FD", "frechet_distance", number, -1),
    ("class accuracy", "class_accuracy", "{:.3f}".format, 1),
    ("precision", "precision", "{:.3f}".format, 1),
    ("recall", "recall", "{:.3f}".format, 1),
    ("diversity", "diversity", "{:.3f}".format, 1),
)
COSTS = ("evaluations a sample", "updates", "training time", "seconds an update", "peak memory", "parameters")


def _numbers(rows: Sequence[Row], ruler: Mapping[str, Any]) -> str:
    used = [column for column in COLUMNS if any(column[1] in row.get("metrics", ()) for row in rows)]
    best = {key: _best(rows, key, better) for _, key, _, better in used}
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append((row["name"], [Cell(f"failed: {row['failure']}")], "failed"))
            continue
        cells = []
        for _, key, text, _ in used:
            value = row["metrics"].get(key)
            note = _ratio(row, rows) if key == "frechet_distance" else ""
            cells.append(_cell(value, text, note=note, best=value is not None and value == best[key]))
        kind = "teacher" if row["kind"] == "teacher" else "student"
        lines.append((_label(row), [*cells, *_costs(row)], kind))
    on = f"{ruler['extractor']}; {ruler['samples']:,} samples a row"
    caption = f"FD: Frechet distance on {on}. Underlined: the best student."
    return table(caption, ["", *(column[0] for column in used), *COSTS], lines)


def _label(row: Row) -> str:
    return (
        row["name"] if row["kind"] == "teacher" or row["name"] == row["method"] else f"{row['name']} ({row['method']})"
    )


def _best(rows: Sequence[Row], key: str, better: int) -> float | None:
    """The best value among the students; None where fewer than two have one."""
    found = [row["metrics"][key] for row in rows if row["kind"] == "student" and key in row.get("metrics", ())]
    return max(found, key=lambda value: better * value) if len(found) > 1 else None


def _ratio(row: Row, rows: Sequence[Row]) -> str:
    if row is rows[0]:
        return ""
    return f"{number(row['metrics']['frechet_distance'] / rows[0]['metrics']['frechet_distance'])} × teacher"


def _cell(value: float | None, text: Callable[[float], str], *, note: str = "", best: bool = False) -> Cell:
    return Cell("–") if value is None else Cell(text(value), note, best, repr(value))


def _costs(row: Row) -> list[Cell]:
    if row["kind"] == "teacher":
        trained = [Cell("–")] * 4
    else:
        share = "" if row["updates"] >= row["steps"] else f"of {row['steps']:,}"
        about = "" if row["clocked"] else "about"
        trained = [
            _cell(row["updates"], "{:,}".format, note=share),
            _cell(row["training_seconds"], _duration, note=about),
            _cell(row["seconds_per_update"], number, note=about),
            _cell(row["peak_bytes"], lambda size: f"{size / 2**20:,.0f} MiB"),
        ]
    return [_cell(row["evaluations"], _count), *trained, _cell(row["num_parameters"], "{:,}".format)]


def _notes(students: Sequence[Row], ruler: Mapping[str, Any]) -> list[str]:
    weights = ", ".join(f"{row['name']} {row['weights']}" for row in students)
    said = [
        f"FD against the moments of {ruler['num_moments']:,} real images, and not FID: another network's features. "
        f"Precision and recall against {ruler['num_reference']:,} real images. Class accuracy: the share of samples "
        "that the extractor's classifier gives the class asked for. Diversity: how far samples of one class lie apart, "
        f"as a share of the real images' (1 is as diverse; more can mean outliers). Measured weights: {weights}.",
        "Training time counts the updates alone: evaluation, pictures and checkpoints are left out. Peak memory is the "
        "training process's, its evaluations included where the recipe asks for them. Parameters are those that "
        "sampling needs.",
    ]
    if any("updates" in row and not row["clocked"] for row in students):
        said.append(
            "About: the run did not keep its training time, so that the time of an update is the median over its log, "
            "and the training time that times the updates."
        )
    return said


def _columns(rows: Sequence[Row], ruler: Mapping[str, Any]) -> str:
    columns = next(row["columns"] for row in rows if "columns" in row)
    said = "Each place starts from the same noise and class in every picture: the first samples of those measured."
    if len(ruler["classes"]) == columns:
        said += f" Columns: {', '.join(ruler['classes'])}."
    return said


def _samples(rows: Sequence[Row], pictures: Mapping[str, bytes]) -> str:
    parts = []
    for row in rows:
        if row["name"] in pictures:
            value = number(row["metrics"]["frechet_distance"])
            cost = f"{_count(row['evaluations'])} evaluation{'' if row['evaluations'] == 1 else 's'} a sample"
            caption = f"{_label(row)}: FD {value}, {cost}"
            alt = f"Samples of {_label(row)}, {row['columns']} in a row"
            parts.append(picture(pictures[row["name"]], alt=alt, caption=caption))
    return side_by_side(parts, wide=True)


def _distance_chart(rows: Sequence[Row], students: Sequence[Row]) -> list[str]:
    """FD against training time: what was measured in training, and the end as the table has it."""
    series = []
    for place, row in enumerate(students):
        if "metrics" not in row or row["training_seconds"] is None:
            continue
        end = (row["training_seconds"], row["metrics"]["frechet_distance"])
        points = [(at, distance) for at, distance, _ in row["distances"]]
        series.append(Series(row["name"], points, place, last=end))
    if not series:
        return []
    teacher = rows[0]
    rule = Rule(teacher["name"], teacher["metrics"]["frechet_distance"])
    axes = {"x_label": "seconds of training", "y_label": "FD"}
    return [line_chart(series, title="Frechet distance", **axes, rules=[rule], logarithmic=True)]


def _loss_charts(students: Sequence[Row]) -> list[str]:
    """Each run's losses in a chart of its own, since methods do not share a scale."""
    charts = []
    for row in students:
        series = [
            Series(name, [tuple(point) for point in points], place)
            for place, (name, points) in enumerate(row.get("losses", {}).items())
        ]
        if series:
            axes = {"x_label": "seconds of training", "y_label": "loss"}
            charts.append(line_chart(series, title=f"Losses of {row['name']}", **axes))
    return charts


def _about_curves(students: Sequence[Row]) -> str:
    counts = {samples for row in students for _, _, samples in row.get("distances", ())}
    said = "The last mark of each run is the table's value."
    if counts:
        said += f" The marks before it were measured in training, on {' and '.join(f'{n:,}' for n in counts)} samples."
    else:
        said += " Nothing was measured in training: evaluate.every=100, for example, would show the way there."
    return f"{said} Losses have the scale of their method, and are not comparable between methods."


def _recipe(row: Row) -> str:
    return folded(f"{row['name']}: {row['source']}", row["recipe"])


def _made(results: Mapping[str, Any]) -> list[str]:
    made, ruler = results["made"], results["ruler"]
    guidance = "" if results["teacher"]["guidance"] == 1 else f", guidance {results['teacher']['guidance']:g}"
    solver = results["rows"][0]
    seeds = ", ".join(f"{row['name']} {row['seed']}" for row in results["rows"] if row["kind"] == "student")
    pairs = [
        (
            "teacher",
            f"{results['teacher']['path']}{guidance}, sampled in {solver['name'].split(', ')[1]} of {solver['solver']}",
        ),
        ("feature extractor", f"{ruler['extractor']}, SHA-256 {ruler['checksum'][:16]}"),
        ("real images", f"{ruler['data']}: {ruler['num_reference']:,}, and the moments of {ruler['num_moments']:,}"),
        ("samples", f"{ruler['samples']:,} a row, noises of seed {ruler['seed']}"),
        ("seeds of training", seeds),
        ("hardware", f"{made['hardware']}; {made['threads']} threads of torch"),
        ("versions", f"diffdistill {made['diffdistill']}, PyTorch {made['torch']}, Python {made['python']}"),
        ("commit", made["commit"] or "not known"),
    ]
    return [f'<pre class="command">{escape(made["command"] or "diffdistill.comparing.compare")}</pre>', facts(pairs)]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _count(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"
