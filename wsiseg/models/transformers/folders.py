"""Folders of the Hugging Face hub: recognising a model and reading its tensors. Nothing is run from a folder, and nothing unpickled.

What is read::

    config.json                                  the class and its sizes
    model.safetensors, or *.safetensors and      the weights
      model.safetensors.index.json
    preprocessor_config.json, processor_config.json   mean and sd of the pixels
    tokenizer.json, or vocab.json and merges.txt      of models that take text
    README.md                                    the licence, from its first lines

Classes, by ``model_type``: ``sam2`` and ``sam2_video`` (SAM 2.1's folders say the latter), ``sam3``, ``sam3_tracker``, ``sam3_tracker_video``,
``sam3_video`` (SAM 3's folder: detector and tracker), ``sam`` (SAM 1, which is then stored as its own checkpoints are).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from wsiseg.errors import WeightsError, counted
from wsiseg.models.cards import require_same
from wsiseg.models.transformers.detector import TOKENIZER_FILES, read_tokenizer
from wsiseg.models.transformers.networks import CLASSES
from wsiseg.models.transformers.recipe import Recipe
from wsiseg.models.transformers.sam2 import Sam2
from wsiseg.models.transformers.sam3 import Sam3
from wsiseg.runtime.paths import kind_of, names_in, read_text, readable
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  #: mean and sd that SAM 1 and 2 were trained with, 0 to 1
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  #: SAM 3's
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ONE_OF = "pass a folder of SAM 2.1 (Sam2Model), SAM 3 (Sam3Model, Sam3TrackerModel, Sam3VideoModel) or SAM (SamModel)"
#: Tensors of the video models that images do not need.
_VIDEO = (
    "memory_",
    "mask_downsample.",
    "object_pointer_proj.",
    "temporal_positional_encoding_projection_layer.",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
)
_TIED = ("prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding")


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """A model in a folder.

    Attributes
    ----------
    kind
        ``sam``, ``sam2`` or ``sam3``.
    tensors
        Under the names of the network that will read them: `Sam2`, `Sam3`, or SAM's own names (`wsiseg.models.sam.checkpoints`).
        They read the files when they are used.
    recipe
        Of SAM 2 and 3.
    facts
        Fields of the card: ``architecture``, ``prompts``, ``input_px``.
    licence, source
        As the folder states them; empty when it does not.
    notes
        Notes on what was left out, one message each.
    """

    kind: str
    tensors: dict[str, Tensor]
    recipe: Recipe | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()


def read_folder(folder: Path) -> HubFolder:
    """Read a model that the hub's tools left in a folder.

    Parameters
    ----------
    folder
        With ``config.json`` and ``*.safetensors``.

    Returns
    -------
    HubFolder
        Every tensor has the name and shape that the network needs.

    Raises
    ------
    ConfigError
        The package transformers is missing.
    WeightsError
        Files are missing, damaged or pickled; the model is of another class, or asks for code of its own; or its tensors are not the class's.
    """
    config = _read_config(folder)
    kind = str(config.get("model_type"))
    tensors = _read_weights(folder)
    broken = sorted(k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all())
    if broken:
        raise WeightsError(
            f"{folder}: {len(broken)} tensors hold NaN or infinity (first: {broken[0]}); the file is damaged: download it again"
        )
    notes: list[str] = []
    licence, source = _licence(folder), _source(folder)
    if kind == "sam":
        return HubFolder(kind="sam", tensors=_as_sam(tensors), licence=licence, source=source)
    mean, sd = _pixel_statistics(folder, IMAGENET if kind.startswith("sam2") else HALVES)
    recipe = Recipe(config=config, pixel_mean=mean, pixel_sd=sd, tokenizer=_tokenizer(folder, kind, notes))
    network, named, left_out = fit(recipe, tensors, folder)
    if left_out:
        notes.append(f"left out of {folder.name}: {counted(len(left_out), 'tensor')} for video ({left_out[0]}, ...)")
    return HubFolder(
        kind=kind[:4],
        tensors=named,
        recipe=recipe,
        facts={"architecture": network.architecture(config), "prompts": network.prompts, "input_px": network.input_px},
        licence=licence,
        source=source,
        notes=tuple(notes),
    )


def fit(recipe: Recipe, tensors: Mapping[str, Tensor], place: Path) -> tuple[Sam2 | Sam3, dict[str, Tensor], list[str]]:
    """Fit the tensors of a folder to the network of its configuration.

    Parameters
    ----------
    recipe
        Its ``config`` is one of SAM 2 or SAM 3.
    tensors
        Under the names in the files.
    place
        Where they are from, for messages.

    Returns
    -------
    network
        Without memory of its own.
    named
        The tensors that images need, under the network's names: all that it has, in its shapes.
    left_out
        Names of the tensors that only video needs.

    Raises
    ------
    WeightsError
        The configuration cannot be built, or tensors are missing, unexpected or misshapen.
    """
    kind = recipe.config["model_type"]
    left_out = sorted(name for name in tensors if _plain(name).startswith(_VIDEO))
    kept = {name: value for name, value in tensors.items() if not _plain(name).startswith(_VIDEO)}
    network: Sam2 | Sam3
    try:
        if kind.startswith("sam2"):
            network, named = Sam2(recipe, mpp=1.0), {f"sam.{name}": value for name, value in kept.items()}
        else:
            network, named = Sam3(recipe, mpp=1.0), {_sam3_name(name, kind): value for name, value in kept.items()}
        network.check_pyramid()
    except WeightsError as error:
        raise WeightsError(f"{place}: {error}") from error
    wanted = network.state_dict()
    named |= _ties(named, wanted)
    require_same(
        {k: v.shape for k, v in wanted.items()},
        {k: v.shape for k, v in named.items()},
        f"the {kind} that its config.json describes",
        place,
    )
    return network, named, left_out


# Files


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if kind_of(path, WeightsError) != "file":
        raise WeightsError(
            f"{folder}: no config.json in it; pass the folder that has config.json and *.safetensors, as the hub's tools leave it"
        )
    config = _read_json(path)
    kind = config.get("model_type")
    if _asks_for_code(config):
        raise WeightsError(f"{path}: asks for code of its own (auto_map), which is never run; {_ONE_OF}")
    if "quantization_config" in config:
        raise WeightsError(
            f"{path}: quantised weights, which are not supported; get the folder of the original weights"
        )
    if kind not in CLASSES and kind != "sam":
        raise WeightsError(f"{path}: a model of type {str(kind)[:40]!r}, which is not supported; {_ONE_OF}")
    return config


def _asks_for_code(config: Mapping[str, Any]) -> bool:
    return "auto_map" in config or any(isinstance(part, dict) and _asks_for_code(part) for part in config.values())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({first_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not an object; download it again")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        path = folder / name
        if kind_of(path, WeightsError) != "file":
            raise WeightsError(f"{path}: the file is missing; download the folder again")
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{path}: not a readable safetensors file ({first_line(error)}); it may be truncated: download it again"
            ) from error
    return tensors


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that together are the weights."""
    names = names_in(folder, WeightsError)
    if _INDEX in names:
        placed = _read_json(folder / _INDEX).get("weight_map")
        files = sorted({str(file) for file in placed.values()}) if isinstance(placed, dict) else []
        if not files or any(PurePath(file).name != file or not file.endswith(".safetensors") for file in files):
            raise WeightsError(f"{folder / _INDEX}: not an index of *.safetensors files beside it; download it again")
        return files
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) == 1:
        return found
    if found:
        raise WeightsError(f"{folder}: {len(found)} *.safetensors files and no {_INDEX}; download the whole folder")
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        raise WeightsError(
            f"{folder}: its weights are pickled ({pickled[0]}), which can run code and is not read; get the model's *.safetensors"
        )
    raise WeightsError(f"{folder}: no *.safetensors file in it; download the weights too")


