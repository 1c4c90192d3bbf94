"""Write the package from the chapters: export.py [--check]

Chapter NN_name.md becomes miniclip/name.py: the code cells whose first line
is `#| export`, in order. The imports of the whole chapter go to the top,
where ruff sorts them and drops those that the exported cells do not use.
A name that is used but defined nowhere stops the export.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parents[2]
MARK = "#| export\n"


def chapters() -> list[Path]:
    """The chapters of the book (its notebooks), in order."""
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    names = re.findall(r"file: (chapters/\w+)", toc)
    return [ROOT / "book" / f"{name}.md" for name in names]


def module_file(chapter: Path) -> str:
    """chapters/06_loss.md -> miniclip/loss.py"""
    return f"miniclip/{chapter.stem.split('_', 1)[1]}.py"


def write(path: Path, text: str, check: bool = False) -> bool:
    """Whether the file differs from text; replaces it unless checking."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    if not check:
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(path)
    return True


def ruff(*args: str, source: str, filename: str) -> str:
    """Pass source through ruff with the project's settings."""
    command = [sys.executable, "-m", "ruff", *args, "--quiet"]
    done = subprocess.run(
        [*command, "--stdin-filename", filename, "-"],
        input=source,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    if done.returncode:
        raise SystemExit(f"{filename}: {done.stderr or done.stdout}")
    return done.stdout


def split_imports(source: str) -> tuple[list[str], str]:
    """The top-level imports of a cell, and the rest of its text."""
    lines, imports, rest, start = source.splitlines(), [], [], 0
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            rest += lines[start : node.lineno - 1]
            imports.append(ast.unparse(node))
            start = node.end_lineno
    return imports, "\n".join(rest + lines[start:]).strip("\n")


def sign(source: str, line: str) -> str:
    """Add a last line to the docstring of each public definition."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        public = not getattr(node, "name", "_").startswith("_")
        if public and ast.get_docstring(node):
            doc = node.body[0]
            indent = " " * doc.col_offset
            last = lines[doc.end_lineno - 1].removesuffix('"""').rstrip()
            end = [last] * bool(last) + ["", indent + line, indent + '"""']
            lines[doc.end_lineno - 1 : doc.end_lineno] = end
    return "\n".join(lines)


def module(chapter: Path) -> str | None:
    """The text of the module that a chapter exports, None without one."""
    name, file = chapter.relative_to(ROOT).as_posix(), module_file(chapter)
    imports, body = [], []
    for cell in jupytext.read(chapter).cells:
        if cell.cell_type == "code":
            code = cell.source.removeprefix(MARK)
            exported = code != cell.source
            if not exported:  # magics may stand where nothing is exported
                code = re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M)
            try:
                found, rest = split_imports(code)
            except SyntaxError as error:
                raise SystemExit(f"{name}: {error}\n{code}") from None
            imports += found
            body += [rest] * exported
    if not body:
        return None
    doc = ast.get_docstring(ast.parse(body[0]))
    if doc is None or "\n" in doc:
        raise SystemExit(f"{name}: the module needs one line of docstring")
    body[0] = body[0].split('"""', 2)[2]
    text = "\n\n\n".join(
        [
            f'"""{doc}\n\nWritten from {name}; edit that file.\n"""',
            "\n".join(imports),
            *(sign(code.strip("\n"), f"Chapter: {name}") for code in body),
        ]
    )
    fix = ["check", "--fix", "--select=F401,F811,F821,I"]
    text = ruff(*fix, source=text, filename=file)
    return ruff("format", source=text, filename=file)


def main(check: bool) -> int:
    """Bring the package up to date, or say which modules are not."""
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    texts = {"book/_toc.yml": toc}  # where `jupyter-book build` looks
    for chapter in chapters():
        if text := module(chapter):
            texts[module_file(chapter)] = text
    stale = [f for f, text in texts.items() if write(ROOT / f, text, check)]
    print("stale:" if check else "wrote:", ", ".join(stale) or "nothing")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv))
