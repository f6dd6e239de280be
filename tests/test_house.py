"""README, docs, examples, pins and CI agree with the code."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import click
import jsonschema
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from wsiseg import __version__
from wsiseg.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".txt", ".json", ".sh", ".groovy", ".cff", ".yml", ".yaml", ".smk"}
SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "venv", "wsiseg-out"}


def block(name: str) -> list[str]:
    """The lines of the README's code block that is marked ``name``."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- block: {name} -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert found, f"README has no block {name}"
    return found[1].splitlines()


def code(page: Path) -> list[str]:
    """Code spans, and lines of code blocks with their continuations joined."""
    text = page.read_text()
    if page.suffix != ".md":
        return text.replace("\\\n", " ").splitlines()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for b in blocks for line in b.replace("\\\n", " ").splitlines()] + re.findall(r"`([^`\n]+)`", rest)


def commands() -> dict[str, click.Command]:
    """Every command by its words: ``run``, ``seeds check``, ..."""
    context, found = click.Context(main), {}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": c for inner, c in command.commands.items()}
    return found


def options(command: click.Command) -> set[str]:
    return {"-h", "--help"} | {
        o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)
    }


def project_files() -> list[Path]:
    """Text files of the project; not what tools leave behind."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and (f == ".ci" or not f.startswith("."))]
        found += [
            Path(folder, n) for n in names if Path(n).suffix in TEXT_SUFFIXES and n != ".git"
        ]  # a file in a worktree
    return found


def test_ci_runs_the_test_commands_of_the_readme() -> None:
    """``.ci/run`` says what the README says and nothing else; only where the environment lies differs."""
    script = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    set_up = [line for line in script if re.match(r'set -euo|cd "\$|venv=|trap ', line)]
    said = [
        line.replace('"$venv"', ".venv").replace('"$venv/bin/activate"', ".venv/bin/activate")
        for line in script
        if line not in set_up
    ]
    assert said == block("test")
    assert len(set_up) == 4
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_pre_commit_runs_the_lint_commands_of_the_readme() -> None:
    """All of them, without a download: the hooks are local and use the tools of the environment."""
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    lint = [line for line in block("test") if not re.match(r"python3 |\. |pip |pytest", line)]
    assert [hook["entry"] for hook in hooks] == lint
    assert {repo["repo"] for repo in repos} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}


def test_changelog_fragments_have_a_kind_and_a_sentence() -> None:
    kinds = [
        kind["directory"] for kind in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]["type"]
    ]
    for path in (ROOT / "changes").iterdir():
        if path.name != "README.md":
            assert re.fullmatch(rf"(\d+|\+[\w-]+)\.({'|'.join(kinds)})(\.\d+)?\.md", path.name), path
            assert path.read_text().strip().endswith((".", ")")), path
    assert "<!-- towncrier release notes start -->" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("form", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_issue_forms_are_valid_yaml_and_ask_for_commands_that_exist(form: Path) -> None:
    fields = yaml.safe_load(form.read_text()).get("body", [])
    assert len({field["id"] for field in fields}) == len(fields)
    for name in re.findall(r"`wsiseg ([a-z]+)", form.read_text()):
        assert name in commands()


def test_the_annotations_are_announced_to_type_checkers() -> None:
    assert resources.files("wsiseg").joinpath("py.typed").is_file()


def test_the_readmes_first_command_ends_in_what_demo_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run command of the README is the one that ``wsiseg demo`` prints (that it works is tested in test_cli_run.py)."""
    lines = block("run")
    assert lines[-2] == "wsiseg demo demo"
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, lines[-2].split()[1:]).output.strip() == lines[-1]


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page
    readme = (ROOT / "README.md").read_text()
    assert all(f"(docs/{page.name})" in readme for page in (ROOT / "docs").glob("*.md"))
    listed = (ROOT / "examples/README.md").read_text()
    for example in (ROOT / "examples").iterdir():
        assert example.is_dir() or example.name == "README.md" or f"({example.name})" in listed, example


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        path = (page.parent / target).resolve()
        assert "://" in target or path.exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "Dockerfile", ROOT / "examples/slurm_array.sh"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_commands_and_options_exist(page: Path) -> None:
    """Every ``wsiseg X`` and every option in code is one that the program has."""
    known = commands()
    everywhere = set().union(*map(options, known.values())) | {"--version"}
    for line in code(page):
        for call in re.split(r"&&|\|\||;", line):
            found = re.search(r"(?<![\w./-])wsiseg ((?:[a-z]+ ?)+|-)", call)
            if not found:
                continue
            words = found[1].split()
            if words[0] in ("-", "COMMAND") or line.lstrip().startswith(("pip ", "docker build")):
                continue
            name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
            assert name in known, f"{page.name}: {line}"
            for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", call[found.end(1) :]):
                assert option in options(known[name]), f"{page.name}: {option} in {line}"
        if line.startswith("-") and page.parent != ROOT / ".ci" and not line.startswith("--build-arg"):
            option = re.split(r"[ =]", line)[0]
            assert option in everywhere, f"{page.name}: {line}"


