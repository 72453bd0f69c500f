"""The benchmark of attention runs, in full, at tiny sizes: what it says of speed is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(tmp_path, *arguments: str) -> dict:
    out = tmp_path / "record.json"
    command = [sys.executable, "benchmarks/attention.py", "--device", "cpu", "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "kernels"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_on_a_cpu_the_chunked_path_needs_an_eighth_of_the_memory_of_math_attention(tmp_path):
    record = run(tmp_path, "--length", "4096", "--repeats", "1")
    assert {"command", "commit", "hardware", "versions", "seed", "shape"} <= record.keys()
    assert all(row["median_seconds"] > 0 for row in record["cpu"])
    math = record["ratios"]["math func.jvp"]
    assert math["peak_mib"] >= 8  # counted, not sampled: the same in every run
    assert math["resident_mib"] >= 8  # what the operating system says


def test_the_code_for_gpus_checks_and_times_every_route_tile_and_backward(tmp_path):
    record = run(tmp_path, "--kernels", "--workers", "2")
    assert record["correctness"][0]["passed"] > 0 and not record["correctness"][0]["failed"]
    left_out = {row["route"] for row in record["routes"] if "left_out" in row}
    assert left_out <= {"cudnn forward", "jvp_flash_attention"}
    for row in record["routes"]:
        if row["route"] in ("triton", "split") and row["shape"] == "Wan 1.3B cross":
            assert row["flop_credited"] == "8 B H M N d"
    assert {(row["kernel"], "left_out" in row) for row in record["tiles"]} == {
        (kernel, False) for kernel in ("fused", "tangent", "queries", "keys")
    }
    assert {row["route"] for row in record["backward"] if row["seconds"] > 0} == {"triton", "library"}
