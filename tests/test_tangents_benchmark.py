"""The benchmark of tangents runs, whole, at small sizes: what it says of memory holds, of speed is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_a_tangent_takes_less_than_two_forward_passes_and_a_long_step_less_than_math_attention(tmp_path):
    out = tmp_path / "record.json"
    sizes = ["--size", "128", "--layers", "1", "--heads", "2", "--batch", "16", "--repeats", "1"]
    command = [sys.executable, "benchmarks/tangents.py", "--device", "cpu", "--out", str(out), *sizes]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(out.read_text())
    unet, dit = record["passes"]
    # counted by the allocator, the same in every run; of a transformer, whose peak is in the middle of its perceptrons,
    # both halves are twice the forward pass, and less with the weights alone
    assert unet["peak_over_forward"] < 1.9 and dit["peak_over_forward"] < 2.1
    assert max(row["with_weights_over_forward"] for row in (unet, dit)) < 2
    free, ours, math = record["long"]
    assert ours["attention"] == "flash_jvp" and ours["mib"] < ours["limit_mib"] < 2 * free["mib"]
    assert math["attention"] == "math" and "memory" in math["ended"]
