"""Turn the MyST text of a chapter into Markdown that Colab can show.

The dialect is small: citations, numbered equations, admonitions, dropdowns
and links between chapters. Anything else of MyST is an error.
"""

import re

from pybtex.database import parse_file

from export import ROOT, chapters

EQUATION = re.compile(r"^\$\$ *\(([\w-]+)\)$", re.M)
BLOCK = re.compile(
    r"^:::\{(admonition|dropdown)\} (.*)\n(:class: \w+\n)?((.*\n)*?):::$",
    re.M,
)
ROLE = re.compile(r"(?<!`)\{([a-z:]+)\}`([^`\n]+)`")
CHAPTER_LINK = re.compile(r"(\]\(\d\d_\w+)\.md\b")
RAW = re.compile(  # fences, labels, comments, cell breaks, roles
    r"^(:::.*|[:`]{3,}\{.*|\$\$ *\(.*|\([\w-]+\)=|%.*|\+\+\+.*)|"
    + ROLE.pattern,
    re.M,
)


class Plain:
    """A converter that knows the bibliography and the equations."""

    def __init__(self) -> None:
        bib = parse_file(str(ROOT / "book" / "references.bib"))
        self.entries = bib.entries
        self.numbers = {}  # label -> "6.2", as Sphinx counts them
        for n, chapter in enumerate(chapters()):  # the tour is 0
            labels = EQUATION.findall(chapter.read_text(encoding="utf-8"))
            for i, label in enumerate(labels, 1):
                self.numbers[label] = f"{n}.{i}"

    def cite(self, key: str, year: str) -> str:
        """radford2021clip -> [Radford et al. (2021)](its address)"""
        entry = self.entries[key]
        names = [
            " ".join([*person.prelast_names, *person.last_names])
            for person in entry.persons["author"]
        ]
        people = (
            " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        )
        text = people + year.format(entry.fields["year"])
        url = entry.fields.get("url")
        return f"[{text}]({url})" if url else text

    def role(self, found: re.Match) -> str:
        """Replace {cite:t}`key`, {cite:p}`key, key` and {eq}`label`."""
        name, keys = found[1], re.split(", *", found[2])
        if name == "cite:t":
            return ", ".join(self.cite(key, " ({})") for key in keys)
        if name == "cite:p":
            return f"({'; '.join(self.cite(key, ', {}') for key in keys)})"
        return f"({self.numbers[keys[0]]})" if name == "eq" else found[0]

    def block(self, found: re.Match) -> str:
        """An admonition becomes a quotation, a dropdown a folded text."""
        kind, title, body = found[1], found[2], found[4].strip()
        if kind == "dropdown":
            top = f"<details><summary>{title}</summary>"
            return f"{top}\n\n{body}\n\n</details>"
        lines = f"**{title}**\n\n{body}".splitlines()
        return "\n".join(f"> {line}".rstrip() for line in lines)

    def __call__(self, text: str, name: str) -> str:
        """The plain form of one Markdown cell of the chapter `name`."""
        try:
            text = BLOCK.sub(self.block, text)
            text = EQUATION.sub(
                lambda m: rf"\tag{{{self.numbers[m[1]]}}}" + "\n$$", text
            )
            text = ROLE.sub(self.role, text)
        except KeyError as key:
            raise SystemExit(f"{name} refers to {key}, unknown") from None
        if raw := RAW.search(text):
            raise SystemExit(f"{name}: {raw[0]!r} is not in our dialect")
        return CHAPTER_LINK.sub(r"\1.ipynb", text)
