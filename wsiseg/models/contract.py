"""Interface of a model, shared by every stage and every model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from wsiseg.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wsiseg.models.phrases import Vocabulary
    from wsiseg.records import Concept, Detections, Embeddings, PromptExtras, TypeSpace, WindowMasks


class PromptableModel(Protocol):
    """A network that encodes tiles once and answers points with masks.

    Attributes
    ----------
    mpp
        Microns per model px.
    stride_px
        Tiles must start on, and be, multiples of this.
    reach_px
        A mask reaches at most this far from its point.
    input_px
        Side of the only tile that it takes, model px; ``None``: any multiple of ``stride_px``.
    has_maps
        It makes instance maps, for automatic prompts.
    supports_full_tile
        A mask that reaches its window's border can be asked for again with ``full_tile=True``.
    box_replaces_point
        A prompt with a box is the box and the further points; its own point only places the window.
    prompts_multiple
        Prompts are decoded in multiples of this many: small matrix products round differently with the number of threads.
    mask_stride_px, window_size
        Model px per cell of a mask, and cells on a side of its window.
    descriptor_size
        Length of a cell's descriptor.
    types
        Type space of the descriptors; ``None`` when the weights have none.
    device
        Device of the weights.
    prompts
        What it can be asked with: ``points``, ``boxes``, ``text``, ``exemplars``; without ``points``, :meth:`decode` must not be called.
    """

    mpp: float
    stride_px: int
    reach_px: int
    supports_full_tile: bool

    @property
    def input_px(self) -> int | None: ...  # noqa: D102

    @property
    def has_maps(self) -> bool: ...  # noqa: D102

    box_replaces_point: bool
    prompts_multiple: int
    descriptor_size: int
    window_size: int

    @property
    def mask_stride_px(self) -> float: ...  # noqa: D102

    @property
    def prompts(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def types(self) -> TypeSpace | None: ...  # noqa: D102

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    def encode(self, images: Tensor) -> Embeddings:
        """uint8 RGB (B, 3, H, W) on ``device`` -> embeddings."""
        ...

    def decode(
        self,
        embeddings: Embeddings,
        batch_index: Tensor,
        points_xy: Tensor,
        *,
        extras: PromptExtras | None = None,
        multimask: bool = False,
        full_tile: bool = False,
    ) -> WindowMasks:
        """One mask per point, of at least one: ``batch_index`` int64 (N,), ``points_xy`` float32 (N, 2) model px of the tile -> masks on windows.

        ``extras`` adds points and boxes; ``multimask`` asks for several answers per prompt, prompt by prompt; ``predicted_iou`` says which is best;
        ``full_tile`` asks for masks on the whole tile.
        """
        ...

    def window_origin(self, points_xy: Tensor) -> Tensor:
        """Outer corner (N, 2), int64 model px, of the window around each point (N, 2) of a tile."""
        ...

    def describe_masks(self, embeddings: Embeddings, batch_index: Tensor, origin_xy: Tensor, logits: Tensor) -> Tensor:
        """Descriptors (N, D), unit norm, of masks that come from elsewhere: positive ``logits`` (N, h, h) on windows of :meth:`window_origin`."""
        ...


class TextReader(Protocol):
    """What turns phrases into what a network is asked with.

    Attributes
    ----------
    reads_text
        Phrases can be encoded.
    max_tokens
        Tokens that a phrase may have.
    """

    @property
    def reads_text(self) -> bool: ...  # noqa: D102

    @property
    def max_tokens(self) -> int: ...  # noqa: D102

    def count_tokens(self, phrase: str) -> int:
        """Tokens of a phrase."""
        ...

    def encode_text(self, phrase: str) -> Tensor:
        """Encode a phrase -> float (L, C)."""
        ...


class ConceptDetector(TextReader, Protocol):
    """A network that finds every instance of a concept on an encoded tile, the concept being a phrase, boxes around examples, or both.

    Attributes
    ----------
    max_instances
        One pass finds no more.
    """

    @property
    def max_instances(self) -> int: ...  # noqa: D102

    def detect(self, embeddings: Embeddings, tile: int, concept: Concept, min_score: float) -> Detections:
        """Find the instances of ``concept`` on the tile of that index that reach ``min_score``."""
        ...


class ConceptModel(PromptableModel, Protocol):
    """A promptable model that has a detector on the same embeddings; its tiles are square, of ``input_px``.

    Attributes
    ----------
    detector
        The detector.
    mask_stride_px
        Model px per logit of a mask.
    """

    @property
    def mask_stride_px(self) -> float: ...  # noqa: D102

    @property
    def input_px(self) -> int: ...  # noqa: D102

    @property
    def detector(self) -> ConceptDetector: ...  # noqa: D102

    def describe(self, embeddings: Embeddings, batch_index: Tensor, corner: Tensor, logits: Tensor) -> Tensor:
        """Descriptors (N, D), unit norm, of masks: ``logits`` (N, h, w) on windows whose ``corner`` (N, 2) counts in strides of ``stride_px``."""
        ...


def detector_of(model: PromptableModel) -> ConceptDetector | None:
    """The detector of a model; ``None`` when it has none."""
    detector: ConceptDetector | None = getattr(model, "detector", None)
    return detector


def unable(method: str, model: str) -> ConfigError:
    """Make the error for a model without what ``--method text`` or ``exemplar`` needs."""
    what, how = "takes no example boxes", "pass --model with an imported SAM 3"
    if method == "text":
        what = "reads no text"
        how = "leave --model out for nuclei-compact, or pass an imported SAM 3 or a model that was adapted to phrases"
    return ConfigError(f"--method {method}: {model} {what}; {how}, or use another --method")


def vocabulary_of(model: PromptableModel) -> Vocabulary | None:
    """The vocabulary of a model's decoder of phrases; ``None`` when it has no such decoder."""
    vocabulary: Vocabulary | None = getattr(model, "vocabulary", None)
    return vocabulary


def concept_model(model: PromptableModel) -> ConceptModel:
    """``model`` as one that has a detector.

    Raises
    ------
    TypeError
        It has none.
    """
    if detector_of(model) is None:
        raise TypeError("the model has no detector")
    return cast("ConceptModel", model)
