"""The command line: train | compare | sample | couple | evaluate | export | check | join | cluster | methods. The only
file that reads the environment (an experiment may, by ${oc.env:NAME,default}).

Exit status: 0 fine; 2 a mistake of the user, told in one line; 1 a run that had to stop; 130 and 143 after Ctrl-C and
SIGTERM.
"""

import argparse
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    options = parse(arguments)
    return status_of(lambda: options.act(options), debug=options.debug)


def status_of(act: Callable[[], None], *, debug: bool = False) -> int:
    """Do it; the exit status, after one line on stderr about what went wrong.

    Args:
        debug: raise a user's mistake instead, for its traceback.
    """
    from diffdistill.api import Stopped
    from diffdistill.comparing import Failed
    from diffdistill.memory import OutOfMemory
    from diffdistill.trainer import NonFinite

    try:
        act()
        return 0
    except Stopped as stop:
        return _tell(stop, 128 + stop.number)
    except KeyboardInterrupt:
        return _tell("stopped at once; what was saved before is whole, and the same command goes on from it", 130)
    except (NonFinite, OutOfMemory, Failed) as error:
        return _tell(error, 1)
    except (ValueError, OSError) as error:
        if debug:
            raise
        return _tell(error, 2)


def _tell(message: object, status: int) -> int:
    rank = os.environ.get("RANK", "0")  # set by torchrun
    where = "" if rank == "0" else f" (process {rank})"
    print(f"diffdistill{where}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of one command; key=value may stand before or behind its other options."""
    commands = parser()
    options, rest = commands.parse_known_args(arguments)
    if rest and (any("=" not in word or word.startswith("-") for word in rest) or "overrides" not in options):
        commands.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.line = shlex.join(["diffdistill", *(sys.argv[1:] if arguments is None else arguments)])
    return options


def _seconds(text: str) -> float:
    """The seconds in 90s, 10m or 2h."""
    found = re.fullmatch(r"(\d+\.?\d*)([smh])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write e.g. 90s, 10m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _budget(options: argparse.Namespace):
    """The budget that the options state, or None."""
    from diffdistill.trainer import Budget

    given = {"seconds": options.budget, "steps": options.steps}
    given = {name: value for name, value in given.items() if value is not None}
    return Budget(**given) if given else None


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(prog="diffdistill", description="Distill a diffusion or flow model into one to four steps.")
    top.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, act, summary: str, *examples: str) -> argparse.ArgumentParser:
        lines = "example:\n" + textwrap.indent("\n".join(examples), "  ")
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=lines,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(act=act)
        return made

    train = command(
        "train",
        _train,
        "Run an experiment, or go on with it where it was stopped.",
        "diffdistill train configs/fashion/dmd2.yaml train.steps=500 output=runs/short",
        "torchrun --nproc-per-node 2 -m diffdistill train configs/fashion/dmd2.yaml",
        "torchrun --nproc-per-node 2 -m diffdistill train configs/fashion/multi_student.yaml --spread",
    )
    train.add_argument("--spread", action="store_true", help="each student of multi_student on processes of its own")
    check = command(
        "check",
        _check,
        "Validate an experiment and plan its memory, without reading weights.",
        "diffdistill check configs/fashion/dmd2.yaml --run",
    )
    check.add_argument("--run", action="store_true", help="also build everything, and try every update of a few steps")
    compare = command(
        "compare",
        _compare,
        "Train recipes under one clock, or take finished runs; measure all alike; write one page of HTML.",
        "diffdistill compare configs/fashion/dmd2.yaml configs/fashion/sid.yaml --budget 10m --out runs/compare "
        "--features checkpoints/fashion-features",
        "diffdistill compare runs/dmd2 runs/sid --out runs/compare data.name=fashion_mnist "
        "--features checkpoints/fashion-features",
    )
    compare.add_argument(
        "sources", nargs="+", metavar="CONFIG|RUN", help="YAML files, which are trained, and folders of runs"
    )
    compare.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="index.html, results.json, and the runs"
    )
    for part in (train, compare):
        limit = part.add_mutually_exclusive_group()
        limit.add_argument("--budget", type=_seconds, metavar="TIME", help="of training alone, e.g. 10m, then leave")
        limit.add_argument("--steps", type=int, help="leave after so many updates; train.steps stays as it is")
    compare.add_argument("--features", default="", metavar="FOLDER", help="the feature extractor's")
    compare.add_argument("--samples", type=int, default=2000, help="measured per row (%(default)s)")
    compare.add_argument("--seed", type=int, default=1000, help="of the samples' noises (%(default)s)")
    compare.add_argument("--teacher-steps", type=int, default=0, help="of the teacher's row; its best if it is known")
    compare.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="to measure on")
    compare.set_defaults(overrides=[])
    for part in (train, check):
        part.add_argument("config", type=Path, help="a YAML file; configs/ holds examples")
        part.add_argument("overrides", nargs="*", metavar="key=value", help="replaces what the file says")

    sample = command(
        "sample",
        _sample,
        "Write a picture of samples.",
        "diffdistill sample runs/fashion-dmd2 --out samples.png --count 40",
        "diffdistill sample checkpoints/fashion-edm --out teacher.png --teacher-steps 18",
    )
    sample.add_argument("--out", type=Path, required=True, metavar="PNG")
    sample.add_argument("--count", type=int, default=40)
    sample.add_argument("--columns", type=int, default=10)
    sample.add_argument("--scale", type=int, default=2, help="pixels of the picture per pixel of a sample")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--label", type=int, help="one class for all; otherwise they take turns")
    couple = command(
        "couple",
        _couple,
        "Write pairs of a noise and where a teacher or a run takes it, for data.pairs; interrupted, it goes on.",
        "diffdistill couple checkpoints/fashion-edm --out runs/fashion-pairs --count 8000",
        "torchrun --nproc-per-node 2 -m diffdistill couple checkpoints/fashion-edm --out runs/pairs --count 100000",
        "diffdistill couple checkpoints/fashion-edm --out runs/inverted --count 4096 data.name=fashion_mnist",
    )
    couple.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    couple.add_argument("--count", type=int, required=True, help="pairs; their classes take turns")
    couple.add_argument("--steps", type=int, default=0, help="of the ODE; otherwise 18, or a run's own grid")
    couple.add_argument("--solver", default="heun", choices=("heun", "euler", "ddim"))
    couple.add_argument("--guidance", type=float, default=1.0, help="w of u + w (c - u); 1 is none")
    couple.add_argument("--start", type=float, default=0.0, help="time of the noise; otherwise the teacher's last")
    couple.add_argument("--seed", type=int, default=0)
    couple.add_argument("--batch", type=int, default=64, help="pairs made at once, which does not change them")
    couple.add_argument("--shard", type=int, default=1024, help="pairs of one file")
    evaluate = command(
        "evaluate",
        _evaluate,
        "Measure samples against real images: of one source, or of many side by side, quality against cost.",
        "diffdistill evaluate runs/fashion-dmd2 evaluate.features=checkpoints/fashion-features",
        "diffdistill evaluate runs/a runs/b --grid 80 --grid 80,0.982 --teacher-steps 1,4,18 --out table.json",
        "diffdistill evaluate checkpoints/fashion-edm data.name=fashion_mnist "
        "evaluate.features=checkpoints/fashion-features evaluate.cache=cache",
    )
    evaluate.add_argument("--out", type=Path, metavar="JSON", help="also write the numbers there")
    export = command(
        "export",
        _export,
        "Write a run for others to read: a stock diffusers pipeline, or a teacher for the next run.",
        "diffdistill export runs/fashion-dmd2 --out my-pipeline",
        "diffdistill export runs/fashion-teacher --as denoiser --weights power --half --out checkpoints/fashion-edm",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    export.add_argument("--as", dest="kind", choices=("pipeline", "denoiser"), default="pipeline")
    export.add_argument("--replace", action="store_true", help="put it in the place of an earlier export")
    export.add_argument("--half", action="store_true", help="weights in float16")
    export.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest difference of the pipeline from the generator (%(default)s)",
    )
    evaluate.add_argument(
        "sources", nargs="+", metavar="RUN|FOLDER", help="output of train, a denoiser's folder, or a stock pipeline's"
    )
    evaluate.add_argument("--table", action="store_true", help="a row for each, even of one source; its teacher's too")
    evaluate.add_argument("--cost", action="store_true", help="time one source as well; tables always do")
    evaluate.add_argument("--no-cost", action="store_true", help="a table without times")
    evaluate.add_argument(
        "--against-teacher",
        type=int,
        default=0,
        metavar="STEPS",
        help="compare a run with its teacher in so many steps",
    )
    for part in (sample, couple, export):
        part.add_argument("source", type=Path, metavar="RUN|FOLDER", help="output of train, or a denoiser's folder")
    for part in (sample, couple, evaluate, export):
        part.add_argument(
            "--weights", default="", metavar="raw|AVERAGE", help="of a run; its first average, if it has one"
        )
    evaluate.set_defaults(overrides=[])
    couple.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of data: pairs of these images, taken back to noise"
    )
    for part in (sample, evaluate, export):
        part.add_argument(
            "--grid",
            type=_times,
            **({"action": "append", "default": []} if part is evaluate else {"default": ()}),
            metavar="T,T",
            help="of a run: other times than its own, e.g. 80,0.982"
            + ("; given again, a row for each" if part is evaluate else ""),
        )
        part.add_argument("--guidance", type=float, metavar="W", help="of a run that is told its scale: another one")
        part.add_argument("--at", default="", metavar="best|STEP", help="of a run: another checkpoint than its newest")
    sample.add_argument("--teacher-steps", type=int, default=0, help="the teacher in so many steps, not the student")
    evaluate.add_argument(
        "--teacher-steps", type=_counts, default=[], metavar="N,N", help="the teacher in so many steps; one: it alone"
    )
    for part in (sample, couple, evaluate):
        part.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))

    prepare = command(
        "prepare",
        _prepare,
        "Put prompts through a pipeline's own text encoders, once, for teacher.prompts; interrupted, it goes on.",
        "diffdistill prepare stable-diffusion-v1-5 --prompts prompts.txt --out runs/prompts",
        "diffdistill prepare flux --prompts prompts.txt --out runs/prompts height=512 width=512",
    )
    prepare.add_argument("pipeline", help="a stock pipeline's folder, or its name on the hub")
    prepare.add_argument("--prompts", type=Path, default=(), metavar="FILE", help="a prompt on each line")
    prepare.add_argument("--images", type=Path, metavar="FOLDER", help="pictures with captions, for data.name=prepared")
    prepare.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    prepare.add_argument("--negative", default="", metavar="TEXT", help="the negative prompt, for guidance")
    prepare.add_argument("--batch", type=int, default=8, help="prompts encoded at once (%(default)s)")
    prepare.add_argument("--shard", type=int, default=256, help="prompts of one file (%(default)s)")
    prepare.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the pipeline")
    prepare.add_argument(
        "overrides", nargs="*", metavar="key=value", help="arguments of the pipeline's call, e.g. height and width"
    )
    certify = command(
        "check-teacher",
        _check_teacher,
        "Certify that a pipeline's network, wrapped, samples as the pipeline does, with guidance and without.",
        "diffdistill check-teacher stable-diffusion-v1-5 --prompts runs/prompts --guidance 7.5",
    )
    certify.add_argument("pipeline", help="a stock pipeline's folder, or hub:owner/name")
    certify.add_argument("--prompts", type=Path, required=True, metavar="FOLDER", help="made of it by prepare")
    certify.add_argument("--steps", type=int, default=4, help="of both (%(default)s)")
    certify.add_argument("--guidance", type=float, default=3.0, help="tried beside none (%(default)s)")
    for part in (prepare, certify):
        part.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))

    report = command(
        "report",
        _report,
        "Write one page of HTML about runs: curves, samples over time, nearest training images, costs, recipes.",
        "diffdistill report runs/fashion-dmd2 --out report.html --features checkpoints/fashion-features",
        "diffdistill report runs/a runs/b --out both.html --table table.json data.name=fashion_mnist",
    )
    report.add_argument("sources", nargs="+", metavar="RUN", help="folders of runs, finished or training")
    report.add_argument("--out", type=Path, required=True, metavar="HTML")
    report.add_argument(
        "--table", default="", metavar="JSON", help="of diffdistill evaluate --out: quality against cost"
    )
    report.add_argument("--features", default="", help="the extractor, if not the run's own")
    report.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    report.set_defaults(overrides=[])

    join = command(
        "join",
        _join,
        "Make one run of the runs of each student alone (method.only).",
        "diffdistill join runs/student-0 runs/student-1 --out runs/students",
    )
    join.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one for each student, all at one step")
    cluster = command(
        "cluster",
        _cluster,
        "Divide embeddings among students by k-means: the centroids of method.shares.",
        "diffdistill cluster class-embeddings.npz --students 4 --out centroids.safetensors",
    )
    cluster.add_argument("embeddings", type=Path, metavar="FILE", help=".safetensors or .npz with the array embeddings")
    cluster.add_argument("--students", type=int, required=True)
    cluster.add_argument("--seed", type=int, default=0)
    for part in (join, cluster):
        part.add_argument("--out", type=Path, required=True)
    listing = command(
        "methods",
        _methods,
        "List the methods: what each needs and costs, or the settings and an example of one.",
        "diffdistill methods",
        "diffdistill methods dmd2",
    )
    listing.add_argument("name", nargs="?", metavar="METHOD", default="", help="one of them, in detail")
    return top


