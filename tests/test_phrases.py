"""Phrases on the packaged network: the table of words, the decoder, its training by groups of phrases, and `run --method text` with the result."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file
from skimage.draw import disk
from tokenizers import Tokenizer, models, pre_tokenizers

import wsiseg as library
from wsiseg.errors import ConfigError, WeightsError
from wsiseg.finetune.config import FinetuneConfig
from wsiseg.finetune.phrase_networks import with_stray_words
from wsiseg.finetune.prompts import read_prompt_bank
from wsiseg.finetune.run import finetune
from wsiseg.models import find_weights, load_model
from wsiseg.models.cards import text_card
from wsiseg.models.catalogue import verify
from wsiseg.models.phrases import PLACE, STRIDE_PX, PhraseDecoder, Vocabulary, plain_phrase, share_inside
from wsiseg.models.registry import MODELS
from wsiseg.models.text_encoder import open_text_encoder
from wsiseg.records import Embeddings, WindowMasks

TYPES = ("Blue", "dark")
COLOURS = ((60, 110, 190), (90, 60, 140))
SIDE = 320


def write_table(folder: Path, *, rows: int | None = None, matrices: int = 1) -> Path:
    """A text encoder: random vectors for the words of the package's phrases, and longer ones for those of the types, as rare words have."""
    bank = read_prompt_bank()
    phrases = [*bank.phrases(None), *(p for name in (*TYPES, "slate") for p in bank.phrases(name))]
    phrases = [plain_phrase(phrase) for phrase in phrases]
    words = sorted({word for phrase in phrases for word in phrase.replace(",", " ,").split()})
    words += [f"other{k}" for k in range(1000)]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    vectors = np.random.default_rng(0).normal(size=(rows or len(words) + 1, 64)).astype(np.float32)
    vectors[[k for k, word in enumerate(["?", *words]) if word in ("blue", "dark", "slate") and k < len(vectors)]] *= (
        10  # as rare words have in such tables
    )
    save_file({f"table{k}": vectors for k in range(matrices)}, folder / "model.safetensors")
    return folder


def tissue(seed: int, side: int = SIDE, kinds: tuple[int, ...] = (1, 2)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Discs of one or two colours on pink: image, label, type."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), (235, 190, 215), np.uint8)
    label, kind = np.zeros((side, side), np.uint16), np.zeros((side, side), np.uint8)
    for i, (y, x) in enumerate(((y, x) for y in range(24, side - 12, 40) for x in range(24, side - 12, 40)), 1):
        rows, columns = disk((y, x), rng.uniform(9, 13), shape=label.shape)
        of = int(rng.choice(kinds))
        kind[rows, columns], label[rows, columns] = of, i
        image[rows, columns] = COLOURS[of - 1]
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8), label, kind


def write_images(folder: Path, count: int = 4) -> Path:
    for name in ("image", "label", "type"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        for name, plane in zip(
            ("image", "label", "type"), tissue(seed, kinds=((1, 2), (2,))[seed % 4 == 3]), strict=True
        ):
            Image.fromarray(plane).save(folder / name / f"s{seed}.png")
    (folder / "classes.json").write_text(json.dumps(dict(enumerate(TYPES, 1))))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "words")


@pytest.fixture(scope="module")
def adapted(data, table, tmp_path_factory) -> Path:
    """The packaged network with a decoder of phrases for two colours."""
    out = tmp_path_factory.mktemp("adapted") / "phrases.safetensors"
    config = FinetuneConfig(
        objective="prompt-group", text_encoder=str(table), epochs=80, batch_size=1, rate=5e-3, checks=2, device="cpu"
    )
    finetune(data, out, config=config, mpp=0.25)
    return out


# ------------------------------------------------------------------------------------------------------------------ words


def test_a_phrase_is_the_mean_of_its_words(table):
    encoder = open_text_encoder(str(table))
    vectors = encoder.vectors[encoder.tokenizer.encode("dark nuclei").ids].mean(0)
    assert encoder.encode("dark nuclei") == pytest.approx(vectors / np.linalg.norm(vectors), abs=1e-6)
    assert encoder.encode("nuclei dark") == pytest.approx(encoder.encode("dark nuclei"), abs=1e-6)
    assert np.linalg.norm(encoder.encode("segment all dark nuclei")) == pytest.approx(1, abs=1e-5)
    assert not encoder.encode("").any()
    assert plain_phrase("  Dark\tNuclei ") == "dark nuclei"


