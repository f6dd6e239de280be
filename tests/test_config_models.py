"""Configuration and model loading: what is refused, and how."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wsiseg.config import RunConfig, TilingConfig, TypingConfig, from_mapping, read_config
from wsiseg.errors import ConfigError, WeightsError
from wsiseg.models import find_weights, load_model, pick_device
from wsiseg.models.cards import file_hash
from wsiseg.models.registry import MODELS, WEIGHTS_FOLDER
from wsiseg.runtime.settings import flatten

if TYPE_CHECKING:
    from pathlib import Path


def test_config_round_trip(tmp_path: Path) -> None:
    """The resolved configuration of a manifest is accepted back and means the same."""
    config = from_mapping({"tiling": {"tile_um": 64}, "method": "cop", "mpp": 0.5}, "here")
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"config": dataclasses.asdict(config), "status": "complete"}))
    assert read_config(path) == config
    (tmp_path / "c.toml").write_text('method = "cop"\nmpp = 0.5\n[tiling]\ntile_um = 64\n')
    assert read_config(tmp_path / "c.toml") == config


def test_a_path_object_is_a_path(tmp_path: Path) -> None:
    assert from_mapping({"bank": tmp_path / "bank.safetensors"}, "here").bank == str(tmp_path / "bank.safetensors")


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"tilling": {}}, "unknown key tilling; did you mean 'tiling'\\? allowed here: .*tiling"),
        ({"tiling": {"tile": 3}}, "unknown key tiling.tile; did you mean 'tile_um'\\? allowed here: .*tile_um"),
        ({"tiling": 3}, "tiling must be a table"),
        ({"tiling": {"tile_um": "big"}}, "tiling.tile_um is 'big'; it must be of type float"),
        ({"tiling": {"tile_um": 1}}, "tiling.tile_um is 1; it must lie between 16 and 4096"),
        ({"method": "magic"}, "method is 'magic'; choose from auto, apg, cop"),
        ({"workers": True}, "workers is True; it must be of type int"),
        ({"mpp": 0}, "mpp: 0 is not allowed; give microns per pixel from 0.05 to 2"),
        ({"mpp": float("nan")}, "mpp: nan is not allowed"),
        ({"formats": []}, "formats is empty"),
    ],
)
def test_config_refuses(mapping: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^settings: {sentence}"):
        from_mapping(mapping, "settings")


def test_keys_of_an_earlier_version_are_read() -> None:
    earlier = {
        "second_round": {"enabled": True},
        "typing": {"drift": 0.2, "drift_um": 99, "rival_kind": 0.5, "share_rounds": 3},
    }
    today = {
        "refinement": {"enabled": True},
        "typing": {"local_shift": 0.2, "local_shift_um": 99, "unclicked_weight": 0.5, "prevalence_rounds": 3},
    }
    assert from_mapping(earlier, "c.toml") == from_mapping(today, "c.toml")
    with pytest.raises(
        ConfigError, match=r"c\.toml: unknown key typing\.drift; "
    ):  # both names: which of the two counts?
        from_mapping({"typing": {"drift": 0.2, "local_shift": 0.3}}, "c.toml")


def test_config_file_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*a TOML or JSON file of settings"):
        read_config(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(ConfigError, match="neither TOML nor JSON"):
        read_config(tmp_path / "bad.toml")


def test_every_number_has_a_range_at_its_field() -> None:
    """Each number of the configuration is checked, and its default lies inside."""
    given = {"mpp": 0.5, "batch_size": 1, "max_ram_gb": 1.0, "max_vram_gb": 1.0}
    config = RunConfig(**given, tiling=TilingConfig(tile_um=200.0, halo_um=24.0))  # type: ignore[arg-type]
    numbers = [row for row in flatten(config) if isinstance(row[1], int | float) and not isinstance(row[1], bool)]
    assert len(numbers) > 50
    for name, value, _, item in numbers:
        low, high = item.metadata["range"]
        assert low <= value <= high, name
        section, _, key = name.rpartition(".")
        for wrong in (float("nan"), float("inf"), high * 2 + 1):
            with pytest.raises(ConfigError, match=name):
                from_mapping({section: {key: wrong}} if section else {key: wrong}, "x")


def test_hash_covers_what_and_not_how() -> None:
    config = RunConfig()
    assert dataclasses.replace(config, workers=4, device="cpu", formats=("parquet",)).hash() == config.hash()
    assert dataclasses.replace(config, method="cop").hash() != config.hash()
    assert config.hash(seeds="a") != config.hash(seeds="b")


def test_parts_of_versions_with_fewer_settings_of_the_typing_are_still_used() -> None:
    """The digest is that of a version before ``sure_cells`` and ``other_stain``."""
    config = RunConfig(method="apg")
    assert config.hash(typed=False, slide="x") == "782d9371ac5a37f7"
    assert config.hash(slide="x") != "782d9371ac5a37f7"
    other = dataclasses.replace(config, typing=TypingConfig(sure_cells=0))
    assert other.hash(typed=False) == config.hash(typed=False)
    assert other.hash() != config.hash()


def test_weights_in_the_box_are_the_registered_ones() -> None:
    card, path = find_weights("nuclei-compact")
    assert file_hash(path) == card.sha256
    assert path.stat().st_size < 25e6


def test_unknown_model() -> None:
    with pytest.raises(
        WeightsError, match=r"--model resnet9: no such model and no such file; models here: nuclei-compact"
    ):
        find_weights("resnet9")


def broken_weights(kind: str, folder: Path) -> Path:
    path = folder / "w.safetensors"
    good = WEIGHTS_FOLDER / MODELS["nuclei-compact"].weights
    if kind == "garbage":
        path.write_bytes(b"not a tensor in sight" * 10)
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:-5000])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        tensors = load_file(good)
        if kind == "missing":
            del tensors["maps.weight"]
        elif kind == "shape":
            tensors["maps.weight"] = torch.zeros(4, 32, 1, 1)
        elif kind == "nan":
            tensors["maps.weight"] = tensors["maps.weight"] * np.nan
        save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("garbage", "not a readable safetensors file"),
        ("truncated", "not a readable safetensors file"),
        ("empty", "not a readable safetensors file"),
        ("missing", r"1 missing \(first: maps.weight\) tensors"),
        ("shape", r"1 misshapen \(first: maps.weight\) tensors"),
        ("nan", r"1 tensors hold NaN or infinity \(first: maps.weight\)"),
    ],
)
def test_damaged_weights(kind: str, sentence: str, tmp_path: Path) -> None:
    path = broken_weights(kind, tmp_path)
    with pytest.raises(WeightsError, match=sentence) as caught:
        load_model(str(path), "cpu")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu", "mps"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name}: "):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_absent_gpu() -> None:
    with pytest.raises(ConfigError, match="--device cuda: no usable CUDA device"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
