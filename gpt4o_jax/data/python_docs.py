"""The embedded corpus: English that every CPython carries.

The language reference's topics (pydoc_data/topics.py) and the docstrings of the standard
library, each a document, read with ast and never imported. About 2 MB, no network. The
text depends on the version of Python.
"""

import ast
import pathlib
import sysconfig

# Left out: tests and tools that distributions strip, and what is generated or not English.
_SKIPPED = {
    "test", "tests", "idlelib", "idle_test", "lib2to3", "tkinter", "turtledemo", "ensurepip", "distutils",
    "site-packages", "dist-packages", "__pycache__", "pydoc_data", "_pyrepl", "encodings",
}  # fmt: skip
_SHORTEST = 40  # characters: shorter docstrings say little


def documents() -> list[str]:
    """The topics by name, then the docstrings by path and place in the file; each text once."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    found = _topics(library / "pydoc_data" / "topics.py")
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not _SKIPPED & set(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            found += _docstrings(path)
    return list(dict.fromkeys(found))


def _topics(path: pathlib.Path) -> list[str]:
    """The values of the dict literal `topics = {...}`, in the order of its keys."""
    if not path.exists():  # some minimal installations leave it out
        return []
    topics: dict[str, str] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics |= ast.literal_eval(node.value)
    return [topics[name].strip() for name in sorted(topics)]


def _docstrings(path: pathlib.Path):
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few files of the library test the parser itself
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and len(text) >= _SHORTEST:
                yield text
