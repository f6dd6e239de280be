"""Text encoders that are a table: a tokenizer, and a vector for each of its tokens. A phrase is the mean of the vectors of its tokens.

Such tables are made from large language models (WordLlama [1]_, Model2Vec [2]_); reading a phrase takes no network and no time. What the words
mean in tissue is learned by what reads the vector (`wsiseg.models.phrases`).

References
----------
.. [1] Miller: WordLlama, https://github.com/dleemiller/WordLlama.
.. [2] Tulkens, van Dongen: Model2Vec, https://github.com/MinishLab/model2vec.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiseg.errors import ConfigError
from wsiseg.runtime.paths import kind_of
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORDLLAMA = "wordllama"
_WORDLLAMA_FILES = ("tokenizers/l2_supercat_tokenizer_config.json", "weights/l2_supercat_256.safetensors")
_FOLDER_FILES = ("tokenizer.json", "model.safetensors")
_INSTALL = 'install it (pip install ".[text]" in the checkout)'


@dataclass(frozen=True)
class TextEncoder:
    """A table of token vectors.

    Attributes
    ----------
    name
        ``wordllama``, or the folder, absolute.
    sha256
        Of both files, hexadecimal.
    vectors
        (V, C), as stored.
    tokenizer
        Of the library tokenizers.
    """

    name: str
    sha256: str
    vectors: NDArray[np.floating]
    tokenizer: Any

    @property
    def width(self) -> int:
        """C."""
        return int(self.vectors.shape[1])

    def encode(self, phrase: str) -> NDArray[np.float32]:
        """The vector (C,) of a phrase, float32, of unit norm; 0 for a phrase without tokens."""
        ids = self.tokenizer.encode(phrase, add_special_tokens=False).ids
        mean = self.vectors[ids].astype(np.float32).mean(0) if ids else np.zeros(self.width, np.float32)
        unit: NDArray[np.float32] = mean / max(float(np.linalg.norm(mean)), 1e-6)
        return unit


def open_text_encoder(where: str) -> TextEncoder:
    """Open a text encoder.

    Parameters
    ----------
    where
        ``wordllama``: the one in the package of that name; else a folder with ``tokenizer.json`` and ``model.safetensors``, which has one matrix.

    Returns
    -------
    TextEncoder
        Read once per process.

    Raises
    ------
    ConfigError
        It is not there, or not of that form.
    """
    if where == WORDLLAMA:
        found = importlib.util.find_spec("wordllama")
        if found is None or found.origin is None:
            raise ConfigError(f"text encoder {where}: not installed; {_INSTALL}")
        return _read(where, *(Path(found.origin).parent / name for name in _WORDLLAMA_FILES))
    if kind_of(Path(where), ConfigError) != "folder":
        raise ConfigError(f"text encoder {where}: no such folder; one with {' and '.join(_FOLDER_FILES)} is needed")
    folder = Path(where).resolve()
    return _read(str(folder), *(folder / name for name in _FOLDER_FILES))


@lru_cache(maxsize=2)
def _read(name: str, tokens: Path, vectors: Path) -> TextEncoder:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for path in (tokens, vectors):
        if kind_of(path, ConfigError) != "file":
            raise ConfigError(
                f"text encoder {name}: {path} is missing; a tokenizer and a matrix of its tokens' vectors are needed"
            )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(f"text encoder {name}: needs the library tokenizers; {_INSTALL}") from error
    try:
        matrices = list(load_file(vectors).values())
        tokenizer = Tokenizer.from_file(str(tokens))
        digest = hashlib.sha256(tokens.read_bytes() + vectors.read_bytes()).hexdigest()
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"text encoder {name}: cannot be read ({first_line(error)})") from error
    except Exception as error:  # tokenizers raises nothing more specific
        raise ConfigError(f"text encoder {name}: {tokens.name} is not a tokenizer's ({first_line(error)})") from error
    if len(matrices) != 1 or matrices[0].ndim != 2:
        shapes = ", ".join(str(m.shape) for m in matrices)
        raise ConfigError(
            f"text encoder {name}: {vectors.name} has tensors of shape {shapes or 'none'}; one matrix is needed"
        )
    (matrix,) = matrices
    if len(matrix) < tokenizer.get_vocab_size():
        raise ConfigError(
            f"text encoder {name}: {len(matrix)} vectors for {tokenizer.get_vocab_size()} tokens; the two files do not belong together"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextEncoder(name=name, sha256=digest, vectors=matrix, tokenizer=tokenizer)
