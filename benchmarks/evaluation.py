"""What an evaluation takes beyond sampling and features, as a ratio of two times in one run.

python benchmarks/evaluation.py runs/fashion-rcm --features checkpoints/fashion-features --samples 10000
python benchmarks/evaluation.py checkpoints/fashion-edm --teacher-steps 4 --features checkpoints/fashion-features
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import measure
import torch

from diffdistill import api
from diffdistill.config import DataConfig, EvaluateConfig
from diffdistill.evaluation.metrics import evaluate_features, quantise
from diffdistill.evaluation.sampling import sample_images
from diffdistill.evaluation.stream import look_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--features", required=True)
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--teacher-steps", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    source = api.opened(options.run, teacher_steps=options.teacher_steps, device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        settings = EvaluateConfig(features=options.features, samples=options.samples, batch=options.batch)
        extractor, reference = api.yardstick(
            settings, DataConfig(options.data), cache=Path(folder), device=options.device
        )
        assert reference.nearest is not None and reference.mean_kernel is not None  # once for all evaluations of a run
        sample_images(source, options.batch, seed=0, batch=options.batch)  # warms up
        seconds = {}
        start = time.perf_counter()
        images, labels = sample_images(source, options.samples, seed=0, batch=options.batch)
        seconds["sampling"] = time.perf_counter() - start
        start = time.perf_counter()
        for chunk in images.split(options.batch):
            extractor(quantise(chunk))
        seconds["features"] = time.perf_counter() - start
        del images, labels
        start = time.perf_counter()
        seen = look_at(source, extractor, options.samples, seed=0, batch=options.batch, cache=Path(folder))
        seconds["sampling, features and parts on disk"] = time.perf_counter() - start
        for name, errors in (("metrics", False), ("metrics with errors", True)):
            start = time.perf_counter()
            evaluate_features(seen.features, seen.logits, seen.labels, reference, extractor, errors=errors)
            seconds[name] = time.perf_counter() - start
    least = seconds["sampling"] + seconds["features"]
    whole = seconds["sampling, features and parts on disk"]
    found = {
        "command": f"python benchmarks/evaluation.py {options.run.name} --samples {options.samples} "
        f"--batch {options.batch} --teacher-steps {options.teacher_steps}",
        "commit": measure.commit(),
        "samples": options.samples,
        "extractor": extractor.name,
        "num_reference": len(reference.features),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio of a training's evaluation": round((whole + seconds["metrics"]) / least, 4),
        "ratio of the command": round((whole + seconds["metrics with errors"]) / least, 4),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
