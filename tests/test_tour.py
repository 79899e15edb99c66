"""The tour runs from top to bottom, here with fewer steps, and its pictures are saved in it."""

import json

import pytest
from conftest import ROOT

TOUR = ROOT / "extras" / "tour.ipynb"
FEWER = {  # what takes long, and what takes its place
    "3000": "100",
    "10**6": "10**3",
    "steps=30": "steps=2",
    "alphas_cumprod, 50)": "alphas_cumprod, 3)",
    "alphas_cumprod, 20)": "alphas_cumprod, 3)",
    "alphas_cumprod))": "alphas_cumprod, steps=3))",
}


def test_it_runs():
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    tour = nbformat.read(TOUR, as_version=4)
    source = "".join(cell.source for cell in tour.cells)
    assert all(words in source for words in FEWER)
    for cell in tour.cells:
        if cell.cell_type == "code":
            for words, fewer in FEWER.items():
                cell.source = cell.source.replace(words, fewer)
    where = {"metadata": {"path": str(TOUR.parent)}}
    nbclient.NotebookClient(tour, timeout=300, resources=where).execute()


def test_its_pictures_are_in_it():
    """At least one in each of nine sections, of a run from top to bottom, without a warning."""
    assert TOUR.stat().st_size < 2 * 2**20
    cells = json.loads(TOUR.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    section = "0"
    pictured = set()
    for cell in cells:
        if cell["cell_type"] == "markdown" and cell["source"][0].startswith("## "):
            section = cell["source"][0].split()[1]
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            if "image/png" in output.get("data", {}):
                pictured.add(section)
    assert pictured == {f"{k}." for k in range(1, 10)}
