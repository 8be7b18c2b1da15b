"""companion.ipynb, the paper as a notebook: it runs from a clean kernel, and what is committed is the
output of one such run.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "companion.ipynb"
IN_DOCS = "| in the paper | here |"
IN_NOTEBOOK = "| in the paper | section here | in the code |"


def cells(kind: str) -> list[Any]:
    """The committed cells of a kind, "code" or "markdown"."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def rows_of(text: str, header: str) -> list[list[str]]:
    """The rows of the markdown table with this header, as cells."""
    rows = []
    for line in text.split(header + "\n")[1].splitlines()[1:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def anchors(places: str) -> list[tuple[str, str]]:
    """(file, mark) of each mark in "`a.py`: `x`, `y`; `b.py`: `z`"."""
    pairs = []
    for place in places.split("; "):
        file, *marks = re.findall(r"`([^`]+)`", place)
        pairs += [(file, mark) for mark in marks]
    return pairs


def is_there(file: str, mark: str) -> bool:
    """Whether the file defines this identifier, or holds this text."""
    text = (ROOT / file).read_text(encoding="utf-8")
    pattern = re.escape(mark)
    if mark.isidentifier():
        pattern = rf"^\s*(def|class) {mark}\b|^{mark}\b.*="
    return re.search(pattern, text, re.MULTILINE) is not None


def test_notebook_was_run_once_from_top_to_bottom() -> None:
    """Claim: 30 to 45 cells; code cells were executed in their order, without an error and with
    nothing on stderr. Oracle: execution counts 1, 2, ..., and the kinds of outputs.
    """
    code = cells("code")
    assert 30 <= len(code) + len(cells("markdown")) <= 45
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", cell.source
        if re.search(r"^figure$|^ *(print|display)\(", cell.source, re.MULTILINE):
            assert cell.outputs, cell.source  # the others hold no more than assertions


def test_notebook_is_small_and_names_no_machine() -> None:
    """Claim: the file is under 1.5 MB, and no text of an output has an absolute path. Oracle: the file."""
    assert NOTEBOOK.stat().st_size < 1_500_000
    for cell in cells("code"):
        for output in cell.outputs:
            data = output.get("data", {})
            text = (
                output.get("text", "") + data.get("text/plain", "") + data.get("text/markdown", "")
            )
            assert not re.search(r"(?<![\w.)])/\w+/", text), text


def test_index_points_at_what_is_there() -> None:
    """Claim: the index has every row of docs/paper.md, with the same places. Each place is in the
    code, and each section is in the notebook. Oracle: the files.
    """
    text = "\n".join(cell.source for cell in cells("markdown"))
    index = rows_of(text, IN_NOTEBOOK)
    ours = {item: places for item, _, places in index}
    docs = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    for item, places in rows_of(docs, IN_DOCS):
        assert ours[item] == places
    headings = re.findall(r"^## (\d+)\. ", text, re.MULTILINE)
    assert headings == [str(n) for n in range(1, len(headings) + 1)]
    for item, sections, places in index:
        assert set(re.findall(r"\d+", sections)) <= set(headings), item
        assert anchors(places), item
        for file, mark in anchors(places):
            assert is_there(file, mark), (file, mark)


def words(code: list[Any]) -> list[str]:
    """What the cells print, without numbers, whose last digits may differ between machines."""
    printed = [output.text for cell in code for output in cell.outputs if "text" in output]
    return [re.sub(r"[-+.\d]+", "", text) for text in printed]


@pytest.mark.slow
def test_notebook_runs_from_a_clean_kernel() -> None:
    """Claim: every cell runs, and so every claim of the notebook holds; it prints what is committed.

    Oracle: its assertions, in a new kernel that starts in the checkout.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kernel = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(notebook, kernel_name="python3", resources=kernel, timeout=600)
    client.coalesce_streams = True
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert words(ran) == words(cells("code"))
