"""Fine-tuning end to end on tiny made-up images: what is read, what is refused, and that a killed training ends with the same bytes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import shapely
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.draw import disk

from wsiseg.errors import FormatError
from wsiseg.finetune.config import FinetuneConfig
from wsiseg.finetune.data import read_dataset
from wsiseg.finetune.run import finetune
from wsiseg.finetune.splits import require_disjoint, split
from wsiseg.models import find_weights, load_model
from wsiseg.models.cards import file_hash

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 128


def tissue(seed: int, side: int = SIDE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Discs on pink, dark ones of type 1 and blue ones of type 2: image, label, type."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), (235, 190, 215), np.uint8)
    label, kind = np.zeros((side, side), np.uint16), np.zeros((side, side), np.uint8)
    for i, (y, x) in enumerate(((y, x) for y in range(20, side, 36) for x in range(20, side, 36)), 1):
        rows, columns = disk((y, x), rng.uniform(8, 13), shape=label.shape)
        kind[rows, columns] = 1 + i % 2
        image[rows, columns] = ((90, 60, 140), (60, 110, 190))[i % 2]
        label[rows, columns] = i
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8), label, kind


def write_images(folder: Path, count: int = 4, *, types: bool = True, first: int = 0, side: int = SIDE) -> Path:
    for kind in ("image", "label", *(("type",) if types else ())):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        image, label, kind = tissue(seed, side)
        Image.fromarray(image).save(folder / "image" / f"s{seed}.png")
        Image.fromarray(label).save(folder / "label" / f"s{seed}.png")
        if types:
            Image.fromarray(kind).save(folder / "type" / f"s{seed}.png")
    if types:
        (folder / "classes.json").write_text('{"1": "dark", "2": "blue"}')
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_images(tmp_path / "data")


# ------------------------------------------------------------------------------------------------------------------ reading


def test_images_labels_and_types_are_read_at_the_models_scale(data):
    """Half the resolution in, the model's out; ids without gaps; types by name."""
    found = read_dataset(data, model_mpp=0.25, mpp=0.5)
    assert found.type_names == ("blue", "dark")
    first = found.images[0]
    assert first.image.shape == (2 * SIDE, 2 * SIDE, 3)
    _, label, kind = tissue(0)
    assert (first.label[::2, ::2] == label).all()
    assert first.known.all()
    names = np.array(["", "blue", "dark"])[first.types]
    assert names[0] == ""
    for i in range(1, label.max() + 1):
        assert names[i] == {1: "dark", 2: "blue"}[kind[label == i][0]]
    assert found.nuclei == sum(len(np.unique(tissue(k)[1])) - 1 for k in range(4))


def test_a_table_gives_scale_and_group_of_each_image(data):
    with (data / "images.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [
                ["image", "group", "mpp"],
                ["s0", "p1", "0.25"],
                ["s1", "p1", "0.5"],
                ["s2", "p2", "0.25"],
                ["s3", "", "0.25"],
            ]
        )
    found = read_dataset(data, model_mpp=0.25)
    assert [i.group for i in found.images] == ["p1", "p1", "p2", "s3"]
    assert [i.image.shape[0] for i in found.images] == [SIDE, 2 * SIDE, SIDE, SIDE]


def test_the_patient_in_a_tcga_barcode_is_the_group(tmp_path):
    folder = write_images(tmp_path / "d", 2, types=False)
    for kind, name in (("image", "TCGA-A7-A13E-01Z-00-DX1_1"), ("label", "TCGA-A7-A13E-01Z-00-DX1_1")):
        (folder / kind / "s0.png").rename(folder / kind / f"{name}.png")
    assert {i.group for i in read_dataset(folder, model_mpp=0.25, mpp=0.25).images} == {"TCGA-A7-A13E", "s1"}


