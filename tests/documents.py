"""What stands in this repository's Markdown files: blocks that can be run, links, headings, commands in the text."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]  # every block in them is run
DOCUMENTS = [*GUIDES, "benchmarks/README.md", "CHANGELOG.md"]


def text_of(document):
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document, language):
    """Texts of the fenced blocks of a document that are marked as `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.DOTALL | re.MULTILINE)


def languages(document):
    """What the fenced blocks of a document are marked as."""
    return set(re.findall(r"^```(.*)\n(?:.*\n)*?```$", text_of(document), re.MULTILINE))


def commands(document):
    """Lines of a document's shell blocks, continuation lines joined."""
    return [re.sub(r"\\\n\s*", "", line) for block in blocks(document, "bash") for line in re.split(r"(?<!\\)\n", block.strip())]


def prose(document):
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def spans(document):
    """Texts between backquotes outside of blocks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def links(document):
    """(file, heading) of a document's links into this repository: a path from ROOT, and what stands behind a #, or ""."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(document)))
    inner = [target.partition("#") for target in found if "://" not in target]
    return [((ROOT / document).parent / path if path else ROOT / document, heading) for path, _, heading in inner]


def anchors(path):
    """The names that headings of a Markdown file have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
