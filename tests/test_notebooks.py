"""The notebooks: committed without results, and run in their quick form.

Each ends in assertions about what its reader has seen, so that one that runs to its
end has shown it.
"""

from __future__ import annotations

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from sglang_pic.eval.serving import Server

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "eval" / "notebooks"
# Pictures and tables that each one shows.
SHOWN = {
    "rag_in_five_minutes": (1, 2),
    "order_does_not_matter": (1, 2),
    "nothing_to_change": (1, 1),
    "inside_a_link": (5, 1),
}


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def check_runs(name: str, monkeypatch: pytest.MonkeyPatch, url: str | None = None) -> None:
    """Execute a notebook in its folder, as Jupyter does, and count what it shows."""
    monkeypatch.setenv("PIC_QUICK", "1")
    if url is None:
        monkeypatch.delenv("PIC_URL", raising=False)
    else:
        monkeypatch.setenv("PIC_URL", url)
    notebook = read(name)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    kinds = [list(out.get("data", ())) for cell in code_of(notebook) for out in cell.outputs]
    pictures = sum("image/png" in kind for kind in kinds)
    tables = sum("text/html" in kind for kind in kinds)
    assert (pictures, tables) == SHOWN[name]


def test_every_notebook_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_committed_without_results(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    for cell in code_of(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert "assert " in code_of(notebook)[-1].source


@pytest.mark.server
@pytest.mark.parametrize(
    "name",
    [
        "rag_in_five_minutes",
        pytest.param("order_does_not_matter", marks=pytest.mark.long),
        "nothing_to_change",
    ],
)
def test_runs_against_a_server(name: str, smollm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    check_runs(name, monkeypatch, smollm.url)
    assert smollm.forest()["integrity"] == "ok"


@pytest.mark.long
def test_runs_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    check_runs("inside_a_link", monkeypatch)