def outlines(label: np.ndarray, kind: np.ndarray) -> dict:
    """The cells as QuPath exports them, twice as large: px of a slide at 0.25 um with the image's at 0.5."""
    from wsiseg.formats.outlines import trace_labels

    features = []
    for i, shape in enumerate(trace_labels(label), 1):
        name = {1: "dark", 2: "blue"}[int(kind[label == i][0])]
        geometry = shapely.geometry.mapping(shapely.transform(shape, lambda xy: xy * 1.0))
        features.append(
            {
                "type": "Feature",
                "geometry": geometry,
                "properties": {"objectType": "detection", "classification": {"name": name}},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def test_slides_with_outlines_are_read_where_they_are_known(tmp_path):
    """The same nuclei as the label image; without a region only their surroundings are known, with one all of it."""
    image, label, kind = tissue(3)
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "a.geojson").write_text(json.dumps(outlines(label, kind)))
    found = read_dataset(tmp_path, model_mpp=0.25, mpp=0.25)
    (piece,) = found.images
    assert piece.group == "a"
    assert ((piece.label > 0) == (label > 0)).mean() > 0.995
    assert found.type_names == ("blue", "dark")
    assert 0.2 < piece.known.mean() < 0.999
    assert piece.known[label > 0].all()
    assert any("no region" in note for note in found.notes)
    square = {"type": "Polygon", "coordinates": [[[0, 0], [SIDE, 0], [SIDE, SIDE], [0, SIDE], [0, 0]]]}
    (tmp_path / "a.roi.geojson").write_text(json.dumps(square))
    again = read_dataset(tmp_path, model_mpp=0.25, mpp=0.25)
    assert again.images[0].known.all()
    assert again.digest() != found.digest()


def test_outlines_that_do_not_belong_to_their_slide_are_refused(tmp_path):
    image, label, kind = tissue(5)
    Image.fromarray(image).save(tmp_path / "a.png")
    content = outlines(label, kind)
    for feature in content["features"]:
        feature["geometry"]["coordinates"] = [[[x + 5000, y] for x, y in r] for r in feature["geometry"]["coordinates"]]
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"all outlines lie outside a\.png; do the two belong together"):
        read_dataset(tmp_path, model_mpp=0.25, mpp=0.25)
    points = [{"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [9, 9]}}]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": points}))
    with pytest.raises(FormatError, match=r"a\.geojson: 1 object, no polygon"):
        read_dataset(tmp_path, model_mpp=0.25, mpp=0.25)
    with pytest.raises(FormatError, match="no such folder"):
        read_dataset(tmp_path / "none", model_mpp=0.25)


def test_a_corrected_run_is_read_from_its_slide(tmp_path, make_run):
    image, label, kind = tissue(4)
    run = make_run(tmp_path / "run", [(10, 10, 20, "a")], ("a",), path=str(tmp_path / "s.png"), mpp=0.25)
    Image.fromarray(image).save(tmp_path / "s.png")
    with pytest.raises(FormatError, match=r"without corrected\.geojson; correct its cells"):
        read_dataset(run, model_mpp=0.25)
    (run / "corrected.geojson").write_text(json.dumps(outlines(label, kind)))
    (piece,) = read_dataset(run, model_mpp=0.25).images
    assert piece.group == "s"
    assert len(piece.types) - 1 == label.max()


def break_size(folder: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE - 8), np.uint16)).save(folder / "label" / "s1.png")