@pytest.mark.parametrize("page", ["seeds.md", "troubleshooting.md"])
def test_every_sentence_of_the_tables_is_in_the_code(page: str) -> None:
    """First column of the tables headed "message": literal pieces of messages."""
    source = "\n".join(p.read_text() for p in (ROOT / "wsiseg").rglob("*.py")).replace("\\'", "'").replace('\\"', '"')
    pieces = []
    for table in re.findall(
        r"^\| message .*?\n\n", (ROOT / "docs" / page).read_text() + "\n\n", re.DOTALL | re.MULTILINE
    ):
        pieces += [
            piece for row in table.strip().splitlines()[2:] for piece in re.findall(r"`([^`]+)`", row.split("|")[1])
        ]
    assert len(pieces) > 20
    missing = [piece for piece in pieces if piece not in source]
    assert not missing


def test_every_command_and_column_is_in_the_docs() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    for name in commands():
        assert name == "seeds" or f"wsiseg {name}" in text
    from wsiseg.formats.geoparquet import _schema
    from wsiseg.measurements import colour_names, measure
    from wsiseg.records import Cells, Provenance, SlideInfo, Typing

    info = SlideInfo(
        path="a", reader="image", format="png", level_sizes=((1, 1),), downsamples=(1.0,), mpp=0.5, mpp_source="--mpp"
    )
    none = np.empty(0, np.float32)
    coloured = dataclasses.replace(
        Cells.empty(4), measurements={n: none for s in ("he", "ihc") for n in colour_names(s)}
    )
    schema = _schema(
        measure(coloured, Typing.untyped(0), 0.5),
        Typing.untyped(0),
        info,
        Provenance(tool="wsiseg", version="0", slide="a", config_hash=""),
    )
    table = (ROOT / "docs/output.md").read_text().split("## cells.parquet")[1].split("## ")[0]
    documented = {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert documented == set(schema.names)


def test_nothing_points_outside_the_project() -> None:
    """No path of a machine; the folder beside the checkout only where real data are read."""
    may_look_beside = ("tests", "benchmarks", "training", ".ci")
    workplace, beside = "/" + "work/", "../" + "shared"
    for path in project_files():
        text = path.read_text(errors="ignore")
        place = path.relative_to(ROOT)
        assert workplace not in text, place
        assert beside not in text or place.parts[0] in may_look_beside, place


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 40


@pytest.fixture(scope="module")
def array_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the array script on the demo slide, with the example's clicks beside it; returns the folder of the run."""
    folder = tmp_path_factory.mktemp("examples")
    assert CliRunner().invoke(main, ["demo", str(folder)]).exit_code == 0
    (folder / "ihc.seeds.json").write_bytes((ROOT / "examples/seeds.json").read_bytes())
    (folder / "slides.txt").write_text(f"nowhere.svs\n{folder / 'ihc.tiff'}\n")
    script = ["bash", str(ROOT / "examples/slurm_array.sh"), str(folder / "slides.txt"), str(folder / "out")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        script,
        env={**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    beyond = subprocess.run(
        script,
        env={**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert beyond.returncode == 2
    assert "no line 3" in beyond.stderr
    return folder / "out/ihc"


def test_the_array_script_and_the_reader_agree(array_run: Path) -> None:
    """The counts that ``read_cells.py`` prints are those of the run."""
    types = json.loads((array_run / "manifest.json").read_text())["types"]
    done = run_example("read_cells.py", str(array_run / "cells.parquet"))
    printed = {
        row.split()[0]: int(row.split()[1]) for row in done.splitlines() if row.split()[:1] and row.split()[0] in types
    }
    assert printed == {name: n for name, n in types.items() if n}
    assert types["epithelium"]
    assert types["stroma"]


def test_manifest_keys_are_in_the_docs(array_run: Path) -> None:
    manifest = json.loads((array_run / "manifest.json").read_text())
    table = (ROOT / "docs/output.md").read_text().split("## manifest.json")[1]
    documented = {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert set(manifest) | set(manifest["counts"]) == documented


def test_the_library_example_counts_types() -> None:
    rows = dict(line.split() for line in run_example("segment_image.py").splitlines())
    assert int(rows["epithelium"]) > 0
    assert int(rows["stroma"]) > 0
    assert int(rows["all"]) == sum(int(count) for name, count in rows.items() if name != "all")


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_seeds_in_the_docs_are_valid(tmp_path: Path) -> None:
    """``examples/seeds.json`` and the files shown in README and docs pass the schema and the reader."""
    from wsiseg.formats.seeds import read_seeds

    schema = json.loads((ROOT / "wsiseg/formats/seeds.schema.json").read_text())
    shown = [
        text
        for page in PAGES
        for text in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    for text in [(ROOT / "examples/seeds.json").read_text(), *shown]:
        jsonschema.validate(json.loads(text), schema)
        (tmp_path / "seeds.json").write_text(text)
        assert read_seeds(tmp_path / "seeds.json").types
    assert len(shown) >= 2


def test_settings_shown_in_the_docs_are_valid(tmp_path: Path) -> None:
    from wsiseg.config import read_config

    shown = [
        text
        for page in PAGES
        for text in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    assert shown
    for text in shown:
        (tmp_path / "settings.toml").write_text(text)
        read_config(tmp_path / "settings.toml")


def test_help_imports_nothing_heavy() -> None:
    """``wsiseg --help`` stays quick: neither torch nor dask nor numpy."""
    script = (
        "import sys\nsys.argv = ['wsiseg', '--help']\nfrom wsiseg.cli import main\n"
        "try:\n    main()\nfinally:\n    print('HEAVY', sorted({'torch', 'dask', 'distributed', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Exit status" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("arguments", [["--help"], *([*name.split(), "--help"] for name in commands())], ids=" ".join)
def test_help_keeps_its_lines(arguments: list[str]) -> None:
    """A marker of click that is shown instead of obeyed runs the examples together."""
    assert "\\b" not in CliRunner().invoke(main, arguments).output


def test_everything_needed_is_pinned() -> None:
    """Every requirement has a pin that it admits; torch's names no build, so that an installed one is kept."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert re.fullmatch(r"[0-9][\w.]*", version), line
            pins[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [r for group in project["dependency-groups"].values() for r in group if isinstance(r, str)]
    for text in project["project"]["dependencies"] + groups:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), text
    assert pins["torch"] == "2.13.0"


def test_recipes_install_what_the_project_needs() -> None:
    """Dockerfile, Apptainer and conda: the versions of Python and the requirements are those of pyproject.toml, files exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    renamed = {"torch": "pytorch", "openslide-bin": "openslide", "dask": "dask-core"}
    needed = {"python": project["requires-python"]}
    for requirement in map(Requirement, project["dependencies"]):
        needed[renamed.get(requirement.name, requirement.name)] = str(requirement.specifier)
    needed["openslide"] = ">=4.0.0"  # a library there, a build of a wheel here
    recipe = yaml.safe_load((ROOT / "recipes/conda/recipe.yaml").read_text())
    assert dict(line.split(" ", 1) for line in recipe["requirements"]["run"]) == needed
    assert recipe["package"] == {"name": project["name"], "version": __version__}
    scripts = [f"{name} = {place}" for name, place in project["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts
    docker, apptainer = ((ROOT / name).read_text() for name in ("Dockerfile", "recipes/apptainer.def"))
    image = re.search(r"^From: (python:(\S+)-slim)$", apptainer, re.MULTILINE)
    assert image
    assert re.findall(r"^FROM (\S+)", docker, re.MULTILINE) == [image[1], image[1]]
    assert f"Python :: {image[2]}" in " ".join(project["classifiers"])
    copied = " ".join(re.findall(r"^COPY ([\w. ]+) \./", docker, re.MULTILINE)).split()
    assert copied == re.search(r"%files\n(.*?)\n\n", apptainer, re.DOTALL)[1].replace("/src/", "").split()
    assert all((ROOT / name).exists() for name in copied)
    installs = [re.findall(r"pip install --no-cache-dir -c \S+", text) for text in (docker, apptainer)]
    assert [len(found) for found in installs] == [2, 2]


def test_licences_are_there() -> None:
    """The licence in full; every collection of the training recipe, and both algorithms, with their sources."""
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()
    notice = (ROOT / "NOTICE").read_text()
    data = ("TNBC", "licenses/by/4.0", "DSB 2018", "CC0", "NuCLS", "BRCA-M2C", "Copyright (c) 2022, TopoXLab")
    for word in (*data, "NuInsSeg", "EfficientNet-Lite2", "micro-sam", "Chain-of-Prompts", "scikit-image"):
        assert word in notice
    version = re.search(r'__version__ = "(.+)"', (ROOT / "wsiseg/runtime/version.py").read_text())
    assert version
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"[{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()