def _train(options: argparse.Namespace) -> None:
    from diffdistill.api import distill, distill_spread
    from diffdistill.trainer import UNLIMITED

    budget = _budget(options) or UNLIMITED
    run = partial(distill_spread, launcher=os.environ) if options.spread else distill
    run(options.config, options.overrides, budget=budget, wandb_mode=os.environ.get("WANDB_MODE", "offline"))


def _compare(options: argparse.Namespace) -> None:
    from diffdistill.comparing import Measure, compare

    overrides = [word for word in options.sources if "=" in word]
    compare(
        [Path(word) for word in options.sources if "=" not in word],
        [*overrides, *options.overrides],
        output=options.out,
        budget=_budget(options),
        measure=Measure(
            features=options.features,
            samples=options.samples,
            seed=options.seed,
            teacher_steps=options.teacher_steps,
            device=options.device,
        ),
        command=options.line,
    )


def _check(options: argparse.Namespace) -> None:
    from diffdistill.api import check

    print(check(options.config, options.overrides, run_steps=options.run))


def _sample(options: argparse.Namespace) -> None:
    from diffdistill.api import sample
    from diffdistill.hooks import write_grid

    samples, _ = sample(
        options.source,
        options.count,
        seed=options.seed,
        labels=None if options.label is None else [options.label] * options.count,
        **_steps(options),
        teacher_steps=options.teacher_steps,
        device=options.device,
    )
    write_grid(samples, options.out, columns=options.columns, scale=options.scale)
    print(f"{len(samples)} samples in {options.out}")