def break_colour(folder: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(folder / "label" / "s1.png")


def break_mask(folder: Path) -> None:
    Image.fromarray((tissue(1)[1] > 0).astype(np.uint8)).save(folder / "label" / "s1.png")


def break_missing(folder: Path) -> None:
    (folder / "label" / "s1.png").unlink()


def break_empty(folder: Path) -> None:
    for path in (folder / "label").iterdir():
        Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(path)


def break_types(folder: Path) -> None:
    Image.fromarray(np.zeros((SIDE - 1, SIDE), np.uint8)).save(folder / "type" / "s1.png")


def one_group(folder: Path) -> None:
    (folder / "images.csv").write_text("image,group\n" + "".join(f"s{k},p\n" for k in range(4)))


def break_folder(folder: Path) -> None:
    (folder / "label").rename(folder / "mine")


def break_pictures(folder: Path) -> None:
    for path in (folder / "image").iterdir():
        path.unlink()


def break_all(folder: Path) -> None:
    (folder / "image").rename(folder / "pictures")


def break_table(folder: Path) -> None:
    (folder / "images.csv").write_text("picture,mpp\ns1,0.25\n")


def break_names(folder: Path) -> None:
    (folder / "classes.json").write_text('{"1": 2}')


def scale_as_magnification(folder: Path) -> None:
    (folder / "images.csv").write_text("image,mpp\ns1,40\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_size, "s1.png: the label has 120 x 128 px, and s1.png 128 x 128"),
        (break_colour, "s1.png: a colour image or a stack"),
        (break_mask, "one id for 9 separate pieces, a mask of the foreground"),
        (break_missing, "s1.png: no label of this name"),
        (break_empty, "4 images, and no nucleus is labelled in any"),
        (break_types, "s1.png: the image of types has the shape"),
        (one_group, "of one slide or patient (p), which cannot both train and validate"),
        (scale_as_magnification, "line 2: mpp: 40"),
        (break_folder, "image/, and no label/ beside it"),
        (break_pictures, "image: no image in it"),
        (break_all, "neither image/ and label/, nor slides with outlines, nor a run"),
        (break_table, "the columns are picture, mpp; image is needed"),
        (break_names, "an object of type ids and their names is needed"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_data_ends_in_one_line_and_nothing_is_written(damage, words, data, tmp_path, wsiseg):
    damage(data)
    status, output = wsiseg("finetune", data, "--mpp", 0.25, "--out", tmp_path / "new.safetensors", "--epochs", 1)
    assert status == 1
    (line,) = [x for x in output.splitlines() if x.startswith("Error")]
    assert words in line
    assert not list(tmp_path.glob("new*"))


def test_an_image_without_a_scale_asks_for_one(data, tmp_path, wsiseg):
    status, output = wsiseg("finetune", data, "--out", tmp_path / "new.safetensors")
    assert status == 1
    assert "pass --mpp" in output or "give mpp" in output or "mpp" in output.splitlines()[-1]


def test_a_model_that_exists_is_not_replaced(data, tmp_path, wsiseg):
    out = tmp_path / "new.safetensors"
    out.write_bytes(b"precious")
    status, output = wsiseg("finetune", data, "--mpp", 0.25, "--out", out)
    assert status == 1
    assert "the file exists; give another name, or pass --overwrite" in output
    assert out.read_bytes() == b"precious"
    assert "a .safetensors file" in wsiseg("finetune", data, "--mpp", 0.25, "--out", tmp_path / "new.pt")[1]


def test_an_objective_that_a_model_has_no_prompts_for_is_refused(data, tmp_path, wsiseg):
    status, output = wsiseg(
        "finetune", data, "--mpp", 0.25, "--objective", "sampo", "--out", tmp_path / "new.safetensors"
    )
    assert status == 1
    assert "--objective sampo: nuclei-compact can be adapted with --objective supervised or prompt-group" in output


def test_phrases_for_an_objective_that_learns_none_are_refused(data, tmp_path, wsiseg):
    (tmp_path / "more.json").write_text("{}")
    more = ["--mpp", 0.25, "--prompts", tmp_path / "more.json", "--out", tmp_path / "new.safetensors"]
    status, output = wsiseg("finetune", data, *more)
    assert status == 1
    assert "--prompts: nuclei-compact learns no phrases with --objective supervised; leave it out" in output


@pytest.mark.parametrize(
    ("option", "value", "where"),
    [
        ("--intent", "all", "--objective sampo and prompt-group, SAM and SAM 3"),
        ("--text-encoder", "here", "nuclei-compact with --objective prompt-group"),
        ("--lora-rank", 4, "SAM and SAM 3"),
        ("--reading", "B", "--objective sampo"),
        ("--input-px", 256, "SAM"),
    ],
)
def test_a_setting_that_would_not_be_used_is_refused(option, value, where, data, tmp_path, wsiseg):
    status, output = wsiseg("finetune", data, "--mpp", 0.25, option, value, "--out", tmp_path / "new.safetensors")
    assert status == 1
    assert f"{option}: not used by nuclei-compact with --objective supervised, only by {where}; leave it out" in output
    assert not list(tmp_path.glob("new*"))


# ------------------------------------------------------------------------------------------------------------------ splitting


def test_a_split_keeps_groups_together_and_is_the_same_every_time(tmp_path):
    folder = write_images(tmp_path / "d", 10, types=False)
    (folder / "images.csv").write_text("image,group\n" + "".join(f"s{k},p{k // 3}\n" for k in range(10)))
    found = read_dataset(folder, model_mpp=0.25, mpp=0.25)
    sides = [split(found, 0.3, seed) for seed in (0, 0, 1, 2, 3)]
    for train, valid in sides:
        assert not {i.group for i in train.images} & {i.group for i in valid.images}
        assert len(train.images) + len(valid.images) == 10
        assert 1 <= len(valid.images) <= 4
        require_disjoint(train, valid)
    assert [i.name for i in sides[0][1].images] == [i.name for i in sides[1][1].images]
    assert len({tuple(i.name for i in valid.images) for _, valid in sides}) > 1


def test_a_slide_or_a_file_in_both_splits_is_refused(tmp_path, wsiseg):
    a, b = write_images(tmp_path / "a", types=False), write_images(tmp_path / "b", 1, types=False)
    out = tmp_path / "new.safetensors"
    status, output = wsiseg("finetune", a, "--valid", b, "--mpp", 0.25, "--out", out)
    assert status == 1
    assert "s0 is also in" in output
    for kind in ("image", "label"):
        (b / kind / "s0.png").rename(b / kind / "copy.png")
    status, output = wsiseg("finetune", a, "--valid", b, "--mpp", 0.25, "--out", out)
    assert status == 1
    assert "copy is the same file as s0" in output
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------------------ the packaged network


def command(data: Path, out: Path, *more: object) -> list[str]:
    options = ["--mpp", 0.25, "--out", out, "--epochs", 2, "--batch-size", 1, "--device", "cpu", "-q", *more]
    return [sys.executable, "-m", "wsiseg", "finetune", str(data), *map(str, options)]


def test_the_packaged_network_is_adapted_killed_and_continued_to_the_same_bytes(tmp_path):
    """The file runs, says where it is from, and holds the parent's batch statistics and type space."""
    data, out = write_images(tmp_path / "data", 3, types=False), tmp_path / "new.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(data, tmp_path / "whole.safetensors"), check=True, env=environment)
    process = subprocess.Popen(command(data, out), env=environment)
    state, deadline = tmp_path / "new.training" / "state.pt", time.monotonic() + 120
    curve = tmp_path / "new.training" / "curve.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        rows = curve.read_text().splitlines() if curve.exists() else []
        if len(rows) >= 2 and state.exists():  # at least one validation after the start
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    again = subprocess.run(command(data, out)[:-1], check=True, env=environment, capture_output=True, text=True)
    assert "steps on 2 images; on 1 validation images: aji" in again.stdout
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not state.exists()

    card, weights = find_weights(str(out))
    assert "Apache-2.0 (that of nuclei-compact" in card.licence
    told = json.loads(out.with_suffix(".card.json").read_text())
    parent = find_weights("nuclei-compact")[1]
    assert told["parent"]["sha256"] == file_hash(parent)
    assert told["parent"]["sha256"] in card.source
    assert set(told["after"]) == {"score", "aji", "pq", "dice"} == set(told["before"])
    assert len(told["data"]["train"]["files"]) == 2
    assert len(told["data"]["train"]["sha256"]) == 64
    before, after = load_file(parent), load_file(weights)
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k].float(), after[k])}
    assert "controller.0.weight" in moved
    assert not {k for k in moved if "running" in k or k.startswith("type_")}
    model = load_model(str(out), "cpu")
    assert model.types is not None
    assert any((tmp_path / "new.training" / "pictures").iterdir())


