"""Format the code cells of the chapters as ruff formats notebooks."""

import re

import nbformat

from export import chapters, ruff, write

CELL = re.compile(
    r"(^```\{code-cell\}.*\n(?:---\n(?:.*\n)*?---\n)?)((?:.*\n)*?)(?=^```$)",
    re.M,
)


def formatted(text: str) -> str:
    """The text of a chapter with its code cells formatted."""
    cells = [
        nbformat.v4.new_code_cell(code.strip("\n"))
        for _, code in CELL.findall(text)
    ]
    source = nbformat.writes(nbformat.v4.new_notebook(cells=cells))
    source = ruff(
        "check", "--fix", "--select=I", source=source, filename="x.ipynb"
    )
    source = ruff("format", source=source, filename="x.ipynb")
    codes = iter(cell.source for cell in nbformat.reads(source, 4).cells)
    return CELL.sub(lambda found: f"{found[1]}{next(codes)}\n", text)


if __name__ == "__main__":
    for chapter in chapters():
        if write(chapter, formatted(chapter.read_text(encoding="utf-8"))):
            print(f"formatted {chapter.name}")