def _pixel_statistics(
    folder: Path, default: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and sd of the pixels, 0 to 255, as the processor's files state them."""
    stated: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if kind_of(folder / name, WeightsError) == "file":
            content = _read_json(folder / name)
            inner = content.get("image_processor")
            stated |= inner if isinstance(inner, dict) else content
    values = [stated.get(key, usual) for key, usual in zip(("image_mean", "image_std"), default, strict=True)]
    for value in values:
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            raise WeightsError(
                f"{folder}: image_mean and image_std of its processor must be three numbers each; found {str(value)[:40]}"
            )
    mean, sd = (tuple(255.0 * x for x in value) for value in values)
    return mean, sd


def _tokenizer(folder: Path, kind: str, notes: list[str]) -> str | None:
    """The tokenizer of a model that takes text; a model without its files can do the rest."""
    if kind not in {"sam3", "sam3_video"}:
        return None
    if not any(kind_of(folder / name, WeightsError) == "file" for name in TOKENIZER_FILES):
        notes.append(
            f"{folder.name} has no tokenizer.json, so the model takes no text; download it too and import again"
        )
        return None
    return read_tokenizer(folder)


def _licence(folder: Path) -> str:
    """The licence that the first lines of README.md state, in the hub's words; empty when they do not."""
    path = folder / "README.md"
    if kind_of(path, WeightsError) != "file":
        return ""
    with readable(path, WeightsError):
        text = read_text(path)
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = dict(re.findall(r"^(license|license_name):[ \t]*(\S.*)$", head[1] if head else "", re.MULTILINE))
    return str(stated.get("license_name") or stated.get("license") or "").strip("\"' ")[:80]


def _source(folder: Path) -> str:
    """Name and revision on the hub, if the folder is one of its cache."""
    found = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\](\w+)$", str(folder.absolute()))
    return f"https://huggingface.co/{found[1].replace('--', '/')}, revision {found[2]}" if found else ""


