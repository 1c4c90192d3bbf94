"""The book: its sources, what is written from them, and its pages."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median, quantiles

import jupytext
import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from IPython.core.interactiveshell import InteractiveShell

import miniclip
from export import MARK, chapters, module, module_file, split_imports
from format import formatted
from notebooks import adopt, code_cells, convert, setup_cell
from plain import RAW, Plain

ROOT = Path(__file__).resolve().parents[1]
BOOK, TOOLS = ROOT / "book", ROOT / "book" / "_tools"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
CHAPTERS = chapters()
MODULES = [c for c in CHAPTERS if MARK in c.read_text(encoding="utf-8")]
EXPORT_NOTHING = {"00_tour"}
each_chapter = pytest.mark.parametrize(
    "chapter", CHAPTERS, ids=lambda chapter: chapter.stem
)
each_with_module = pytest.mark.parametrize(
    "chapter", MODULES, ids=lambda chapter: chapter.stem
)


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a command of this Python's environment, and keep what it says."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        **{"cwd": ROOT, **options},
    )


def build(source: Path, target: Path, *options: str):
    """Build a book as the command line does."""
    command = Path(sys.executable).with_name("jupyter-book")
    return run(command, "build", source, "--path-output", target, *options)


@cache
def source(chapter: Path) -> nbformat.NotebookNode:
    return jupytext.read(chapter)


@cache
def notebook(chapter: Path) -> nbformat.NotebookNode:
    return nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)


def markdown(nb: nbformat.NotebookNode) -> str:
    cells = [c.source for c in nb.cells if c.cell_type == "markdown"]
    return "\n\n".join(cells)


def imports(code: str) -> set[str]:
    """The modules that a piece of Python imports, by their full names."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return set(names)


# A chapter is a module is a test file.


def test_each_chapter_has_its_files():
    on_disk = set(BOOK.glob("chapters/[0-9]*.md"))
    assert set(CHAPTERS) == on_disk, "in _toc.yml and on disk differ"
    without = {chapter.stem for chapter in set(CHAPTERS) - set(MODULES)}
    assert without == EXPORT_NOTHING
    for chapter in MODULES:
        file = ROOT / module_file(chapter)
        assert file.exists(), f"{chapter.name}: run `make sync`"
        assert (ROOT / "tests" / f"test_{file.name}").exists()


def test_no_module_without_a_chapter():
    found = {path.name for path in (ROOT / "miniclip").glob("*.py")}
    known = {Path(module_file(chapter)).name for chapter in MODULES}
    assert found - {"__init__.py", "__main__.py"} == known


def test_lists_of_chapters_are_complete():
    index = (BOOK / "index.md").read_text(encoding="utf-8")
    names = [f"chapters/{chapter.name}" for chapter in CHAPTERS]
    assert re.findall(r"chapters/\w+\.md", index) == names
    api = (BOOK / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"automodule:: miniclip\.(\w+)", api)
    assert listed == [Path(module_file(c)).stem for c in MODULES]


def test_modules_import_only_earlier_chapters():
    earlier = set()
    for chapter in MODULES:
        code = (ROOT / module_file(chapter)).read_text(encoding="utf-8")
        own = {n for n in imports(code) if n.startswith("miniclip.")}
        assert own <= earlier, f"{chapter.stem} imports {own - earlier}"
        earlier.add(module_file(chapter)[:-3].replace("/", "."))


def test_one_version_number():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{miniclip.__version__}"\n' in text


# What is written from the chapters is up to date, and clean.


