"""Points and phrases that mean the same; adapters; and SAM and SAM 3 through every objective on tiny random networks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage
from skimage.draw import disk
from torch import nn

from wsiseg.errors import ConfigError
from wsiseg.finetune.config import FinetuneConfig
from wsiseg.finetune.data import read_dataset
from wsiseg.finetune.lora import add_adapters, plain_state
from wsiseg.finetune.prompts import BORDER_PX, INSIDE, OUTSIDE, draw_point_sets, read_prompt_bank
from wsiseg.finetune.run import finetune
from wsiseg.finetune.sam_task import resized
from wsiseg.finetune.views import ALL, draw_view, intents_of
from wsiseg.models import load_model
from wsiseg.models.sam.checkpoints import recognise
from wsiseg.models.sam.modules import build
from wsiseg.models.store import import_model
from wsiseg.models.testing import VIT_TOY, random_sam, tiny_hub_model

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 128


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Labels of six discs, and the mask of three of them."""
    label = np.zeros((96, 96), np.int32)
    for i, centre in enumerate(((20, 20), (20, 70), (48, 45), (75, 20), (75, 70), (48, 85)), 1):
        label[disk(centre, 9, shape=label.shape)] = i
    return label, np.isin(label, (1, 3, 5))


def test_points_are_of_the_kind_that_they_are_asked_for():
    label, target = scene()
    depth, away = ndimage.distance_transform_edt(target), ndimage.distance_transform_edt(~target)
    known = np.ones(label.shape, bool)
    for quality in ("core", "border", "outside"):
        sets = draw_point_sets(target, label, known, 40, np.random.default_rng(0), quality)
        xy = sets.xy[sets.labels == INSIDE].astype(int)
        d, a = depth[xy[:, 1], xy[:, 0]], away[xy[:, 1], xy[:, 0]]
        if quality == "core":
            assert (d > BORDER_PX).all()
        elif quality == "border":
            assert ((d > 0) & (d <= BORDER_PX)).all()
        else:
            assert ((a > 0) & (a <= BORDER_PX)).all()
        outside = sets.xy[sets.labels == OUTSIDE].astype(int)
        assert len(outside) > 20
        assert np.isin(label[outside[:, 1], outside[:, 0]], (2, 4, 6)).all()  # other nuclei before background


def test_mixed_points_have_all_kinds_and_numbers_within_bounds():
    label, target = scene()
    sets = draw_point_sets(target, label, np.ones(label.shape, bool), 300, np.random.default_rng(1))
    inside, outside = (sets.labels == INSIDE).sum(1), (sets.labels == OUTSIDE).sum(1)
    assert set(inside) == {1, 2, 3}
    assert set(outside) == {0, 1, 2, 3}
    xy = sets.xy[sets.labels == INSIDE].astype(int)
    missed = ~target[xy[:, 1], xy[:, 0]]
    assert 0.04 < missed.mean() < 0.2
    assert len({tuple(points.ravel()) for points in sets.xy}) == 300


def test_all_nuclei_have_points_on_background_and_unknown_places_have_none():
    label, _ = scene()
    known = np.zeros(label.shape, bool)
    known[:60] = True
    sets = draw_point_sets(label > 0, label, known, 60, np.random.default_rng(2), "core")
    used = sets.xy[sets.labels >= 0].astype(int)
    assert (used[:, 1] < 60).all()
    outside = sets.xy[sets.labels == OUTSIDE].astype(int)
    assert (label[outside[:, 1], outside[:, 0]] == 0).all()


