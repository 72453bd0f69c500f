"""Measuring what was trained: every row from the same noises and classes, by the same extractor, kept once measured."""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from diffdistill.config import ConfigError
from diffdistill.denoiser import Denoiser
from diffdistill.evaluation.cost import evaluations_per_sample, num_parameters
from diffdistill.evaluation.features import Extractor
from diffdistill.evaluation.grid import image_grid
from diffdistill.evaluation.metrics import Reference, evaluate_images
from diffdistill.evaluation.sampling import Solved, denoisers, fingerprint, sample_images
from diffdistill.generator import Sampler

MEASURED = "measured"  # of the output: numbers and picture of each row
PICTURE_ROWS = 2
TILE_PIXELS = 56  # small images are drawn about this large


@dataclass(frozen=True)
class Ruler:
    """How every row is measured.

    Attributes:
        samples: images behind each row's numbers; the first of them are the picture.
        seed: of their noises.
        batch: images made at once.
    """

    extractor: Extractor
    reference: Reference
    samples: int
    seed: int
    batch: int

    def refuse_unfit(self, denoiser: Denoiser) -> None:
        """Refuses, before anything is trained, a teacher whose samples the extractor does not take."""
        wanted = (3, self.extractor.input.height, self.extractor.input.width)
        if tuple(denoiser.sample_shape) != wanted:
            raise ConfigError(
                f"the teacher makes samples of shape {tuple(denoiser.sample_shape)}, and {self.extractor.name} takes "
                f"{wanted}; choose an extractor for these samples by --features"
            )

    def measure(self, name: str, source: Sampler | Solved, *, output: Path) -> dict:
        """Numbers of a row, from `output` where the very same were measured before.

        Returns:
            metrics, evaluations (of a network, per sample), num_parameters, columns (of the picture), and picture: the
            PNG's name in `output`.
        """
        folder, label = output / MEASURED, re.sub(r"[^\w.-]+", "-", name)
        file, picture, key = folder / f"{label}.json", folder / f"{label}.png", self._key(source)
        if file.is_file() and picture.is_file():
            kept = json.loads(file.read_text())
            if kept["key"] == key:
                return kept
        images, labels = sample_images(source, self.samples, seed=self.seed, batch=self.batch, progress=f"  {name}")
        columns = _columns(denoisers(source)[0].backbone.num_classes)
        shown = images[: PICTURE_ROWS * columns].float()
        drawn = io.BytesIO()
        image_grid(shown, columns=columns, scale=max(1, TILE_PIXELS // shown.shape[-1])).save(
            drawn, "PNG", optimize=True
        )
        row = {
            "key": key,
            "metrics": evaluate_images(images.float(), labels, self.reference, self.extractor),
            "evaluations": evaluations_per_sample(source),
            "num_parameters": num_parameters(denoisers(source)),
            "columns": columns,
            "picture": f"{MEASURED}/{picture.name}",
        }
        folder.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(drawn.getvalue())
        beside = file.with_suffix(".writing")
        beside.write_text(json.dumps(row, indent=1) + "\n")
        beside.replace(file)  # last, and whole: it says that the row is there
        return row

    def _key(self, source: Sampler | Solved) -> str:
        """What the numbers depend on, as a hash."""
        said = (
            fingerprint(source),
            self.extractor.checksum,
            self.reference.content_hash,
            self.reference.moments.count,
            self.samples,
            self.seed,
        )
        return hashlib.sha256(repr(said).encode()).hexdigest()


def _columns(num_classes: int) -> int:
    """Columns of the picture: at most ten, so that a column has one class where the classes are few."""
    return 10 if num_classes in (0, 1) or num_classes >= 10 else (10 // num_classes) * num_classes
