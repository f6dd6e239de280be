"""Models: one way to find and load them, by name or path.

Weights are data: each card states file, sha256, licence, source and the scale the model works at. What is loaded is safetensors; other
checkpoints are converted once (store.py), by an unpickler that builds tensors and runs nothing (sam/torch_files.py); of folders from the hub only
safetensors are read (transformers/folders.py). Nothing is downloaded here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.errors import ConfigError, WeightsError
from wsiseg.models.cards import file_hash, require_same
from wsiseg.models.catalogue import explain_missing
from wsiseg.models.registry import MODELS, NETWORKS, WEIGHTS_FOLDER
from wsiseg.models.store import card_of_file, find_card
from wsiseg.runtime.paths import kind_of
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    import torch

    from wsiseg.models.cards import ModelCard
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import TypeSpace


def find_weights(model: str) -> tuple[ModelCard, Path]:
    """The card and weight file behind ``--model``: a name from the package or the user's folder, or the path of a safetensors file.

    Raises
    ------
    WeightsError
        No such model or file, or a checkpoint that has to be imported first.
    """
    if model in MODELS:
        return MODELS[model], MODELS[model].weights
    path = Path(model)
    found = kind_of(path, WeightsError)
    if found == "special":
        raise WeightsError(f"--model {model}: a pipe or a device; give the name of a model, or a .safetensors file")
    if path.suffix == ".safetensors" and found == "file":
        return card_of_file(path), path
    if found == "folder":
        how = f"wsiseg models import {path} --name NAME --mpp UM"
        raise WeightsError(
            f"--model {model}: a folder; a model in one is converted once, and then used by its name: {how}"
        )
    if found == "file":
        how = f"wsiseg models import {path} --name NAME --mpp UM"
        raise WeightsError(
            f"--model {model}: not a .safetensors file; a checkpoint is converted once, without running anything in it: {how}"
        )
    card = find_card(model)
    if card is None:
        raise WeightsError(
            f"--model {model}: {explain_missing(model, 'no such model and no such file')}; see `wsiseg models list`"
        )
    return card, card.weights


def pick_device(device: str) -> torch.device:
    """Resolve a device name; ``auto`` is the first GPU, else the CPU.

    Raises
    ------
    ConfigError
        The device is unknown or not usable here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: not a device; use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {device}: no usable CUDA device (torch {torch.__version__}); use --device cpu, or see `wsiseg doctor`"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA device(s), counted from 0"
        )
    return chosen


def load_model(model: str, device: str = "auto", precision: str = "auto") -> PromptableModel:
    """Build a model and read its weights.

    Parameters
    ----------
    model
        Name of a model of the package or the user's folder, or path of a safetensors file.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    precision
        ``fp32``, ``bf16`` (encoder; with SAM the decoders too), or ``auto``: bf16 on a GPU, fp32 on the CPU.

    Returns
    -------
    PromptableModel
        On its device, ready to encode.

    Raises
    ------
    WeightsError
        The file is missing, is not safetensors, is damaged, or holds other tensors than the network's.

    Examples
    --------
    >>> from wsiseg.models import load_model
    >>> model = load_model("nuclei-compact", "cpu")
    >>> model.mpp, model.stride_px, model.device.type
    (0.25, 16, 'cpu')
    """
    card, path = find_weights(model)
    for file, stated in ((path, card.sha256), (card.phrases, card.phrases_sha256)):
        if file is not None and file.parent == WEIGHTS_FOLDER and file_hash(file) != stated:
            raise WeightsError(
                f"{file}: sha256 differs from the model card of {card.name}; the file is damaged: install wsiseg again"
            )
    network = build_network(card, path)
    chosen = pick_device(device)
    loaded: PromptableModel = network.ready(
        chosen, bf16=precision == "bf16" or (precision == "auto" and chosen.type == "cuda")
    )
    return loaded


def build_network(card: ModelCard, path: Path) -> Any:  # noqa: ANN401
    """Build the network of a card and fill it with the weights in a file, on the CPU; `load_model` prepares it for inference.

    Raises
    ------
    WeightsError
        As `load_model`.
    """
    tensors = read_all_tensors(card, path)
    module, _, name = card.network.partition(":")
    network = getattr(importlib.import_module(module), name).of(card, tensors)
    _fill(network, tensors, path)
    return network


def load_types(model: str) -> TypeSpace | None:
    """Load the type space of a model; ``None`` when its weights have none. An imported checkpoint is not read for that."""
    if find_weights(model)[0].network in NETWORKS.values():
        return None
    return load_model(model, "cpu").types


def read_all_tensors(card: ModelCard, path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weight file, and those of its decoder of phrases where that is a file of its own.

    Raises
    ------
    WeightsError
        As :func:`read_tensors`.
    """
    return read_tensors(path) | (read_tensors(card.phrases) if card.phrases is not None else {})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weight file.

    Raises
    ------
    WeightsError
        The file is missing or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: the weight file is missing; install wsiseg again or pass --model PATH") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({first_line(error)}); pass an undamaged weight file"
        ) from error


def _fill(network: Any, tensors: dict[str, torch.Tensor], path: Path) -> None:  # noqa: ANN401
    """Copy ``tensors`` into ``network``; every difference is named."""
    import torch

    wanted = network.state_dict()
    require_same(
        {k: v.shape for k, v in wanted.items()}, {k: v.shape for k, v in tensors.items()}, type(network).__name__, path
    )
    broken = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise WeightsError(
            f"{path}: {len(broken)} tensors hold NaN or infinity (first: {min(broken)}); the file is damaged: download it again"
        )
    network.load_state_dict({k: v.to(wanted[k].dtype) for k, v in tensors.items()}, assign=True)