def _couple(options: argparse.Namespace) -> None:
    from diffdistill.api import couple
    from diffdistill.recipe import sections

    names = ("count", "steps", "solver", "guidance", "start", "seed", "batch", "shard", "weights", "device")
    data = sections(options.overrides, ("data",))["data"]
    given = {name: getattr(options, name) for name in names}
    folder = couple(options.source, options.out, data=data or None, **given)
    print(f"{options.count} pairs in {folder}")


def _prepare(options: argparse.Namespace) -> None:
    from diffdistill.api import prepare
    from diffdistill.recipe import sections

    call = sections([f"call.{word}" for word in options.overrides], ("call",))["call"]
    names = ("prompts", "images", "negative", "batch", "shard", "precision", "device")
    given = {name: getattr(options, name) for name in names}
    print(f"prompts in {prepare(options.pipeline, options.out, options=call, **given)}")


def _check_teacher(options: argparse.Namespace) -> None:
    from diffdistill.api import check_teacher

    found = check_teacher(
        options.pipeline, options.prompts, steps=options.steps, guidance=options.guidance, device=options.device
    )
    print(found)
    if not found.holds:
        raise ValueError(f"{options.pipeline} is not wrapped as it samples; prepare its prompts again")


def _evaluate(options: argparse.Namespace) -> None:
    from diffdistill import api
    from diffdistill.recipe import sections

    words = [*(word for word in options.sources if "=" in word), *options.overrides]
    sources = [Path(word) for word in options.sources if "=" not in word]
    given = sections(words, ("data", "evaluate", "call"))
    shared = {
        "weights": options.weights,
        "guidance": options.guidance,
        "at": options.at,
        "data": given["data"] or None,
        "settings": given["evaluate"],
        "call": given["call"] or None,
        "device": options.device,
    }
    if options.table or max(len(sources), len(options.grid), len(options.teacher_steps)) > 1:
        if options.against_teacher:
            raise ValueError("--against-teacher is for one source; leave it out of a table")
        found: Any = api.evaluate_all(
            sources, grids=options.grid, teacher_steps=options.teacher_steps, cost=not options.no_cost, **shared
        )
        shown = _table(found)
    else:
        found = api.evaluate(
            sources[0],
            grid=options.grid[0] if options.grid else (),
            teacher_steps=options.teacher_steps[0] if options.teacher_steps else 0,
            cost=options.cost,
            against_teacher=options.against_teacher,
            **shared,
        )
        shown = "\n".join(_lines(found))
    if os.environ.get("RANK", "0") != "0":  # the others of torchrun found the same
        return
    print(shown)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _lines(found: dict[str, Any]) -> list[str]:
    """Names and numbers one below the other; what belongs together stands under its name."""
    simple = {name: value for name, value in found.items() if not isinstance(value, dict)}
    width = max((len(name) for name in simple), default=0)
    lines = [
        f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in simple.items()
    ]
    for name, inner in found.items():
        if isinstance(inner, dict) and all(isinstance(value, dict) for value in inner.values()):
            lines += [
                f"{name} {key}: " + "  ".join(f"{n} {v:.3f}" for n, v in row.items()) for key, row in inner.items()
            ]
        elif isinstance(inner, dict):
            lines += [f"{name}: {line}" for line in _lines(inner)]
    return lines