@pytest.mark.parametrize("tool", ["export.py", "notebooks.py"])
def test_written_files_are_up_to_date(tool):
    done = run(TOOLS / tool, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_is_content(command):
    done = run("-m", "ruff", *command.split(), ".")
    assert done.returncode == 0, f"try `make format`\n{done.stdout}"


@each_with_module
def test_module_reads_as_if_written_by_hand(chapter):
    code = (ROOT / module_file(chapter)).read_text(encoding="utf-8")
    tree = ast.parse(code)
    assert ast.get_docstring(tree) and "#|" not in code
    is_import = [
        isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body
    ]
    assert sorted(is_import[1:], reverse=True) == is_import[1:]
    for node in tree.body:
        if not getattr(node, "name", "_").startswith("_"):
            lines = (ast.get_docstring(node) or "").splitlines()
            assert lines[-1:] == [f"Chapter: book/chapters/{chapter.name}"]


def chapter_of(*cells: str) -> str:
    cells = [f"```{{code-cell}} ipython3\n{code}\n```" for code in cells]
    return "\n\n".join(cells)


def test_export(tmp_path, monkeypatch):
    monkeypatch.setattr("export.ROOT", tmp_path)
    chapter = tmp_path / "04_twice.md"
    chapter.write_text(
        chapter_of(
            "import torch\nimport json\n%matplotlib inline",
            "from collections import Counter\n\n\ndef naive(): ...",
            '#| export\n"""Doubles."""\nimport ast\nONE = 1  # it',
            '#| export\ndef twice(x: torch.Tensor):\n    """Two x."""\n'
            "    return Counter(x + x, ONE)",
            "print(json.dumps(twice(1)))",
        )
    )
    assert module(chapter) == (
        '"""Doubles.\n\nWritten from 04_twice.md; edit that file.\n"""\n\n'
        "from collections import Counter\n\nimport torch\n\n"
        "ONE = 1  # it\n\n\ndef twice(x: torch.Tensor):\n"
        '    """Two x.\n\n    Chapter: 04_twice.md\n    """\n'
        "    return Counter(x + x, ONE)\n"
    )


@pytest.mark.parametrize(
    "code, complaint",
    [
        ("x = 1", "one line of docstring"),
        ('"""A."""\nx = y', "Undefined name `y`"),
        ('"""A."""\n%time x', "invalid syntax"),
    ],
)
def test_export_complains(tmp_path, monkeypatch, code, complaint):
    monkeypatch.setattr("export.ROOT", tmp_path)
    chapter = tmp_path / "04_twice.md"
    chapter.write_text(chapter_of(MARK + code))
    with pytest.raises(SystemExit, match=complaint):
        module(chapter)


def test_format():
    options = "---\ntags: [hide-input]\n---\n"
    before = chapter_of("x=1", f"{options}#| export\nimport b, a\n'%'")
    after = chapter_of(
        "x = 1", f'{options}#| export\nimport a\nimport b\n\n"%"'
    )
    text = "# Prose  with 'quotes'\n\n{}\n\n- and=more"
    assert formatted(text.format(before)) == text.format(after)
    assert formatted(text.format(after)) == text.format(after)


# The text keeps to the style of the house.


def test_cells_are_short():
    cells = [cell for c in CHAPTERS for cell in code_cells(source(c))]
    lines = [len(cell.source.splitlines()) for cell in cells]
    assert max(lines) <= 40, cells[lines.index(max(lines))].source
    assert median(lines) <= 6
    assert quantiles(lines, n=10)[-1] <= 20


@each_chapter
def test_links_between_chapters(chapter):
    for nb in source(chapter), notebook(chapter):
        for target in re.findall(r"\]\(([^):#]+)[)#]", markdown(nb)):
            assert (chapter.parent / target).exists(), target


@each_chapter
def test_what_a_chapter_imports_gets_installed(chapter):
    """The setup cell installs miniclip[notebook], and nothing else."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = text[text.index("\ndependencies") : text.index("\ndev = ")]
    known = re.findall(r'"([\w-]+)', declared)
    providers = packages_distributions()
    for cell in code_cells(source(chapter)):
        code = re.sub(r"^\s*[%!].*", "", cell.source, flags=re.M)
        for line in split_imports(code)[0]:
            (name,) = {name.split(".")[0] for name in imports(line)}
            if name not in {*sys.stdlib_module_names, "miniclip"}:
                assert set(providers[name]) & set(known), name


# The notebooks: plain Markdown, the same everywhere, with outputs.


def test_plain():
    plain = Plain()
    plain.numbers["eq-x"] = "6.2"
    cpc = "https://arxiv.org/abs/1807.03748"
    adam = "https://arxiv.org/abs/1412.6980"
    for myst, expected in {
        "{cite:t}`oord2018cpc`": f"[van den Oord et al. (2018)]({cpc})",
        "{cite:p}`oord2018cpc, kingma2015adam`": f"([van den Oord et al., "
        f"2018]({cpc}); [Kingma and Ba, 2015]({adam}))",
        "$$\nx\n$$ (eq-x)\n\nBy {eq}`eq-x`": "$$\nx\n\\tag{6.2}\n$$\n\n"
        "By (6.2)",
        ":::{admonition} Note this\n:class: tip\nA\n\nB\n:::\nC": (
            "> **Note this**\n>\n> A\n>\n> B\nC"
        ),
        ":::{dropdown} Hint\nA\n:::": "<details><summary>Hint</summary>"
        "\n\nA\n\n</details>",
        "[a](06_loss.md#x), [b](../api.md)": "[a](06_loss.ipynb#x), "
        "[b](../api.md)",
        "`{name}` or `x` or `$$ (a)`": "`{name}` or `x` or `$$ (a)`",
    }.items():
        assert plain(myst, "a chapter") == expected


@pytest.mark.parametrize(
    "myst",
    [
        ":::{note}\nA\n:::",
        "```{math}\nx\n```",
        "(label)=\n# A",
        "% comment",
        "{ref}`label`",
        "{eq}`missing`",
        "{cite:t}`missing`",
    ],
)
def test_plain_complains(myst):
    with pytest.raises(SystemExit, match="a chapter"):
        Plain()(myst, "a chapter")


@each_chapter
def test_notebook_is_plain(chapter):
    assert not RAW.search(markdown(notebook(chapter)))


@each_chapter
def test_notebook_tells_nothing_of_the_machine(chapter):
    nb = notebook(chapter)
    nbformat.validate(nb)
    assert set(nb.metadata) == {"kernelspec", "language_info"}
    assert nb.metadata.language_info == {"name": "python"}
    ids = [f"{chapter.stem}-{i}" for i in range(len(nb.cells))]
    assert [cell.id for cell in nb.cells] == [
        name.replace("_", "-") for name in ids
    ]
    text = json.dumps(nb)
    for word in "widget-", "/site-packages/", str(ROOT), str(Path.home()):
        assert word not in text


@each_chapter
def test_stored_outputs_are_compared(chapter):
    """Without stored outputs nbval would compare nothing, and pass."""
    cells = code_cells(notebook(chapter))
    assert all(cell.execution_count for cell in cells), "try `make sync`"
    compared = [
        output
        for cell in cells
        if "nbval-ignore-output" not in cell.metadata.get("tags", [])
        for output in cell.outputs
        if set(output.get("data", [output.output_type])) - {"image/png"}
    ]
    assert len(compared) >= 5


@each_chapter
def test_figures_say_what_they_show(chapter):
    for cell in code_cells(notebook(chapter)):
        if any("image/png" in o.get("data", {}) for o in cell.outputs):
            options = cell.metadata.get("mystnb", {}).get("image", {})
            assert options.get("alt"), cell.source


@each_chapter
def test_folded_cells(chapter):
    for cell in code_cells(notebook(chapter)):
        tags = set(cell.metadata.get("tags", []))
        assert tags <= {"hide-input", "hide-cell", "nbval-ignore-output"}
        folded = bool(tags & {"hide-input", "hide-cell"})
        assert ("cellView" in cell.metadata) == folded
        assert ("jupyter" in cell.metadata) == folded


def test_changed_code_takes_no_outputs():
    chapter, plain = CHAPTERS[0], Plain()
    old = notebook(chapter)
    assert adopt(convert(chapter, plain), old)
    nb = convert(chapter, plain)
    code_cells(nb)[-1].source += "\n"
    assert not adopt(nb, old)
    nb = convert(chapter, plain)
    nb.cells.append(nbformat.v4.new_code_cell("1"))
    assert not adopt(nb, old)


@pytest.mark.parametrize("missing", ["", "miniclip", "miniclip torch"])
def test_setup_cell(missing, monkeypatch):
    """It installs this version, keeps torch, or does nothing at all."""
    find, installed = importlib.util.find_spec, []
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in missing.split() else find(name),
    )
    shell = InteractiveShell()
    shell.register_magic_function(installed.append, magic_name="pip")
    shell.run_cell(setup_cell().source).raise_error()
    source = f"git+{CONFIG['repository']['url']}@v{miniclip.__version__}"
    torch = "torch" if "torch" in missing else f"torch=={version('torch')}"
    expected = f'install -q "miniclip[notebook] @ {source}" {torch}'
    assert installed == ([expected] if missing else [])


def test_only_the_configuration_knows_the_address():
    name = CONFIG["repository"]["url"].removeprefix("https://")
    for folder in "book", "miniclip", "tests", "data":
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".json", ".yml"}:
                assert name not in path.read_text(encoding="utf-8"), path


# The pages.


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The book, built once from nothing, with warnings as errors."""
    folder = tmp_path_factory.mktemp("book")
    done = build(BOOK, folder, "-W", "--keep-going")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder / "_build" / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[str, BeautifulSoup]:
    return {
        path.relative_to(site).as_posix(): BeautifulSoup(
            path.read_text(encoding="utf-8"), "html.parser"
        )
        for path in site.rglob("*.html")
        if "_static" not in path.parts
    }


def page(pages: dict, chapter: Path) -> BeautifulSoup:
    return pages[f"chapters/{chapter.stem}.html"]


def test_build_uses_the_stored_outputs(site):
    log = (site.parents[1] / "log").read_text()
    assert log.count("Using cached notebook") == len(CHAPTERS)
    assert "Executing notebook" not in log, "try `make sync`"


@each_chapter
def test_page_opens_its_notebook_in_colab(pages, chapter):
    links = [
        a["href"]
        for a in page(pages, chapter).find_all("a", href=True)
        if "colab" in a["href"]
    ]
    path = chapter.with_suffix(".ipynb").relative_to(ROOT).as_posix()
    home = CONFIG["repository"]
    name = home["url"].removeprefix("https://github.com/")
    colab = "https://colab.research.google.com/github"
    assert set(links) == {f"{colab}/{name}/blob/{home['branch']}/{path}"}
    if (ROOT / ".git").exists():  # and git knows it, or is going to
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", path],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert listed.stdout.strip() == path


@each_chapter
def test_page_offers_the_plain_notebook(site, chapter):
    name = chapter.with_suffix(".ipynb").name
    given = (site / "_sources" / "chapters" / name).read_bytes()
    assert given == chapter.with_suffix(".ipynb").read_bytes()


@each_chapter
def test_page_says_where_a_cell_is_saved(pages, chapter):
    exported = [
        cell.source.removeprefix(MARK).strip()
        for cell in code_cells(source(chapter))
        if cell.source.startswith(MARK)
    ]
    badges = page(pages, chapter).select(".saved-in")
    shown = [badge.find_next("pre").text.strip() for badge in badges]
    assert shown == exported
    text = f"saved in {module_file(chapter)}"
    assert all(badge.text.strip() == text for badge in badges)


@each_chapter
def test_page_shows_neither_marks_nor_setup(pages, chapter):
    text = page(pages, chapter).text
    assert MARK.strip() not in text
    assert setup_cell().source.splitlines()[0] not in text


@each_chapter
def test_page_numbers_equations_as_the_notebook(pages, chapter):
    shown = [e.text for e in page(pages, chapter).select(".eqno")]
    tags = re.findall(r"\\tag\{(.+)\}", markdown(notebook(chapter)))
    assert [e.strip("()#\uf0c1¶") for e in shown] == tags


@each_chapter
def test_page_describes_its_figures(pages, chapter):
    for image in page(pages, chapter).select(".cell_output img"):
        assert image.get("alt") and "_images/" not in image["alt"]


def test_pages_load_nothing_from_another_host(site, pages):
    far = re.compile(r"^(https?:)?//")
    for name, soup in pages.items():
        loaded = [
            tag.get(key)
            for key in ("src", "srcset", "data", "poster")
            for tag in soup.find_all(attrs={key: True})
        ]
        for link in soup.find_all("link", href=True):
            if {"canonical", "search", "next", "prev"}.isdisjoint(
                link["rel"]
            ):
                loaded.append(link["href"])
        assert not [url for url in loaded if far.match(url)], name
        inline = "".join(s.text for s in soup.find_all(["script", "style"]))
        assert not re.search(r"https?://", inline), name
    for sheet in site.rglob("*.css"):
        css = sheet.read_text(encoding="utf-8")
        assert not re.search(
            r"(url\(|@import)\s*[\"']?(https?:)?//", css
        ), sheet.name


def test_links_on_pages_lead_somewhere(site, pages):
    for name, soup in pages.items():
        for tag in soup.find_all(["a", "link", "script", "img"]):
            url = tag.get("href") or tag.get("src") or ""
            target, _, anchor = url.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            path = (site / name).parent / target.split("?")[0]
            path = path.resolve() if target else site / name
            assert path.exists(), f"{name} -> {url}"
            other = pages.get(path.relative_to(site).as_posix())
            if anchor and other:
                assert other.find(id=anchor), f"{name} -> {url}"


def test_failing_cell_fails_the_build(tmp_path):
    book = tmp_path / "book"
    shutil.copytree(TOOLS, book / "_tools")
    shutil.copy(ROOT / "_config.yml", tmp_path)
    shutil.copy(BOOK / "references.bib", book)
    for folder in tmp_path, book:
        (folder / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    head = CHAPTERS[0].read_text(encoding="utf-8").partition("\n# ")[0]
    head += "\n# A page\n\n"
    (book / "index.md").write_text(head + chapter_of("print(1 / 0)"))
    done = build(book, tmp_path)
    assert "ZeroDivisionError" in done.stdout + done.stderr
    assert done.returncode != 0
