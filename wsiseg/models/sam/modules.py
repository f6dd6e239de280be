"""SAM's own networks, from the package ``segment-anything``: the weights' names and shapes, and the reference that the fast paths are held to.

The only module that knows how to import them: ``segment_anything/__init__.py`` also imports a mask generator that needs torchvision, for
which some builds of torch have no match. ``segment_anything.modeling`` needs torch alone, so it is imported without its parent's code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from wsiseg.errors import ConfigError

if TYPE_CHECKING:
    from wsiseg.models.sam.checkpoints import Architecture

EMBEDDING = 256  #: channels of the neck, of the tokens and of the decoder, in all of SAM's sizes
_PARENT = "segment_anything"


def modeling() -> Any:  # noqa: ANN401
    """The module ``segment_anything.modeling``.

    Raises
    ------
    ConfigError
        The package is not installed.
    """
    name = f"{_PARENT}.modeling"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(_PARENT)
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError("--model: SAM needs the package segment-anything; install it: pip install segment-anything")
    stand_in = types.ModuleType(_PARENT)
    stand_in.__path__ = list(spec.submodule_search_locations)
    before = sys.modules.get(_PARENT)
    sys.modules[_PARENT] = before or stand_in
    try:
        return importlib.import_module(name)
    finally:
        if before is None:  # whoever imports the package later gets the real one
            del sys.modules[_PARENT]


def build(architecture: Architecture) -> nn.ModuleDict:
    """SAM's three networks with random weights: ``image_encoder``, ``prompt_encoder``, ``mask_decoder``; state-dict keys as in its checkpoints."""
    sam = modeling()
    side = architecture.grid * architecture.patch
    return nn.ModuleDict(
        {
            "image_encoder": sam.ImageEncoderViT(
                img_size=side,
                patch_size=architecture.patch,
                embed_dim=architecture.dim,
                depth=architecture.depth,
                num_heads=architecture.heads,
                mlp_ratio=4,
                out_chans=EMBEDDING,
                qkv_bias=True,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                rel_pos_zero_init=True,
                window_size=architecture.window,
                global_attn_indexes=architecture.global_blocks,
            ),
            "prompt_encoder": sam.PromptEncoder(
                embed_dim=EMBEDDING,
                image_embedding_size=(architecture.grid, architecture.grid),
                input_image_size=(side, side),
                mask_in_chans=16,
            ),
            "mask_decoder": sam.MaskDecoder(
                num_multimask_outputs=3,
                transformer=sam.TwoWayTransformer(depth=2, embedding_dim=EMBEDDING, mlp_dim=2048, num_heads=8),
                transformer_dim=EMBEDDING,
                iou_head_depth=3,
                iou_head_hidden_dim=256,
            ),
        }
    )
