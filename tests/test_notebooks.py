"""The notebooks: each runs from its own folder on a CPU, says what it claims, and is stored as a clean source."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {  # at the least
    "01_distill_in_five_minutes": 3,
    "02_inspect_samples": 6,
    "03_add_a_method": 1,
    "04_compare_methods": 2,
    "05_jvp_attention": 1,
}
SECONDS = 240  # of one cell, on a machine that does other things too; a whole notebook takes about 20


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A checkout that is not installed, one thread, and pictures inside the notebook."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def executed(notebook, folder: Path):
    """The notebook after a run of all its cells, which hold its assertions."""
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def pictures(notebook) -> list[np.ndarray]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")) for data in found]


def test_every_lesson_is_there():
    assert {path.stem for path in FILES} == set(PICTURES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_a_clean_source(path):
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert not re.search(r"/(home|root|tmp|Users|work|opt)/|[A-Z]:\\\\", text)
    assert len(text) < 20_000
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        assert set(cell.metadata) == set()
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            compile(cell.source, path.name, "exec")
            assert max(map(len, cell.source.splitlines())) <= 120
            assert before is not None
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_pictures_show_something(path):
    notebook = executed(nbformat.read(path, as_version=4), path.parent)
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert not errors
    drawn = pictures(notebook)
    assert len(drawn) >= PICTURES[path.stem]
    for picture in drawn:
        assert min(picture.shape) > 100 and picture.std() > 10  # neither a sliver nor blank paper


def test_a_false_claim_in_a_notebook_fails(tmp_path):
    cells = [nbformat.v4.new_code_cell("assert 1 + 1 == 3")]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        executed(nbformat.v4.new_notebook(cells=cells), tmp_path)