def test_the_table_of_a_published_package_is_read():
    pytest.importorskip("wordllama")
    encoder = open_text_encoder("wordllama")
    one, same, other = (encoder.encode(p) for p in ("lymphocyte nuclei", "nuclei of lymphocytes", "muscle fibre"))
    assert encoder.width == 256
    assert one @ same > 0.8 > one @ other


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer's"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda f: write_table(f, matrices=2), "one matrix is needed"),
        (lambda f: write_table(f, rows=3), "do not belong together"),
    ],
)
def test_a_damaged_text_encoder_ends_in_one_line(damage, words, data, tmp_path, wsiseg):
    folder, out = write_table(tmp_path / "words"), tmp_path / "new.safetensors"
    damage(folder)
    more = ["--objective", "prompt-group", "--text-encoder", folder, "--mpp", 0.25, "--out", out]
    status, output = wsiseg("finetune", data, *more)
    assert status == 1
    assert f"text encoder {folder}: " in output
    assert words in output
    assert not out.exists()


def test_a_text_encoder_that_is_not_there_says_what_can_be_given(tmp_path):
    with pytest.raises(ConfigError, match=r"no such folder; one with tokenizer.json and model.safetensors is needed"):
        open_text_encoder(str(tmp_path / "none"))


def test_further_names_of_a_type_take_its_phrases(tmp_path):
    (tmp_path / "more.json").write_text('{"names": {"lymphocyte": ["immune"]}}')
    bank = read_prompt_bank(tmp_path / "more.json")
    assert {"lymphocyte nuclei", "immune nuclei"} <= set(bank.phrases("lymphocyte", "low"))
    assert "plasma cell nuclei" in bank.phrases("plasma_cell", "low")
    (tmp_path / "more.json").write_text('{"names": {"lymphocyte": "immune"}}')
    with pytest.raises(ConfigError, match=r"names, lymphocyte is \"immune\"; a list of names is needed"):
        read_prompt_bank(tmp_path / "more.json")


# ------------------------------------------------------------------------------------------------------------------ decoder


