"""The documentation as a site: `make docs`. Sphinx reads the same Markdown as GitHub; warnings are errors.

The source is the repository itself, so that README is the first page and a link to any file, on GitHub as here, is
checked and offered for download.
"""

project = "leap_dist"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**.md"]
exclude_patterns = [".*", "runs", "site", "build"]
html_theme = "furo"  # fonts of the reader's machine, nothing fetched from elsewhere
html_title = project
html_extra_path = ["index.html"]  # leads to README
html_copy_source = False
myst_heading_anchors = 4  # as GitHub makes them

CONTENTS = {
    "Use": [
        "configuration",
        "imagenet",
        "running",
        "data",
        "students",
        "use_the_student",
        "objectives",
        "teachers",
        "scaling",
    ],
    "Look": ["report", "profiling", "analysis", "evaluation", "sweeps"],
    "Evidence": ["evidence", "benchmarks/README", "benchmarks/*"],
    "Inside": ["design", "kernels", "/CHANGELOG"],
}


def _contents() -> str:
    """The tables of contents, which GitHub's readers have no use for: README gets them here alone."""
    tables = []
    for caption, pages in CONTENTS.items():
        names = "\n".join(page.removeprefix("/") if page.startswith("/") else f"docs/{page}" for page in pages)
        tables.append(f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{names}\n```")
    return "\n\n".join(tables)


def setup(app: object) -> None:
    """Sphinx' hook."""

    def add_contents(_: object, page: str, source: list[str]) -> None:
        if page == root_doc:
            source[0] += f"\n\n{_contents()}\n"

    app.connect("source-read", add_contents)
