"""Write the notebooks: notebooks.py [--check] [--execute [NN_name ...]]

Chapter NN_name.md becomes NN_name.ipynb beside it, its text in plain
Markdown, its outputs stored. A chapter is executed if its code differs
from that of its notebook, or if --execute asks for it (for all of them if
none is named).
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode

from export import ROOT, chapters, write
from plain import Plain

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}
SETUP = """\
# Only where miniclip is missing, as on Colab: install it, but not torch.
import importlib.util
from importlib.metadata import version

if importlib.util.find_spec("miniclip") is None:
    found = importlib.util.find_spec("torch")
    torch = f"torch=={version('torch')}" if found else "torch"
    source = "git+URL@vVERSION"
    %pip install -q "miniclip[notebook] @ {source}" {torch}"""


def setup_cell() -> NotebookNode:
    """The first code cell of every notebook, which finds the package."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.M)[1]
    code = SETUP.replace("URL", config["repository"]["url"])
    return nbformat.v4.new_code_cell(
        code.replace("VERSION", version),
        metadata={"tags": ["setup"], **FOLDED},
    )


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    """The code cells that come from the chapter."""
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    return [c for c in cells if "setup" not in c.metadata.get("tags", [])]


def stored(chapter: Path) -> NotebookNode:
    """The notebook as it is on disk, an empty one if there is none."""
    path = chapter.with_suffix(".ipynb")
    empty = nbformat.v4.new_notebook()
    return nbformat.read(path, as_version=4) if path.exists() else empty


def adopt(nb: NotebookNode, old: NotebookNode) -> bool:
    """Take the outputs of a notebook, if its code is the same."""
    pairs = list(zip(code_cells(nb), code_cells(old)))
    if (
        len(pairs) < max(len(code_cells(nb)), len(code_cells(old)))
        or any(new.source != known.source for new, known in pairs)
        or not all(known.execution_count for _, known in pairs)
    ):
        return False
    for new, known in pairs:
        new.outputs = known.outputs
        new.execution_count = known.execution_count
    return True


def execute(nb: NotebookNode, old: NotebookNode) -> None:
    """Run a notebook in an empty folder and say which outputs changed."""
    start = time.time()
    with TemporaryDirectory() as folder:
        NotebookClient(
            nb,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    print(f"{time.time() - start:.0f} s")
    before = {cell.source: cell.outputs for cell in code_cells(old)}
    for cell in code_cells(nb):
        if before.get(cell.source, cell.outputs) != cell.outputs:
            free = "nbval-ignore-output" in cell.metadata.get("tags", [])
            note = " (never compared)" if free else ""
            first = cell.source.splitlines()[0]
            print(f"  changed{note}: [{cell.execution_count}] {first}")


def convert(chapter: Path, plain: Plain) -> NotebookNode:
    """The notebook of a chapter, without outputs."""
    nb = jupytext.read(chapter)
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source, chapter.name)
        elif "hide-input" in tags:
            cell.metadata.update(FOLDED)
        elif "hide-cell" in tags:
            hidden = {**FOLDED["jupyter"], "outputs_hidden": True}
            cell.metadata.update(FOLDED, jupyter=hidden)
    nb.cells.insert(nb.cells[0].cell_type == "markdown", setup_cell())
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def finish(nb: NotebookNode, stem: str) -> str:
    """The text of a notebook, without what varies from run to run."""
    nb.metadata = nbformat.from_dict(METADATA)
    for i, cell in enumerate(nb.cells):
        cell.id = f"{stem}-{i}".replace("_", "-")
        if "setup" in cell.metadata.get("tags", []):
            cell.execution_count = None
        for output in cell.get("outputs", []):
            view = "application/vnd.jupyter.widget-view+json"
            output.get("data", {}).pop(view, None)
    return nbformat.writes(nb) + "\n"


def main(check: bool, wanted: list[str] | None) -> int:
    """Bring the notebooks up to date, or say which ones are not."""
    plain, stale = Plain(), []
    names = [chapter.stem for chapter in chapters()]
    if unknown := set(wanted or []) - set(names):
        raise SystemExit(f"no chapter {unknown}; there are {names}")
    for chapter in chapters():
        nb, old = convert(chapter, plain), stored(chapter)
        again = wanted == [] or chapter.stem in (wanted or [])
        if (again or not adopt(nb, old)) and not check:
            print(f"{chapter.stem}: ", end="", flush=True)
            execute(nb, old)
        text = finish(nb, chapter.stem)
        if write(chapter.with_suffix(".ipynb"), text, check):
            stale.append(chapter.stem)
    print("stale:" if check else "wrote:", ", ".join(stale) or "nothing")
    return int(check and bool(stale))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--execute", nargs="*", metavar="NN_name")
    args = parser.parse_args()
    sys.exit(main(args.check, args.execute))
