"""`diffdistill prepare`: prompts through a pipeline's own text encoders, once, into files that training reads."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffdistill.denoiser import CLOCKS
from diffdistill.preparing import files
from diffdistill.preparing.captions import read_pictures
from diffdistill.preparing.hearing import STEPS, Listener, Unheard, branches, call_of, rows_in
from diffdistill.preparing.opening import meaning_of, network_of, times_of
from diffdistill.preparing.pictures import Encoder, picture_size
from diffdistill.process import Process
from diffdistill.prompts import Call

PROBE = ("a cat", "a house by the sea", "a tree")
SCALE = 2.0  # of the guided calls that the negative prompt is heard in; any that is not 1


def heard(listener: Listener, process_of: Callable[[Mapping[str, Any]], Process]) -> tuple[Call, dict, dict, tuple]:
    """How the pipeline calls its network: the call, the shared tensors, the meaning, and the shape of a sample.

    Raises:
        Unheard: it does so in a way that is not understood.
    """
    two = listener.unguided(PROBE[:2], steps=STEPS, first_step_only=False)
    said = meaning_of(listener.pipeline, mu=two.mu)
    times = torch.tensor(times_of(listener.pipeline, said), dtype=torch.float64)
    clocks = CLOCKS[said["clock"]](times, process_of(said)).tolist()
    three = listener.unguided(PROBE, steps=STEPS, first_step_only=False)
    call, shared = call_of(two, three, clocks)
    return call, shared, said, tuple(two.steps[0].before.shape[1:])


def prepare(
    listener: Listener,
    texts: Sequence[str],
    out: Path,
    *,
    process_of: Callable[[Mapping[str, Any]], Process],
    batch: int = 8,
    shard: int = 256,
    pictures: Sequence[tuple[Path, str]] = (),
    progress: bool = False,
) -> None:
    """Write the rows of the prompts, and of the negative prompt, into a folder; interrupted, it goes on.

    Args:
        texts: prompts; the same text is made once.
        batch: prompts encoded at once.
        shard: prompts, or pictures, of one file.
        pictures: files and their captions, which are prompts too; they go through the pipeline's autoencoder.
    Raises:
        ValueError: a prompt is empty or too long, or the folder was begun with other prompts or another pipeline.
    """
    wanted = list(dict.fromkeys([*texts, *(caption for _, caption in pictures)]))
    refuse_unfit(listener.pipeline, wanted)
    call, shared, said, shape = heard(listener, process_of)
    about = {
        "pipeline": type(listener.pipeline).__name__,
        "network": type(network_of(listener.pipeline)).__name__,
        "options": dict(listener.options),
        "negative": listener.negative,
        "shape": shape,
        "meaning": said,
        "call": files.call_in_words(call),
        "texts": wanted,
        "images": [file.name for file, _ in pictures],
    }
    _begin(out, about, shard)
    refuse_alike(listener, call, wanted)
    made = {files.SHARED_FILE: files.write_tensors(out / files.SHARED_FILE, shared)}
    null = branches(listener, call, wanted[:2] if len(wanted) > 1 else wanted, SCALE)[1]
    if null is not None:
        null = {name: rows[:1] for name, rows in null.items()}
        made[files.NULL_FILE] = files.write_tensors(out / files.NULL_FILE, null)
    bar = tqdm(total=len(wanted), desc="prompts", unit="prompt", disable=not progress, dynamic_ncols=True)
    with bar:
        for number, first in enumerate(range(0, len(wanted), shard)):
            part, file = wanted[first : first + shard], out / files.rows_file(number)
            if not file.is_file():
                files.write_tensors(file, _rows(listener, call, part, batch, bar.update))
            else:
                bar.update(len(part))
            made[file.name] = files.checksum(file)
    if pictures:
        made |= _write_latents(listener, shape, pictures, wanted, out, batch=batch, shard=shard, progress=progress)
    files.write_index(out, {**about, "files": made})


def _write_latents(
    listener: Listener,
    shape: tuple[int, ...],
    pictures: Sequence[tuple[Path, str]],
    texts: Sequence[str],
    out: Path,
    *,
    batch: int,
    shard: int,
    progress: bool,
) -> dict[str, str]:
    """The files of the pictures' latents and labels, and the checksum of each."""
    encoder, made = Encoder.of(listener, shape), {}
    size, labels = picture_size(listener), {text: label for label, text in enumerate(texts)}
    with tqdm(total=len(pictures), desc="pictures", unit="image", disable=not progress, dynamic_ncols=True) as bar:
        for number, first in enumerate(range(0, len(pictures), shard)):
            part, file = pictures[first : first + shard], out / files.latents_file(number)
            if not file.is_file():
                groups = [[path for path, _ in part[place : place + batch]] for place in range(0, len(part), batch)]
                x0 = torch.cat([encoder(read_pictures(group, size)) for group in groups])
                label = torch.tensor([labels[caption] for _, caption in part])
                files.write_tensors(file, {"x0": x0, "label": label})
            made[file.name] = files.checksum(file)
            bar.update(len(part))
    return made


def refuse_unfit(pipeline: Any, texts: Sequence[str]) -> None:
    """Refuses prompts that are empty, or longer than every text encoder of the pipeline reads.

    Raises:
        ValueError: naming the line.
    """
    if not texts:
        raise ValueError("there are no prompts; give a file with one on each line")
    tokenizers = [
        part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is not None
    ]
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ValueError(f"prompt {number} is empty; delete its line, or give the negative prompt by --negative")
        lengths = [(len(tokenizer(text).input_ids), tokenizer.model_max_length) for tokenizer in tokenizers]
        if lengths and all(length > limit for length, limit in lengths):
            length, limit = max(lengths, key=lambda pair: pair[1])
            raise ValueError(
                f"prompt {number} has {length} tokens, and the text encoder reads {limit}: {text[:60]!r}...; shorten it"
            )


def refuse_alike(listener: Listener, call: Call, texts: Sequence[str]) -> None:
    """Refuses a call in which prompts make no difference, because they stand behind all that is read.

    Raises:
        ValueError: naming the first two prompts.
    """
    if len(texts) < 2:
        return
    (heard,) = listener.unguided(texts[:2]).calls
    if all(torch.equal(rows[0], rows[1]) for rows in rows_in(call, heard.arguments).values()):
        raise ValueError(
            f"the pipeline tells its network the same of {texts[0][:40]!r} and of {texts[1][:40]!r}; let it read "
            "more of them, e.g. by max_sequence_length"
        )


def _begin(out: Path, about: Mapping[str, Any], shard: int) -> None:
    """Makes the folder, or makes sure that it was begun for the same prompts."""
    plan = hashlib.sha256(json.dumps([about, shard], sort_keys=True).encode()).hexdigest()
    file = out / "plan"
    if out.is_dir() and any(out.iterdir()) and (not file.is_file() or file.read_text().strip() != plan):
        raise ValueError(f"{out} holds other prompts, or those of another pipeline; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(plan + "\n")


def _rows(listener: Listener, call: Call, texts: Sequence[str], batch: int, tick: Callable[[int], Any]) -> dict:
    parts = []
    for first in range(0, len(texts), batch):
        chosen = texts[first : first + batch]
        (plain,) = listener.unguided(chosen).calls
        parts.append(rows_in(call, plain.arguments))
        if any(len(rows) != len(chosen) for rows in parts[-1].values()):
            raise Unheard(f"the pipeline gave rows of other prompts than the {len(chosen)} it was asked for")
        tick(len(chosen))
    return files.joined(parts)