# Names


def _plain(name: str) -> str:
    """A name without the models around it. Releases of the library put them before a name none, once or twice when they save."""
    return re.sub(r"^(?:(?:tracker|detector)_model\.)+", "", name)


def _sam3_name(name: str, kind: str) -> str:
    """The name in `Sam3` of a tensor in a file of one of SAM 3's classes."""
    inside_tracker = re.match(r"(?:tracker_model\.)+(?=(?:tracker_model|detector_model|tracker_neck)\.)", name)
    name = name[inside_tracker.end() :] if inside_tracker else name
    if kind == "sam3":
        return name if name.startswith("detector_model.") else f"detector_model.{name}"
    if kind == "sam3_video":
        return name
    for theirs, ours in (
        ("detector_model.vision_encoder.backbone.", "backbone."),
        ("vision_encoder.backbone.", "backbone."),
        ("vision_encoder.neck.", "tracker_neck."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name.startswith(("tracker_model.", "tracker_neck.")) else f"tracker_model.{name}"


def _ties(named: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a file leaves out because another one holds the same numbers."""
    found = {}
    for one, other in (_TIED, _TIED[::-1]):
        for name in wanted:
            if name.endswith(one) and name not in named:
                twin = name.removesuffix(one) + other
                if twin in named:
                    found[name] = named[twin].clone()  # a file of tensors holds no number twice
    return found


#: Names of transformers' SamModel -> SAM's own, in this order.
_TO_SAM = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"^(image_encoder)\.layers\.", r"\1.blocks."),
    (r"layer_norm_final_attn\.", "norm_final_attn."),
    (r"neck\.conv1\.", "neck.0."),
    (r"neck\.layer_norm1\.", "neck.1."),
    (r"neck\.conv2\.", "neck.2."),
    (r"neck\.layer_norm2\.", "neck.3."),
    (r"prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"mask_embed\.conv1\.", "mask_downscaling.0."),
    (r"mask_embed\.layer_norm1\.", "mask_downscaling.1."),
    (r"mask_embed\.conv2\.", "mask_downscaling.3."),
    (r"mask_embed\.layer_norm2\.", "mask_downscaling.4."),
    (r"mask_embed\.conv3\.", "mask_downscaling.6."),
    (r"shared_embedding\.positional_embedding$", "pe_layer.positional_encoding_gaussian_matrix"),
    (r"mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"((?:hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.0\.", r"\1layers.1."),
    (r"((?:hypernetworks_mlps\.\d+|iou_prediction_head)\.)proj_in\.", r"\1layers.0."),
    (r"((?:hypernetworks_mlps\.\d+|iou_prediction_head)\.)proj_out\.", r"\1layers.2."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)


def _as_sam(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' SamModel under SAM's own names."""
    tied, twin = _TIED
    found = {}
    for key, value in {tied: tensors[twin], **tensors}.items() if twin in tensors else tensors.items():
        if key == twin:
            continue
        name = key
        for theirs, ours in _TO_SAM:
            name = re.sub(theirs, ours, name)
        found[name] = value
    return found