def test_the_bank_has_three_levels_and_takes_more(tmp_path):
    bank = read_prompt_bank()
    lengths = [np.mean([len(p.split()) for p in bank.phrases(None, level)]) for level in ("low", "medium", "high")]
    assert lengths == sorted(lengths)
    assert all(len(bank.phrases("lymphocyte", level)) >= 3 for level in ("low", "medium", "high"))
    assert not any("{" in phrase for phrase in bank.phrases("lymphocyte"))
    more = tmp_path / "more.json"
    more.write_text(
        json.dumps({"all": {"low": ["dots"]}, "types": {"lymphocyte": {"high": ["small round dark nuclei"]}}})
    )
    extended = read_prompt_bank(more)
    assert "dots" in extended.phrases(None, "low")
    assert set(bank.phrases(None)) < set(extended.phrases(None))
    assert "small round dark nuclei" in extended.phrases("lymphocyte")
    assert "small round dark nuclei" not in extended.phrases("tumour")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "an object with all, category, names or types is needed"),
        ({"nuclei": {}}, "an object with all, category, names or types is needed"),
        ({"all": {"easy": ["x"]}}, "lists of phrases under low, medium, high"),
        ({"all": {"low": "x"}}, "a list of phrases is needed"),
        ({"all": {"low": [" "]}}, "a list of phrases is needed"),
        ({"types": ["x"]}, "an object of names and their phrases"),
    ],
)
def test_a_bank_of_another_form_is_refused(content, words, tmp_path):
    path = tmp_path / "bank.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words):
        read_prompt_bank(path)


# ------------------------------------------------------------------------------------------------------------------ adapters


def test_adapters_change_nothing_at_first_and_end_as_plain_weights():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4)))
    x, names = torch.randn(3, 6), set(network.state_dict())
    before = network(x)
    assert add_adapters([network], rank=2) == 2
    assert add_adapters([network], rank=2) == 0  # not twice
    assert torch.equal(network(x), before)
    trained = [p for p in network.parameters() if p.requires_grad and p.ndim == 2]
    assert sorted(tuple(p.shape) for p in trained) == [(2, 5), (2, 6), (4, 2), (5, 2)]
    for p in trained:
        p.data += 0.3 * torch.randn_like(p)
    after = network(x)
    assert not torch.allclose(after, before)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4)))
    state = plain_state(network)
    assert set(state) == names
    plain.load_state_dict(state)
    assert torch.allclose(plain(x), after, atol=1e-6)


def test_the_update_of_a_layer_has_the_rank_of_its_adapter():
    layer = nn.Linear(10, 8)
    before = layer.weight.detach().clone()
    add_adapters([layer], rank=3)
    for p in layer.parameters():
        if p.requires_grad and p.ndim == 2:
            p.data.normal_()
    assert torch.linalg.matrix_rank(layer.weight.detach() - before) == 3


def test_a_sam_for_smaller_images_is_a_sam():
    """Positions are resized, the rest is kept; 224 px are one window, in which global and windowed attention are the same."""
    sam = {k: v.clone() for k, v in random_sam(VIT_TOY).state_dict().items()}
    small = resized(sam, 224)
    architecture = recognise(small)
    assert (architecture.grid, architecture.window) == (14, 14)
    assert small["image_encoder.pos_embed"].shape == (1, 14, 14, 48)
    assert torch.equal(small["image_encoder.blocks.0.attn.rel_pos_h"], sam["image_encoder.blocks.0.attn.rel_pos_h"])
    network = build(architecture)
    network.load_state_dict(small)
    assert network["image_encoder"](torch.randn(1, 3, 224, 224)).shape == (1, 256, 14, 14)
    assert resized(sam, 1024).keys() == sam.keys()
    with pytest.raises(ConfigError, match="not a multiple of 16"):
        resized(sam, 220)


# ------------------------------------------------------------------------------------------------------------------ networks


