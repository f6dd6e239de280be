"""Files of ``torch.save``: what PyTorch reads is read, and nothing in them is run."""

from __future__ import annotations

import collections
import os
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from wsiseg.errors import WeightsError
from wsiseg.models.sam.torch_files import read_torch_file

if TYPE_CHECKING:
    from pathlib import Path


class Runs:
    """What a pickle of it does when it is read: ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class Settings:
    """As training programs save theirs."""

    def __init__(self) -> None:
        self.rate = 1e-3


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_tensors_come_back_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "view": base[1:3, ::2],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.full((2,), 7.0)),
        "nested": collections.OrderedDict(step=3, names=["a", "b"], flag=torch.tensor([True])),
    }
    path = saved(tmp_path / "weights.pt", content)
    read, expected = read_torch_file(path).content, torch.load(path, weights_only=True)
    assert read["nested"]["names"] == ["a", "b"]
    for key in ("view", "half", "empty", "parameter"):
        assert torch.equal(read[key], expected[key])
        assert read[key].dtype == expected[key].dtype


def test_foreign_classes_are_named_and_empty(tmp_path: Path) -> None:
    found = read_torch_file(saved(tmp_path / "a.pt", {"weights": torch.ones(2), "settings": Settings()}))
    assert torch.equal(found.content["weights"], torch.ones(2))
    assert [name.rpartition(".")[2] for name in found.foreign] == ["Settings"]
    assert not hasattr(found.content["settings"], "rate")


@pytest.mark.parametrize(
    "function", [os.system, eval, exec, __import__, zipfile.os.remove], ids=lambda function: function.__name__
)
def test_what_would_run_is_refused_and_not_run(tmp_path: Path, function: Any) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    argument = str(victim) if function is os.remove else f"touch {tmp_path}/ran" if function is os.system else "os"
    path = saved(tmp_path / "a.pt", {"weights": torch.ones(2), "x": Runs(function, argument)})
    with pytest.raises(WeightsError, match=r"asks to run .*; it was not run; get the file from a source you trust$"):
        read_torch_file(path)
    assert victim.exists()
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_cut_short_or_is_not_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.pt", {"weights": torch.ones(1000)}).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"cut\.pt: truncated or damaged"):
        read_torch_file(tmp_path / "cut.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(WeightsError, match=r"other\.pt: a zip archive without data\.pkl"):
        read_torch_file(tmp_path / "other.pt")