def test_the_adapted_file_is_what_run_takes(tmp_path, wsiseg, demo):
    data, out = write_images(tmp_path / "data", 3, types=False), tmp_path / "new.safetensors"
    done = finetune(data, out, config=FinetuneConfig(epochs=1, batch_size=1, device="cpu"), mpp=0.25)
    assert done.path == out
    corner = {"type": "Polygon", "coordinates": [[[380, 60], [480, 60], [480, 160], [380, 160], [380, 60]]]}
    (tmp_path / "roi.geojson").write_text(json.dumps(corner))
    options = ["--out", tmp_path / "run", "--no-report", "--format", "parquet", "--roi", tmp_path / "roi.geojson"]
    status, output = wsiseg("run", demo[0], "--model", out, *options)
    assert status == 0, output
    manifest = json.loads(next((tmp_path / "run").glob("*/manifest.json")).read_text())
    assert manifest["counts"]["cells"] > 0


def test_without_validation_the_last_average_is_kept(tmp_path, wsiseg):
    data, out = write_images(tmp_path / "data", 1, types=False), tmp_path / "new.safetensors"
    status, output = wsiseg(
        "finetune", data, "--mpp", 0.25, "--valid", "none", "--epochs", 1, "--batch-size", 1, "--out", out
    )
    assert status == 0, output
    assert "not validated" in output
    assert json.loads(out.with_suffix(".card.json").read_text())["after"] == {}


def test_a_loss_that_is_not_a_number_ends_in_one_line(tmp_path, wsiseg):
    data, out = write_images(tmp_path / "data", 2, types=False), tmp_path / "new.safetensors"
    more = ["--valid", "none", "--epochs", 20, "--batch-size", 1, "--rate", 1e6, "--out", out]
    status, output = wsiseg("finetune", data, "--mpp", 0.25, *more)
    assert status == 1
    assert "the loss is not a number at step" in output
    assert "lower --rate" in output
    assert not out.exists()


def test_other_settings_do_not_continue_a_stopped_training(tmp_path):
    data, out = write_images(tmp_path / "data", 2, types=False), tmp_path / "new.safetensors"
    config = FinetuneConfig(epochs=2, batch_size=1, device="cpu")
    from wsiseg.errors import InterruptedRunError, RunError

    with pytest.raises(InterruptedRunError, match="the same command continues"):
        finetune(data, out, config=config, mpp=0.25, no_valid=True, stopped=lambda: True)
    with pytest.raises(RunError, match="other settings, weights or images"):
        finetune(data, out, config=FinetuneConfig(epochs=3, batch_size=1, device="cpu"), mpp=0.25, no_valid=True)
    assert finetune(data, out, config=config, mpp=0.25, no_valid=True).steps > 1
