"""What this book adds to Sphinx: stored outputs, badges, no far hosts."""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import read_myst_markdown_notebook
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinxcontrib.bibtex.plugin import register_plugin
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import (
    AuthorYearReferenceStyle,
)

from export import MARK, chapters, module_file
from notebooks import adopt, stored

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for chapters that run


class RoundStyle(AuthorYearReferenceStyle):
    """Radford et al. (2021), with round brackets."""

    def __post_init__(self) -> None:
        self.bracket_textual = BracketStyle(left="(", right=")")
        self.bracket_parenthetical = BracketStyle(left="(", right=")")
        super().__post_init__()


def use_stored_outputs(app: Sphinx) -> None:
    """Put the outputs of the notebooks into the execution cache.

    Then the build executes only a chapter whose code its notebook lacks.
    """
    cache = get_cache(Path(app.outdir).parent / ".jupyter_cache")
    for chapter in chapters():
        text = chapter.read_text(encoding="utf-8")
        nb = read_myst_markdown_notebook(text)
        if adopt(nb, stored(chapter)):
            cache.cache_notebook_bundle(
                CacheBundleIn(nb, str(chapter)),
                check_validity=False,
                overwrite=True,
            )


def add_badges(app: Sphinx, doctree: nodes.document) -> None:
    """Show in which file a cell is saved, instead of its mark."""
    chapter = Path(app.env.doc2path(app.env.docname))
    for code in list(doctree.findall(nodes.literal_block)):
        if code.astext().startswith(MARK):
            code.rawsource = code.astext().removeprefix(MARK)
            code.children = [nodes.Text(code.rawsource)]
            badge = nodes.container(classes=["saved-in"])
            badge += nodes.Text("saved in ")
            badge += nodes.literal("", module_file(chapter))
            code.parent.insert(code.parent.index(code), badge)


def lay_out_docstring(app: Sphinx, *args) -> None:
    """Link its chapter; make `Returns: this` a paragraph of its own."""
    lines = args[-1]
    text = "\n".join(lines)
    text = re.sub(r"book/(chapters/\w+)\.md", r":doc:`/\1`", text)
    lines[:] = re.sub(
        r"^(Returns|Yields|Raises|Source|Attributes): (.+(?:\n +.+)*)",
        lambda found: f"\n**{found[1]}:** {' '.join(found[2].split())}\n",
        text,
        flags=re.M,
    ).splitlines()


def skip_aliases(app: Sphinx, kind, name, member, skip, _) -> bool | None:
    """Leave out the fields of a NamedTuple, which say only a number."""
    doc = getattr(member, "__doc__", None) or ""
    return doc.startswith("Alias for field number") or None


def drop_thebe(app: Sphinx, page: str, _, context: dict, __) -> None:
    """Leave out the scripts of live cells, which come from another host."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes}".lower()
    ]


def offer_notebooks(app: Sphinx, error: Exception | None) -> None:
    """Let the download button give the plain notebooks."""
    for chapter in [] if error else chapters():
        source = chapter.with_suffix(".ipynb")
        target = Path(app.outdir, "_sources", "chapters", source.name)
        if source.exists() and target.exists():
            shutil.copy(source, target)


def use_local_mathjax(app: Sphinx, config: Config) -> None:
    """Take MathJax, one file of it, from the package that carries it."""
    package = Path(find_spec("sphinx-mathjax-offline").origin).parent
    script = package / "static" / "mathjax" / "tex-svg-full.js"
    config.html_static_path.append(str(script))
    config.mathjax_path = script.name


def setup(app: Sphinx) -> dict:
    """Connect all of it."""
    kind = "sphinxcontrib.bibtex.style.referencing"
    register_plugin(kind, "round", RoundStyle)
    app.connect("config-inited", use_local_mathjax)
    app.connect("builder-inited", use_stored_outputs)
    app.connect("doctree-read", add_badges)
    app.connect("autodoc-process-docstring", lay_out_docstring, priority=1)
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", offer_notebooks)
    return {"parallel_read_safe": True}