def _table(rows: list[dict[str, Any]]) -> str:
    from diffdistill.evaluation.front import table

    first = rows[0]
    return (
        f"{table(rows)}\n\n* none is better at as few evaluations. {first['extractor']}, {first['num_samples']:,} "
        f"samples; FD against the moments of {first['num_moments']:,} real images."
    )


def _report(options: argparse.Namespace) -> None:
    from diffdistill.recipe import sections
    from diffdistill.reporting import report

    words = [*(word for word in options.sources if "=" in word), *options.overrides]
    page = report(
        [word for word in options.sources if "=" not in word],
        options.out,
        table=options.table,
        data=sections(words, ("data",))["data"] or None,
        features=options.features,
        command=options.line,
        device=options.device,
    )
    print(page)


def _export(options: argparse.Namespace) -> None:
    from diffdistill import api

    shared = {"half": options.half, "replace": options.replace}
    if options.kind == "denoiser":
        print(api.export_denoiser(options.source, options.out, weights=options.weights, **shared))
    else:
        print(api.export(options.source, options.out, tolerance=options.tolerance, **_steps(options), **shared))


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    """How a run is sampled."""
    return {"weights": options.weights, "grid": options.grid, "guidance": options.guidance, "at": options.at}


def _times(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(time) for time in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between, e.g. 80,0.982") from error


def _counts(text: str) -> list[int]:
    return [int(count) for count in text.split(",")]


def _join(options: argparse.Namespace) -> None:
    from diffdistill.api import join

    print(join(options.runs, options.out))


def _cluster(options: argparse.Namespace) -> None:
    from diffdistill.kmeans import fit, nearest, read_embeddings, write_centroids

    points = read_embeddings(options.embeddings)
    centroids = fit(points, options.students, seed=options.seed)
    write_centroids(centroids, options.out)
    sizes = nearest(points, centroids).bincount(minlength=options.students).tolist()
    print(f"{options.out}: {len(centroids)} centroids of {len(points)} embeddings, with {sizes} each")


def _methods(options: argparse.Namespace) -> None:
    from diffdistill import catalogue
    from diffdistill.recipe import known_method

    print(catalogue.details(known_method(options.name, "METHOD")) if options.name else catalogue.overview())


if __name__ == "__main__":
    sys.exit(main())
