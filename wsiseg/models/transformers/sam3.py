"""SAM 3 as a promptable model: tracker (points, boxes) and detector (text, exemplars) of the library transformers, on one pass of the trunk.

The trunk is a plain vision transformer; each of the two has a neck of its own that makes a feature pyramid of the trunk's last features [1]_.
Chain-of-Prompts takes the detector's: F_h is its finest level (stride 3.5), F_l the one of the image tokens (stride 14) [2]_. Without a detector in
the checkpoint they are the tracker's, of which nothing is published.

References
----------
.. [1] Carion et al.: SAM 3: Segment Anything with Concepts, 2025, arXiv:2511.16719.
.. [2] Jo et al.: Chain-of-Prompts, One Click per Cell Type Suffices: Training-free Group Interaction for Cell Instance Segmentation,
   MICCAI 2026, arXiv:2605.29429.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from wsiseg.errors import WeightsError
from wsiseg.models.transformers.detector import Sam3Detector
from wsiseg.models.transformers.networks import compute_constants, configuration, library, without_memory
from wsiseg.models.transformers.tracker import HubModel
from wsiseg.models.transformers.trunks import VitNeck, vit_features

if TYPE_CHECKING:
    from torch import Tensor

    from wsiseg.models.transformers.recipe import Recipe
    from wsiseg.models.transformers.tracker import Levels
    from wsiseg.records import Embeddings

FPN = (
    "fpn0",
    "fpn1",
    "fpn2",
)  #: names in ``Embeddings.extra`` of the detector's levels, at 4, 2 and 1 times the tokens' resolution


class Sam3(HubModel):
    """The network. Shapes below: B tiles of ``input_px`` squared model px; g image tokens on a side.

    Parameters
    ----------
    recipe
        Its configuration is that of ``Sam3VideoModel``, ``Sam3Model``, ``Sam3TrackerModel`` or ``Sam3TrackerVideoModel``.
    mpp
        Microns per px of the network's input.
    normalise
        As for :class:`PromptedSam`.

    Attributes
    ----------
    detector
        Finds all instances of a phrase or of examples in a tile, once the network is ready; ``None`` without one in the checkpoint.
    detector_model
        ``Sam3Model`` with its trunk; ``None`` when the checkpoint has no detector.
    tracker_model
        ``Sam3TrackerModel`` without a trunk; ``None`` when the checkpoint has no tracker: points and boxes are refused.
    """

    detector: Sam3Detector | None = None
    _necks: tuple[Any, Any] = (None, None)

    def __init__(self, recipe: Recipe, *, mpp: float, normalise: str = "none") -> None:
        config = configuration(recipe.config)
        detector = config if config.model_type == "sam3" else getattr(config, "detector_config", None)
        tracker = None if config.model_type == "sam3" else getattr(config, "tracker_config", config)
        with without_memory():
            detector_model = library().Sam3Model(detector) if detector else None
            tracker_model = library().Sam3TrackerModel(tracker) if tracker else None
            encoder: Any = tracker_model.vision_encoder if tracker_model else None
            neck = encoder.neck if encoder is not None else None
            if (
                detector_model is not None and neck is not None
            ):  # of a checkpoint with both, the detector's part says what the necks are
                neck = type(neck)(detector.vision_config)  # type: ignore[union-attr]  # there is one
            vision: Any = (detector or tracker).vision_config  # type: ignore[union-attr]  # there is one of them
            sizes = (vision.backbone_config.image_size, vision.backbone_config.patch_size, vision.fpn_hidden_size)
        super().__init__(recipe, mpp=mpp, normalise=normalise, sizes=sizes)
        if tracker_model is not None:
            tracker_model.vision_encoder = None
        self.detector_model: Any = detector_model
        self.tracker_model: Any = tracker_model
        self.tracker_neck: Any = neck
        self.backbone: Any = None if detector else encoder.backbone
        self.prompts = (*(("points", "boxes") if tracker else ()), *(("text", "exemplars") if detector else ()))

    @staticmethod
    def architecture(content: dict[str, Any]) -> str:
        """Name of the network in words, from the content of its ``config.json``."""
        config = configuration(content)
        vision = (getattr(config, "detector_config", None) or config).vision_config
        parts = {"sam3": "detector", "sam3_video": "detector and tracker"}.get(config.model_type, "tracker")
        trunk = vision.backbone_config
        return f"SAM 3 {parts}, ViT of width {trunk.hidden_size} and depth {trunk.num_hidden_layers}"

    def compute_constants(self) -> None:
        """Compute what no checkpoint holds: rotary frequencies and positions."""
        for part in (self.detector_model, self.backbone):
            if part is not None:
                compute_constants(part)

    def tracker(self) -> Any:  # noqa: ANN401, D102
        return self.tracker_model

    @property
    def trunk(self) -> Any:  # noqa: ANN401
        """The vision transformer."""
        return self.backbone if self.detector_model is None else self.detector_model.vision_encoder.backbone

    def ready(self, device: torch.device, *, bf16: bool) -> Self:
        """Prepare for inference: frozen, on ``device``; trunk, necks and decoders in bf16, prompts always in fp32."""
        tracker = self.tracker_model
        parts = [self.detector_model, self.backbone, self.tracker_neck, tracker and tracker.mask_decoder]
        self.prepare([part for part in parts if part is not None], device, bf16=bf16)
        self._make_necks()
        if tracker is not None:
            self.make_decoder()
        if self.detector_model is not None:
            self.detector = Sam3Detector(self.detector_model, self.recipe.tokenizer)
        return self

    def encode(self, images: Tensor) -> Embeddings:
        """Encode tiles, once each: one pass of the trunk, and the necks of what the checkpoint has.

        Parameters
        ----------
        images
            uint8 RGB of shape (B, 3, input_px, input_px), model pixels.

        Returns
        -------
        Embeddings
            ``low`` (B, C, g, g) and ``high`` (B, C, 4g, 4g), unit norm along channels; no maps; with a detector, ``extra`` has its pyramid under
            the names ``FPN``.
        """
        features = vit_features(self.trunk, self.standardised(images))
        extra: dict[str, Tensor] = {}
        if self.tracker_neck is not None:  # one pyramid after the other: each has 110 MB a tile
            levels = self.tracker_pyramid(features)
            extra |= self.share_levels(levels)
        if self.detector_model is not None:
            levels = self.detector_pyramid(features)
            extra |= dict(zip(FPN, levels, strict=True))
        return self.embeddings(images, levels[0], levels[2], extra, spare=self.detector_model is None)

    def tracker_pyramid(self, features: Tensor) -> Levels:
        """The tracker's pyramid of the trunk's features (B, C, g, g), finest level first."""
        return self.three_levels(self._necks[0](features))

    def detector_pyramid(self, features: Tensor) -> Levels:
        """The detector's pyramid of the trunk's features (B, C, g, g), finest level first."""
        return self.three_levels(self._necks[1](features))

    def _make_necks(self) -> None:
        """Make the fast necks of the weights as they are now: the tracker's and the detector's."""
        detector = self.detector_model and self.detector_model.vision_encoder.neck
        tracker, detector = (None if neck is None else VitNeck(neck) for neck in (self.tracker_neck, detector))
        self._necks = (tracker, detector)

    def check_pyramid(self) -> None:
        """Run the encoder without weights.

        Raises
        ------
        WeightsError
            It does not run, or its pyramid lacks a level.
        """
        with without_memory():
            self._make_necks()
            features = vit_features(self.trunk, torch.empty(1, 3, self.input_px, self.input_px))
            if self.tracker_neck is not None:
                self.tracker_pyramid(features)
            if self.detector_model is not None:
                self.detector_pyramid(features)
        grid = self.input_px // self.patch
        prompts = self.tracker_model and self.tracker_model.prompt_encoder.image_embedding_size
        if prompts and tuple(prompts) != (grid, grid):
            raise WeightsError(
                f"its prompts are placed on {prompts[0]} x {prompts[1]} image tokens, and the encoder makes {grid} x {grid}; "
                "the configuration is not SAM 3's"
            )
