"""The recipe runs from data on disk to a card, and a killed run goes on. On tiny made-up data: what it learns is for the benchmarks."""

from __future__ import annotations

import ast
import csv
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.draw import disk

from wsiseg.models import load_model

ROOT = Path(__file__).parents[1]


def field(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Dark discs on pink: image, label, centres."""
    image = np.full((192, 192, 3), (235, 190, 215), np.uint8)
    label = np.zeros((192, 192), np.uint16)
    centres = [(y, x) for y in range(24, 192, 36) for x in range(24, 192, 36)]
    for i, centre in enumerate(centres, 1):
        rows, columns = disk(centre, rng.uniform(8, 13))
        image[rows, columns] = (90, 60, 140)
        label[rows, columns] = i
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8), label, centres


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for name in ("tnbc", "dsb2018_histology", "nucls_mini"):
        for kind in ("image", "label", "type"):
            (root / "instances" / name / "train" / kind).mkdir(parents=True)
        image, label, _ = field(rng)
        folder = root / "instances" / name / "train"
        Image.fromarray(image).save(folder / "image" / "a.png")
        Image.fromarray(label).save(folder / "label" / "a.png")
        if name == "nucls_mini":
            Image.fromarray(((label % 4 + 1) * (label > 0)).astype(np.uint8)).save(folder / "type" / "a.png")
    folder = root / "points" / "brca_m2c" / "train"
    (folder / "image").mkdir(parents=True)
    (folder / "points").mkdir()
    image, _, centres = field(rng)
    Image.fromarray(image[::2, ::2]).save(folder / "image" / "b.png")
    with (folder / "points" / "b.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["x", "y", "type"])
        writer.writerows((x / 2, y / 2, 1 + k % 3) for k, (y, x) in enumerate(centres))
    return root


def train(data: Path, out: Path, steps: int) -> str:
    options = ["--data", str(data), "--out", str(out), "--steps", str(steps), "--batch", "2", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "training.train_nuclei_compact", *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_recipe_from_data_to_card_and_on_after_a_stop(data, tmp_path) -> None:
    out = tmp_path / "out"
    train(data, out, 3)
    weights = out / "nuclei-compact.safetensors"
    first = weights.read_bytes()
    load_model(str(weights), "cpu")
    card = (out / "nuclei-compact.md").read_text()
    assert "3 steps" in card
    assert "CC BY 4.0" in card
    with (out / "images.csv").open() as stream:
        assert [row["set"] for row in csv.DictReader(stream)] == [
            f"{n}/train" for n in ("tnbc", "dsb2018_histology", "nucls_mini", "brca_m2c")
        ]
    assert "resuming at step 3" in train(data, out, 5)
    assert weights.read_bytes() != first
    assert "5 steps" in (out / "nuclei-compact.md").read_text()


def test_the_seed_alone_decides(data, tmp_path) -> None:
    train(data, tmp_path / "a", 2)
    train(data, tmp_path / "b", 2)
    a, b = ((tmp_path / k / "nuclei-compact.safetensors").read_bytes() for k in "ab")
    assert a == b


def test_the_shipped_list_of_images_names_no_evaluation_set() -> None:
    with (ROOT / "training/images.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["set"] for row in rows} == {
        "tnbc/train",
        "dsb2018_histology/train",
        "nucls_mini/train",
        "brca_m2c/train",
    }
    assert all(row["licence"] in ("CC BY 4.0", "CC0 1.0", "BSD-3-Clause") for row in rows)
    assert not any("TCGA-A7-A13E" in row["image"] for row in rows)


def test_the_type_space_is_found_again(monkeypatch) -> None:
    """Cells drawn from known means, covariance and image shifts: what `fit` estimates is what they were drawn from."""
    monkeypatch.syspath_prepend(str(ROOT))
    fit_types = importlib.import_module("training.fit_types")
    rng = np.random.default_rng(0)
    size, scale = 8, np.linspace(0.5, 2, 8)
    means = 10 * np.eye(size)[:4]
    collections = {}
    for name, codes in (("brca_m2c", {1: 0, 2: 1, 3: 2}), ("nucls_mini", {1: 1, 2: 2, 3: 0, 4: 3})):
        images = []
        for _ in range(30):
            shift = 1.5 * rng.standard_normal(size)
            types = rng.choice(list(codes), 400)
            z = means[[codes[t] for t in types]] + shift + scale * rng.standard_normal((400, size))
            images.append((z, types))
        collections[name] = images
    space = fit_types.fit(collections)
    seen = [(space.project(z.astype(np.float32)), types) for z, types in collections["brca_m2c"]]
    within = np.mean([np.cov(z[types == t], rowvar=False) for z, types in seen for t in (1, 2, 3)], 0)
    # half of the covariance is rounded (SHRINK_WITHIN), so narrow directions come out narrower than 1, wide ones wider
    wide = np.linalg.eigvalsh(within)
    assert 0.15 < wide[0] < 1 < wide[-1] < 1.5
    expected = means[:3] @ space.transform
    apart = [np.linalg.norm(m[1:] - m[0], axis=1) for m in (space.reference_classes, expected)]
    np.testing.assert_allclose(apart[0], apart[1], rtol=0.05)
    np.testing.assert_allclose(space.slide_variance, (1.5**2 * (space.transform**2).sum(0)), rtol=0.7)
    assert space.class_variance.mean() < 0.1 * space.between_variance[-3:].mean()


SCRIPTS = [path for folder in ("training", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_public_names_from_packages(script: Path) -> None:
    """No change of ``sys.path``, no name with an underscore of another module."""
    assert len(SCRIPTS) > 30
    text = script.read_text()
    assert "sys.path" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
            assert node.module == "__future__" or not private


def test_every_script_imports_from_the_root_of_the_checkout() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SCRIPTS if path.name != "__init__.py"]
    program = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-c", program, *modules], check=False, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_documented_scripts_exist() -> None:
    """``python -m training.X`` in pages and docstrings names a module; no page shows a script run by its path."""
    pages = [*SCRIPTS, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("training/*.md")]
    pages += ROOT.glob("benchmarks/results/*.md")
    text = "\n".join(path.read_text() for path in pages)
    named = re.findall(r"python -m ((?:training|benchmarks)[.\w]*)", text)
    assert len(set(named)) > 15
    assert not [name for name in named if not (ROOT / f"{name.replace('.', '/')}.py").is_file()]
    assert not re.findall(r"python (?:training|benchmarks)/\S+", text)
