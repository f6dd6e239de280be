"""Interface of a model, shared by every stage and every model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wsiseg.records import Embeddings, PromptExtras, TypeSpace, WindowMasks


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
