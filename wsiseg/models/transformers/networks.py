"""Networks of the library transformers, built from a configuration, without weights; no other module imports the library.

A configuration is data: it chooses among the library's own classes, and no code beside it is ever run.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from wsiseg.errors import ConfigError, WeightsError
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: ``model_type`` of a configuration -> the class of the library that reads it for images. SAM 2.1 and SAM 3 are published as video models, whose
#: weights hold those of the image models.
CLASSES = {
    "sam2": "Sam2Config",
    "sam2_video": "Sam2Config",
    "sam3": "Sam3Config",
    "sam3_tracker": "Sam3TrackerConfig",
    "sam3_tracker_video": "Sam3TrackerConfig",
    "sam3_video": "Sam3VideoConfig",
}


def library() -> Any:  # noqa: ANN401
    """The module ``transformers``.

    Raises
    ------
    ConfigError
        It is not installed, or too old for SAM 3.
    """
    how = "install it, in the checkout: pip install '.[transformers]'"
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"--model: SAM 2.1 and SAM 3 need the package transformers; {how}")
    module = importlib.import_module("transformers")
    if not hasattr(module, "Sam3VideoModel"):
        raise ConfigError(f"--model: transformers {module.__version__} does not know SAM 3; {how}")
    return module


def configuration(content: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The library's configuration object for the content of a ``config.json`` whose ``model_type`` is one of ``CLASSES``.

    Raises
    ------
    ConfigError
        As :func:`library`.
    WeightsError
        The library refuses it.
    """
    kind = getattr(library(), CLASSES[content["model_type"]])
    try:
        with _quiet():
            return kind.from_dict(_without_precision(content))
    except Exception as error:  # whatever its checks raise
        raise WeightsError(
            f"transformers refuses the configuration ({first_line(error)}); get the folder again"
        ) from error


def _without_precision(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without the precision that its weights were stored in, which says nothing about the network."""
    return {
        key: _without_precision(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in {"dtype", "torch_dtype"}
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Remarks of the library on configurations (a token's number beyond the vocabulary) are not for whoever runs a slide."""
    logging = library().utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks made inside have names and shapes, and no weights."""
    with torch.device("meta"), torch.no_grad():
        try:
            yield
        except WeightsError:
            raise
        except Exception as error:  # a configuration that contradicts itself fails in many ways
            raise WeightsError(
                f"transformers cannot build this configuration ({first_line(error)}); get the folder again"
            ) from error


def compute_constants(network: Any) -> None:  # noqa: ANN401
    """Fill the buffers of one of the library's models that no checkpoint holds (rotary frequencies, positions); made without memory it lacks them."""
    for module in network.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    network.initialize_weights()  # parameters have no memory yet: nothing happens to them