def write_images(folder: Path, count: int = 4, *, types: tuple[int, ...] = (1, 2)) -> Path:
    """Images of discs; the types of ``types`` in turn, each with its colour."""
    for kind in ("image", "label", *(("type",) if types else ())):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        image = np.full((SIDE, SIDE, 3), (235, 190, 215), np.uint8)
        label, kind = np.zeros((SIDE, SIDE), np.uint16), np.zeros((SIDE, SIDE), np.uint8)
        for i, (y, x) in enumerate(((y, x) for y in range(20, SIDE, 36) for x in range(20, SIDE, 36)), 1):
            place = disk((y, x), rng.uniform(8, 13), shape=label.shape)
            label[place], kind[place] = i, types[i % len(types)] if types else 0
            image[place] = ((90, 60, 140), (60, 110, 190))[i % 2]
        Image.fromarray(image).save(folder / "image" / f"s{seed}.png")
        Image.fromarray(label).save(folder / "label" / f"s{seed}.png")
        if types:
            Image.fromarray(kind).save(folder / "type" / f"s{seed}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """`toy`: a SAM."""
    folder = tmp_path_factory.mktemp("models")
    torch.save(random_sam(VIT_TOY).state_dict(), folder / "toy.pth")
    import_model(folder / "toy.pth", "toy", folder=folder, licence="Apache-2.0")
    return folder


@pytest.fixture(scope="module")
def words(store) -> Path:
    """The folder with `words` too: a SAM 3 detector that reads the words of the phrases."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformers.utils.logging.disable_progress_bar()
    bank = read_prompt_bank()
    phrases = [p for kind in (None, "1", "2") for p in bank.phrases(kind)]
    tokens = ["<s>", "</s>", "<unk>", *sorted({word for p in phrases for word in p.replace(",", " ").split()})]
    tokenizer = Tokenizer(models.WordLevel({token: k for k, token in enumerate(tokens[:120])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tiny_hub_model("sam3").save_pretrained(store / "hub")
    tokenizer.save(str(store / "hub" / "tokenizer.json"))
    import_model(store / "hub", "words", folder=store, mpp=0.25)
    return store


@pytest.fixture(autouse=True)
def my_models(store, monkeypatch):
    monkeypatch.setenv("WSISEG_MODELS", str(store))


def losses_of(out: Path, name: str) -> list[float]:
    rows = [json.loads(row) for row in (out.with_suffix(".training") / "curve.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_what_is_meant_needs_types_and_more_than_one(data, tmp_path):
    typed = read_dataset(data, model_mpp=0.25, mpp=0.25)
    assert intents_of(typed, "all") == ((ALL,),)
    assert intents_of(typed, "auto") == intents_of(typed, "both") == ((ALL,), (1, 2))
    assert intents_of(typed, "type") == ((1, 2),)
    plain = read_dataset(write_images(tmp_path / "plain", 2, types=()), model_mpp=0.25, mpp=0.25)
    assert intents_of(plain, "auto") == ((ALL,),)
    with pytest.raises(ConfigError, match="needs types, and no nucleus has one"):
        intents_of(plain, "type")
    single = read_dataset(write_images(tmp_path / "single", 2, types=(1,)), model_mpp=0.25, mpp=0.25)
    with pytest.raises(ConfigError, match="needs at least two types, and there is only '1'"):
        intents_of(single, "type")


def test_a_view_shows_what_is_meant_and_its_labels_turn_with_it(data):
    images = read_dataset(data, model_mpp=0.25, mpp=0.25).images
    for seed in range(8):
        view = draw_view(images, 1 + seed % 2, 96, np.random.default_rng(seed))
        assert view.image.shape == (96, 96, 3)
        meant = view.meant(1 + seed % 2)
        assert meant.sum() > 30
        colour = np.median(view.image[meant], 0)
        expected = (60, 110, 190) if view.types[view.label[meant][0]] == 2 and images[0].image.size else (90, 60, 140)
        assert min(np.abs(colour - c).max() for c in ((60, 110, 190), (90, 60, 140))) < 3
        assert (view.image[view.label == 0].mean(0) > 150).all()
        assert len(expected) == 3
    assert draw_view(images, 7, 96, np.random.default_rng(0)) is None


def test_sam_learns_by_preference_and_its_file_runs(data, tmp_path, wsiseg, demo):
    """As published but for depth: 224 px, adapters in all linear layers, three masks; loss falls, and `run` takes the file."""
    out = tmp_path / "new.safetensors"
    config = FinetuneConfig(objective="sampo", intent="all", epochs=8, rate=1e-3, checks=1, device="cpu")
    done = finetune(data, out, model="toy", config=config, mpp=0.25)
    mask, quality = losses_of(out, "mask"), losses_of(out, "quality")
    assert mask[-1] < mask[0] - 0.005
    assert quality[-1] < 0.5 * quality[0]
    assert set(done.after) == {"score", "dice", "dice_core", "dice_border", "dice_outside", "spread"}
    model = load_model(str(out), "cpu")
    assert (model.input_px, model.mpp) == (224, 0.25)
    assert not any("parametrizations" in name for name in load_file(out))
    card = json.loads(out.with_suffix(".card.json").read_text())
    assert "Apache-2.0 (that of toy" in card["licence"]
    options = [
        "--method",
        "amg",
        "--out",
        tmp_path / "run",
        "--no-report",
        "--format",
        "parquet",
        "--roi",
        roi(tmp_path),
    ]
    status, output = wsiseg("run", demo[0], "--model", out, *options)
    assert status == 0, output


def roi(folder: Path) -> Path:
    """A corner of the demo slide."""
    square = {"type": "Polygon", "coordinates": [[[0, 0], [60, 0], [60, 60], [0, 60], [0, 0]]]}
    (folder / "roi.geojson").write_text(json.dumps(square))
    return folder / "roi.geojson"


def test_every_form_of_the_loss_is_trained(data, tmp_path):
    """Both readings of the preference, and supervision alone, end in different weights."""
    files = []
    for settings in ({"objective": "sampo"}, {"objective": "sampo", "reading": "B"}, {"objective": "supervised"}):
        out = tmp_path / f"{len(files)}.safetensors"
        config = FinetuneConfig(**settings, intent="all", epochs=0.5, checks=1, device="cpu", input_px=112)
        finetune(data, out, model="toy", config=config, mpp=0.25, no_valid=True)
        files.append(out.read_bytes())
    assert len(set(files)) == 3


@pytest.mark.parametrize(
    ("objective", "rank", "epochs"), [("prompt-group", 0, 4), ("prompt-group", 4, 1), ("supervised", 0, 1)]
)
def test_sam_3_learns_phrases_and_its_file_loads(objective, rank, epochs, data, words, tmp_path):
    """Groups of phrases, and each for itself; whole, and by adapters: loss falls, the text encoder stays, and the file answers phrases."""
    out = tmp_path / "new.safetensors"
    config = FinetuneConfig(objective=objective, lora_rank=rank, epochs=epochs, rate=3e-3, checks=1, device="cpu")
    done = finetune(data, out, model="words", config=config, mpp=0.25)
    found = losses_of(out, "group" if objective == "prompt-group" else "mask")
    assert epochs == 1 or found[-1] < found[0]
    assert min(losses_of(out, "_least_weight") or [0]) >= 0
    assert set(done.after) == {"score", "dice", "dice_low", "dice_medium", "dice_high", "spread"}
    before, after = load_file(words / "words.safetensors"), load_file(out)
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("mask_decoder" in key for key in moved)
    assert not any("text_encoder" in key or "text_projection" in key for key in moved)
    model = load_model(str(out), "cpu")
    assert model.prompts == ("text", "exemplars")
    assert model.detector.encode_text("segment nuclei").shape[1] == 32
    assert json.loads(out.with_suffix(".card.json").read_text())["model"]["network"] == "sam3"


def test_types_that_are_missing_are_said_before_anything_is_written(tmp_path, wsiseg):
    out = tmp_path / "new.safetensors"
    for types, words in (((), "needs types"), ((1,), "at least two types")):
        folder = write_images(tmp_path / f"d{len(types)}", 3, types=types)
        more = ["--model", "toy", "--objective", "sampo", "--intent", "type", "--mpp", 0.25, "--out", out]
        status, output = wsiseg("finetune", folder, *more)
        assert status == 1
        assert words in output
        assert not list(tmp_path.glob("new*"))
