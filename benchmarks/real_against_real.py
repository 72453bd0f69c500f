"""The Frechet distance between two sets of real images, which tells whether an extractor stands as it should.

CIFAR-10's training set against its test set gives about 3.15 with InceptionV3 of 2015-12-05:

python benchmarks/real_against_real.py inception-2015-12-05.pt cifar10-train.npz cifar10-test.npz --device cuda

Each chunk of features is kept in the cache, so that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from measure import commit, hardware
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffdistill.data.folder import load_images
from diffdistill.data.image_set import ImageSet
from diffdistill.evaluation.extractors import open_extractor
from diffdistill.evaluation.features import Extractor
from diffdistill.evaluation.frechet import frechet_distance, moments

CHUNK_IMAGES = 500


def kept_features(data: ImageSet, extractor: Extractor, *, cache: Path, device: str, name: str) -> Tensor:
    """Features (N, D) of all images; each chunk is read from the cache, or computed and kept there.

    Raises:
        ValueError: the images do not fit the extractor, or a kept chunk is damaged or another one.
    """
    # by device too: a chunk from a GPU and one from a CPU differ in their last digits
    identity = f"{data.content_hash()} {extractor.checksum} {extractor.input} {device} {CHUNK_IMAGES}"
    content_hash = hashlib.sha256(identity.encode()).hexdigest()
    folder = cache / f"real-{content_hash[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with tqdm(total=len(data), desc=name, unit="image", dynamic_ncols=True) as bar:
        for number, index in enumerate(torch.arange(len(data)).split(CHUNK_IMAGES)):
            file = folder / f"{number:05d}.safetensors"
            if file.is_file():
                parts.append(read_chunk(file, content_hash, (len(index), extractor.num_features)))
            else:
                parts.append(extractor(data.select(index)[0])[0])
                beside = file.with_suffix(f".{os.getpid()}.partial")
                save_file({"features": parts[-1]}, str(beside), metadata={"content_hash": content_hash})
                beside.replace(file)  # a run that is stopped here leaves a whole chunk or none
            bar.update(len(index))
    return torch.cat(parts)


def read_chunk(file: Path, content_hash: str, shape: tuple[int, int]) -> Tensor:
    try:
        with safe_open(str(file), "pt") as content:
            found = (content.metadata() or {}).get("content_hash")
            features = content.get_tensor("features")
    except SafetensorError as error:
        raise ValueError(f"{file} could not be read: {error}; delete it, and it will be computed again") from error
    if found != content_hash or features.shape != shape:
        raise ValueError(f"{file} holds features {tuple(features.shape)} of {found}; delete it, to compute it again")
    return features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extractor", help="a file, folder or name, as for evaluate")
    parser.add_argument("first", type=Path, help="real images: a folder, or an .npz with images, uint8 (N, H, W, 3)")
    parser.add_argument("second", type=Path, help="other real images")
    parser.add_argument("--images", type=int, metavar="N", help="only N of each set, evenly spread over it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="for the chunks of features")
    parser.add_argument("--out", type=Path, metavar="JSON", help="keep what is printed")
    options = parser.parse_args()
    if options.images is not None and options.images < 2:
        parser.error(f"--images must be at least 2, got {options.images}")
    extractor = open_extractor(options.extractor, device=options.device)
    started, sets = time.perf_counter(), []
    for path in (options.first, options.second):
        data = load_images(path)
        if options.images is not None:
            # spread over the set, which may be sorted by class, as a folder is
            index = torch.arange(min(options.images, len(data))) * len(data) // min(options.images, len(data))
            data = ImageSet(data.images[index], data.labels[index], data.num_classes)
        features = kept_features(data, extractor, cache=options.cache, device=options.device, name=path.name)
        sets.append(moments(features))
    found = {
        "frechet_distance": frechet_distance(*sets),
        "extractor": extractor.name,
        "extractor_checksum": extractor.checksum,
        "num_first": sets[0].count,
        "num_second": sets[1].count,
        "seconds": time.perf_counter() - started,  # less where chunks were kept from before
        "command": " ".join(["python benchmarks/real_against_real.py", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": hardware(torch.device(options.device)),
        "torch": torch.__version__,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
