"""The docstrings of public names: complete by numpydoc's rules, and their examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import types
import warnings
from pathlib import Path

import pytest

import wsiseg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Sphinx, which numpydoc imports
    from numpydoc.validate import validate

ROOT = Path(__file__).parent.parent
#: GL: a docstring is there, sections in order and known. SS: a summary of one line with a capital and a full stop.
CHECKS = {"GL03", "GL06", "GL07", "GL08", "SS01", "SS02", "SS03", "SS04"}
#: PR: every parameter is documented, none else, in order. RT: what is returned is said. YD: and what is yielded.
FUNCTION_CHECKS = CHECKS | {"PR01", "PR02", "PR03", "PR07", "PR10", "RT01", "RT03", "YD01"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> dict[str, object]:
    """The library's names, and those that pages and examples import, by where they are defined."""
    found = {name: getattr(wsiseg, name) for name in wsiseg.__all__}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    for page in pages:
        for module, names in re.findall(r"^ *from (wsiseg[\w.]*) import ([\w, ]+)$", page.read_text(), re.MULTILINE):
            found |= {name: getattr(importlib.import_module(module), name) for name in names.split(", ")}
        for span in re.findall(r"`(wsiseg(?:\.\w+)+)\b(?![/*])", page.read_text()):  # `wsiseg.evaluation.evaluate`
            if not span.endswith(".nf"):  # a file
                found[span] = pkgutil.resolve_name(span)
    objects = [value for value in found.values() if inspect.isclass(value) or inspect.isfunction(value)]
    return {f"{value.__module__}.{value.__qualname__}": value for value in objects}


PUBLIC = public()
WITH_EXAMPLES = [path for path in (ROOT / "wsiseg").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in WITH_EXAMPLES
)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_is_complete(name: str) -> None:
    checks = FUNCTION_CHECKS if inspect.isfunction(PUBLIC[name]) else CHECKS  # fields of a class stand at the fields
    assert [f"{code}: {text}" for code, text in validate(name)["errors"] if code in checks] == []


def test_the_names_of_library_docs_and_examples_are_checked() -> None:
    assert {"wsiseg.library.segment_slide", "wsiseg.library.segment_image", "wsiseg.config.RunConfig"} <= set(PUBLIC)
    assert "wsiseg.models.load_model" in PUBLIC, "docs/models.md imports it"
    assert "wsiseg.evaluation.compare.evaluate" in PUBLIC, "docs/evaluate.md names it"


def test_modules_with_examples_are_found() -> None:
    assert {"wsiseg.library", "wsiseg.records", "wsiseg.stitching.resolve"} <= set(MODULES)


def failures(module: types.ModuleType) -> list[str]:
    """What goes wrong when the examples in a module's docstrings are run."""
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=said.append)
    return said


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in an empty folder that is the current one, so that an example may write ``demo``."""
    monkeypatch.chdir(tmp_path)
    assert "".join(failures(importlib.import_module(name))) == ""


def test_a_wrong_example_is_found() -> None:
    module = types.ModuleType("module")
    module.__doc__ = ">>> 1 + 1\n2\n"
    assert failures(module) == []
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert "Expected:\n    3\nGot:\n    2" in "".join(failures(module))
