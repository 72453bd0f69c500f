"""Scores of a teacher by number of steps and solver, and which is best: what `make demo` holds the student against.

python benchmarks/teacher_steps.py checkpoints/fashion-edm --out checkpoints/fashion-edm/scores.json
"""

import argparse
import json
from pathlib import Path

import torch

from diffdistill import api
from diffdistill.demo import SAMPLE_SEED, Judge
from diffdistill.evaluation.sampling import Solved

SWEEP = ((1, "euler"), (9, "heun"), (12, "heun"), (18, "heun"), (24, "heun"), (18, "euler"), (35, "euler"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a denoiser's folder")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="for features of real images")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    options = parser.parse_args()
    teacher, judge = api.load(options.teacher), Judge.shipped(options.cache)
    scores = []
    for steps, solver in SWEEP:
        row = judge.measure(f"{steps} steps of {solver}", Solved(teacher, steps, solver), options.samples)
        evaluations = 2 * steps - 1 if solver == "heun" else steps
        scores.append({"steps": steps, "solver": solver, "evaluations": evaluations, **row.metrics})
        print(f"{steps:>3} {solver:<6}{evaluations:>4} evaluations  FD {row.metrics['frechet_distance']:.4f}")
    best = min(scores, key=lambda score: score["frechet_distance"])
    found = {
        "best": {"steps": best["steps"], "solver": best["solver"]},
        "seed": SAMPLE_SEED,
        "torch": torch.__version__,
        "scores": scores,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