def pyramid(seed: int, side: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = {"p2": (32, side // 4), "p4": (64, side // 4), "p8": (96, side // 8)}
    return {name: torch.randn((1, width, n, n), generator=generator) for name, (width, n) in sides.items()}


def test_maps_depend_on_their_own_phrase_and_on_pixels_nearby():
    torch.manual_seed(0)
    decoder, phrases = PhraseDecoder(24).eval(), torch.randn(3, 24)
    whole = pyramid(1, 256)
    with torch.inference_mode():
        maps = decoder(decoder.features(whole), phrases)
        alone = decoder(decoder.features(whole), phrases[1:2])
        part = {name: level[:, :, : level.shape[2] // 2, : level.shape[3] // 2] for name, level in whole.items()}
        corner = decoder(decoder.features(part), phrases)
    assert maps.shape == (3, 64, 64)
    assert torch.allclose(maps[1:2], alone, atol=1e-5)
    assert torch.allclose(maps[:, :27, :27], corner[:, :27, :27], atol=1e-5)  # all but the cells near the cut
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)


def test_a_cell_scores_what_its_mask_covers():
    """Of a map that is 1 on the left half: a mask on it, a mask off it, and one that lies on both."""
    decoder = PhraseDecoder(4)
    decoder.forward = lambda features, phrases: torch.where(torch.arange(64) < 32, 40.0, -40.0).expand(
        len(phrases), 64, 64
    )
    decoder.features = lambda pyramid: pyramid["p4"]
    logits = torch.full((3, 64, 64), -1.0)
    logits[:, 24:40, 24:40] = 1.0
    origin = torch.tensor([[0, 64], [120, 64], [64, 64]])  # px; a window is 128 px wide, and the map 256
    many = torch.zeros(3)
    masks = WindowMasks(
        logits=logits,
        origin_xy=origin,
        mask_stride_px=2,
        predicted_iou=many,
        stability=many,
        descriptors=torch.zeros(3, 1),
        points_xy=torch.zeros(3, 2),
    )
    extra = {"p2": torch.zeros(1, 32, 128, 128), "p4": torch.zeros(1, 64, 64, 64), "p8": torch.zeros(1, 96, 32, 32)}
    empty = torch.zeros(1, 1, 64, 64)
    maps = decoder.maps(Embeddings(high=empty, low=empty, maps=None, extra=extra), 0, torch.zeros(6, 4))
    scores = share_inside(maps, masks)
    assert scores.shape == (3, 6)
    assert STRIDE_PX == 4
    assert scores[:, 0].tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------------ training


def test_stray_words_turn_phrases_a_little_and_only_some(table):
    encoder = open_text_encoder(str(table))
    phrases = torch.from_numpy(np.stack([encoder.encode("dark nuclei")] * 400))
    varied = with_stray_words(phrases, encoder.vectors, np.random.default_rng(0))
    same = (varied * phrases).sum(1)
    assert torch.allclose(varied.norm(dim=1), torch.ones(400), atol=1e-5)
    assert 0.4 < (same > 1 - 1e-5).float().mean() < 0.6
    assert same.min() > 0.3
    assert torch.equal(varied, with_stray_words(phrases, encoder.vectors, np.random.default_rng(0)))


def test_groups_of_phrases_teach_the_decoder_and_nothing_else(adapted, table):
    rows = [json.loads(line) for line in (adapted.with_suffix(".training") / "curve.jsonl").read_text().splitlines()]
    group = [row["group"] for row in rows if "group" in row]
    assert group[-1] < 0.5 * group[0]
    assert min(row["_least_weight"] for row in rows if "_least_weight" in row) >= 0
    told = json.loads(adapted.with_suffix(".card.json").read_text())
    assert told["after"]["dice"] > max(0.8, told["before"]["dice"] + 0.3)
    assert told["after"]["spread"] < 0.05
    before, after = load_file(find_weights("nuclei-compact")[1]), load_file(adapted)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"phrases"}
    card, _ = find_weights(str(adapted))
    assert card.text is not None
    assert card.text.types == TYPES
    assert card.text.sha256 == open_text_encoder(str(table)).sha256
    assert {"dark nuclei", "segment nuclei", "blue nuclei"} <= set(card.text.phrases)


@pytest.mark.parametrize(
    ("phrases", "expected"),
    [
        (("dark", "Blue"), {"dark", "Blue"}),
        (("blue nuclei",), {"blue nuclei"}),
        (("segment nuclei",), {"segment nuclei"}),
    ],
)
def test_cells_are_typed_by_phrases_without_a_click(phrases, expected, adapted):
    image, label, kind = tissue(50)
    cells = library.segment_image(image, mpp=0.25, model=adapted, text=phrases, device="cpu")
    table = cells.to_geodataframe()
    assert expected <= set(table.cell_type) <= {*expected, "unassigned"}
    table = table[table.cell_type != "unassigned"]
    middle = table.geometry.centroid
    true = kind[middle.y.astype(int), middle.x.astype(int)]
    names = {"Blue": 1, "blue nuclei": 1, "dark": 2}
    if "segment nuclei" in phrases:
        assert len(table) >= 0.9 * label.max()
    else:
        right = np.array([names[name] for name in table.cell_type]) == true
        assert right.mean() > 0.9
        assert (
            right.sum()
            >= 0.8
            * np.isin([kind[label == i][0] for i in range(1, label.max() + 1)], [names[p] for p in phrases]).sum()
        )


def test_an_absent_type_has_no_cells(adapted, tmp_path, wsiseg):
    """And a run that finds none names the phrase, not the scale."""
    image, *_ = tissue(51, kinds=(2,))
    cells = library.segment_image(image, mpp=0.25, model=adapted, text=("blue",), device="cpu")
    assert len(cells) <= 1
    Image.fromarray(image).save(tmp_path / "slide.tif")
    (tmp_path / "settings.json").write_text('{"tissue": {"enabled": false}, "detection": {"min_score": 0.99}}')
    more = ["--text", "blue", "--mpp", 0.25, "--model", adapted, "--config", tmp_path / "settings.json"]
    status, output = wsiseg("run", tmp_path / "slide.tif", *more, "--out", tmp_path / "run", "--no-report")
    assert status == 0, output
    assert "no cell is meant by 'blue' in" in output
    assert "scale" not in output


def test_other_prompts_give_what_the_parent_gives(adapted):
    image, *_ = tissue(52)
    found = [library.segment_image(image, mpp=0.25, model=m, device="cpu") for m in (adapted, "nuclei-compact")]
    a, b = (cells.to_geodataframe() for cells in found)
    assert len(a) == len(b) > 20
    assert a.geometry.equals(b.geometry)


def test_types_by_words_are_doubted_on_other_tissue_and_stains():
    """The packaged decoder says what tissue it learned types on; a file of before says nothing, and is read."""
    doubts = load_model("nuclei-compact", "cpu").vocabulary.doubts
    assert not doubts(["all nuclei"], "he", 1)
    (doubt,) = doubts(["lymphocyte", "stromal"], "he", 2)
    assert "as it learned them on breast" in doubt
    (doubt,) = doubts(["lymphocyte", "stromal"], "ihc", 2)
    assert "the slide's stain is ihc" in doubt
    stated = {"encoder": "table", "sha256": "0", "width": 2, "phrases": ["nuclei"], "types": []}
    assert text_card(stated, Path("a.safetensors")).tissue == ""
    for wrong in ({"tissue": 5}, {"tissues": "breast"}):
        with pytest.raises(WeightsError, match=r"a\.safetensors"):
            text_card(stated | wrong, Path("a.safetensors"))


def test_a_phrase_that_is_known_needs_no_text_encoder(adapted, table, tmp_path, monkeypatch):
    """Others do: with it they are read, and doubted; without it the message names it."""
    model = load_model(str(adapted), "cpu")
    known = model.vocabulary.encode_text(" DARK  nuclei ")
    assert torch.allclose(known, torch.from_numpy(open_text_encoder(str(table)).encode("dark nuclei"))[None])
    assert not model.vocabulary.doubts(["dark nuclei", "segment nuclei"], "he", 2)
    (doubt,) = model.vocabulary.doubts(["slate nuclei"], "he", 1)
    assert "not with 'slate nuclei'" in doubt
    assert "all nuclei and those of Blue, dark" in doubt
    assert model.vocabulary.encode_text("slate nuclei").shape == (1, 64)
    moved = table.rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(
            ConfigError, match=r"'slate nuclei': not among the \d+ phrases that phrases learned .*no such folder"
        ):
            model.vocabulary.encode_text("slate nuclei")
        assert model.vocabulary.encode_text("Blue").shape == (1, 64)
        monkeypatch.setenv(PLACE, str(moved))
        assert model.vocabulary.encode_text("slate nuclei").shape == (1, 64)
    finally:
        monkeypatch.delenv(PLACE, raising=False)
        moved.rename(table)
    changed = Vocabulary(model.phrases, dataclasses.replace(model.vocabulary.text, sha256="0" * 64), "phrases")
    with pytest.raises(ConfigError, match="not the one that phrases was trained with"):
        changed.encode_text("slate nuclei")


def test_run_takes_phrases_and_writes_their_types(adapted, tmp_path, wsiseg):
    image, _, kind = tissue(53, 640)
    Image.fromarray(image).save(tmp_path / "slide.tif")
    more = ["--mpp", 0.25, "--model", adapted, "--out", tmp_path / "run", "--no-report", "--device", "cpu"]
    (tmp_path / "settings.json").write_text('{"tissue": {"enabled": false}, "tiling": {"tile_um": 64}}')
    options = [*more, "--config", tmp_path / "settings.json"]
    status, output = wsiseg("run", tmp_path / "slide.tif", "--text", "dark", "--text", "Blue", *options)
    assert status == 0, output
    assert "what new words mean" not in output
    folder = next(path.parent for path in (tmp_path / "run").rglob("manifest.json"))
    assert json.loads((folder / "manifest.json").read_text())["config"]["method"] == "text"
    cells = library.read_cells(folder).to_geodataframe()
    middle = cells.geometry.centroid
    true = np.array(["", *TYPES])[kind[middle.y.astype(int), middle.x.astype(int)]]
    assert len(cells) > 200
    assert (cells.cell_type == true).mean() > 0.9
    status, output = wsiseg("run", tmp_path / "slide.tif", "--text", "slate nuclei", "--overwrite", *options)
    assert status == 0, output
    assert "not with 'slate nuclei': what new words mean is guessed from similar ones" in output
    status, output = wsiseg("run", tmp_path / "slide.tif", "--text", "dark", "--known-types", "--overwrite", *options)
    assert status == 1
    assert "--known-types and --method text: both say what the types are" in output


def command(data: Path, table: Path, out: Path) -> list[str]:
    options = ["--objective", "prompt-group", "--text-encoder", table, "--mpp", 0.25, "--out", out, "--epochs", 6, "-q"]
    return [
        sys.executable,
        "-m",
        "wsiseg",
        "finetune",
        str(data),
        *map(str, options),
        "--batch-size",
        "1",
        "--device",
        "cpu",
    ]


def test_killed_and_continued_it_ends_with_the_same_bytes(data, table, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(data, table, tmp_path / "whole.safetensors"), check=True, env=environment)
    out = tmp_path / "new.safetensors"
    process = subprocess.Popen(command(data, table, out), env=environment)
    state, curve = tmp_path / "new.training" / "state.pt", tmp_path / "new.training" / "curve.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if state.exists() and curve.exists() and len(curve.read_text().splitlines()) >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    subprocess.run(command(data, table, out), check=True, env=environment)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_adapting_outlines_drops_phrases_and_says_what_it_takes(adapted, data, tmp_path):
    """Phrases were learned on features that change."""
    out = tmp_path / "outlines.safetensors"
    config = FinetuneConfig(epochs=0.3, batch_size=1, checks=1, device="cpu")
    finetune(data, out, model=adapted, config=config, mpp=0.25, no_valid=True)
    assert load_model(str(out), "cpu").prompts == ("points", "boxes")
    assert find_weights(str(out))[0].text is None


# ------------------------------------------------------------------------------------------------------------------ the package's phrases


def test_a_phrase_for_all_nuclei_finds_those_of_the_demo(demo, tmp_path, wsiseg):
    """And that phrases for types were learned on another stain than the demo's is said."""
    more = ["--out", tmp_path / "run", "--no-report", "--device", "cpu"]
    status, output = wsiseg("run", demo[0], "--text", "All  Nuclei", *more)
    assert status == 0, output
    assert "learned phrases on H&E, and the slide's stain is ihc" in output
    assert "not with" not in output
    cells = library.read_cells(next(path.parent for path in tmp_path.rglob("manifest.json"))).to_geodataframe()
    assert set(cells.cell_type) == {"All Nuclei"}
    assert len(cells) > 250


def test_weights_without_a_decoder_of_phrases_read_no_text(demo, tmp_path, wsiseg):
    """Other weights of the same network: the package's decoder was trained on the features of its own."""
    copy = shutil.copy(find_weights("nuclei-compact")[1], tmp_path / "mine.safetensors")
    status, output = wsiseg("run", demo[0], "--text", "lymphocyte", "--model", copy, "--out", tmp_path / "run")
    assert status == 1
    assert "reads no text; leave --model out for nuclei-compact, or pass an imported SAM 3" in output


def test_a_damaged_decoder_of_phrases_is_found(monkeypatch, tmp_path):
    card = find_weights("nuclei-compact")[0]
    damaged = tmp_path / "phrases.safetensors"
    damaged.write_bytes(card.phrases.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError, match="sha256 differs from the card"):
        verify(dataclasses.replace(card, phrases=damaged))
    monkeypatch.setitem(MODELS, "nuclei-compact", dataclasses.replace(card, phrases_sha256="0" * 64))
    with pytest.raises(WeightsError, match="the file is damaged: install wsiseg again"):
        load_model("nuclei-compact", "cpu")
    save_file({"a": np.zeros(1)}, damaged, {"wsiseg": json.dumps({"text": {"encoder": "wordllama"}})})
    with pytest.raises(WeightsError, match="belong to another version"):
        dataclasses.replace(card, phrases=damaged).reading()


@pytest.mark.realdata
@pytest.mark.parametrize(
    "words", [("lymphocyte", "tumour", "stroma"), ("immune cells", "carcinoma", "connective tissue")]
)
def test_the_packages_decoder_types_true_nuclei(words, shared_data):
    """Dots of breast tissue that it was not trained on, typed by one phrase each: the macro-F1 of benchmarks/results/phrases.md less a margin."""
    folder = shared_data / "points/brca_m2c/dev"
    model = load_model("nuclei-compact", "cpu")
    phrases = torch.cat([model.vocabulary.encode_text(word) for word in words])
    table = np.zeros((4, 4))
    for path in sorted((folder / "image").iterdir())[:6]:
        image = Image.open(path).convert("RGB")
        side = [n * 2 // 16 * 16 for n in image.size]
        pixels = np.asarray(image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC))[
            : side[1], : side[0]
        ]
        rows = np.loadtxt(folder / "points" / f"{path.stem}.csv", delimiter=",", skiprows=1)
        xy = torch.from_numpy(rows[:, :2] * 2 + 1).float()
        inside = (xy < torch.tensor(side)).all(1)
        with torch.inference_mode():
            seen = model.encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
            masks = model.decode(seen, torch.zeros(int(inside.sum()), dtype=torch.long), xy[inside])
            scores = share_inside(model.phrases.maps(seen, 0, phrases), masks)
        given = np.where(scores.amax(1) >= 0.3, scores.argmax(1) + 1, 0)
        np.add.at(table, (rows[inside.numpy(), 2].astype(int), given), 1)
    f1 = [2 * table[k, k] / (table[k].sum() + table[:, k].sum()) for k in (1, 2, 3)]
    assert np.mean(f1) > 0.72
