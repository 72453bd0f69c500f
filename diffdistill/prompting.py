"""Pipelines that take prompts: prepared for training, and certified; what the commands call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffdistill import networks, run
from diffdistill.config import ConfigError, DenoiserConfig, TeacherConfig
from diffdistill.exporting.prompted import write_prompted
from diffdistill.exporting.write import Report
from diffdistill.generator import Generator
from diffdistill.preparing import files
from diffdistill.preparing.captions import read_captions
from diffdistill.preparing.certify import Certificate, certify
from diffdistill.preparing.hearing import Listener
from diffdistill.preparing.opening import open_pipeline
from diffdistill.preparing.prepare import prepare as prepare_rows
from diffdistill.process import Process
from diffdistill.recipe import typed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def process_of(meaning: Mapping[str, Any]) -> Process:
    return networks.process(typed(DenoiserConfig, dict(meaning), "the scheduler").process)


def read_texts(file: str | Path) -> list[str]:
    """The prompts of a text file, one on each line.

    Raises:
        ConfigError: there is no such file, or a line is empty.
    """
    if not Path(file).is_file():
        raise ConfigError(f"there is no file of prompts {file}; give a text file with one on each line")
    texts = Path(file).read_text().splitlines()
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ConfigError(f"{file}, line {number} is empty; delete it, or give the negative prompt by --negative")
    return texts


def prepare(
    pipeline: str | Path,
    out: str | Path,
    *,
    prompts: Sequence[str] | str | Path = (),
    images: str | Path | None = None,
    negative: str = "",
    options: Mapping[str, Any] | None = None,
    batch: int = 8,
    shard: int = 256,
    precision: str = "fp32",
    device: str = "cpu",
) -> Path:
    """Prompts through a pipeline's own text encoders, once, into a folder for teacher.prompts; interrupted, it goes on.

    Args:
        pipeline: a stock pipeline's folder, or its name on the hub.
        prompts: a file with one on each line, or the prompts themselves.
        images: a folder of pictures with captions, which are prompts too; for methods that read real images.
        negative: the negative prompt, for guidance.
        options: arguments of every call of the pipeline, e.g. height and width; they fix the shape of a sample.
        batch: prompts encoded at once.
        shard: prompts of one file.
    Raises:
        ValueError: no such pipeline, a prompt that does not fit, or a call that is not understood.
    """
    texts = read_texts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    pictures = read_captions(Path(images)) if images else []
    listener = Listener(open_pipeline(pipeline, dtype=DTYPES[precision], device=device), dict(options or {}), negative)
    options = {"process_of": process_of, "batch": batch, "shard": shard, "pictures": pictures}
    prepare_rows(listener, texts, Path(out), **options, progress=True)
    return Path(out)


def check_teacher(
    pipeline: str | Path, prompts: str | Path, *, steps: int = 4, guidance: float = 3.0, device: str = "cpu"
) -> Certificate:
    """Whether our wrapper of a pipeline's network samples as the pipeline does, guided and not.

    Args:
        pipeline: the stock pipeline's folder, or hub:owner/name.
        prompts: the folder that `prepare` made of it.
        steps: of both.
        guidance: the scale that is tried beside none.
    """
    config = TeacherConfig(str(pipeline), prompts=str(prompts))
    model, _ = networks.teacher_denoiser(config, device=device)
    said = files.read_index(Path(prompts))
    opened = open_pipeline(str(pipeline).removeprefix(networks.HUB), device=device)
    listener, made = Listener(opened, said["options"], said["negative"]), files.read_prompts(Path(prompts))
    return certify(listener, model, made, steps=steps, guidance=guidance if made.null is not None else 1.0)


def export(
    run_folder: Path, generator: Generator, folder: Path, *, half: bool, tolerance: float, replace: bool
) -> Report:
    """Write a run's generator that is told prompts into a copy of its teacher's pipeline.

    Raises:
        ConfigError: the run has no teacher, whose pipeline would hold what is beside the network.
    """
    config = run.read_config(run_folder)
    if config.teacher is None:
        raise ConfigError(
            f"{run_folder} has no teacher, whose pipeline has the text encoders; use --as denoiser, or distill it"
        )
    options = files.read_index(Path(config.teacher.prompts))["options"]
    return write_prompted(
        generator,
        folder,
        source=config.teacher.path.removeprefix(networks.HUB),
        options=options,
        dtype=torch.float16 if half else torch.float32,
        tolerance=tolerance,
        replace=replace,
    )
