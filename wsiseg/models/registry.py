"""Registry of the known models, as data: what is in the package, what can be downloaded, and what the user gets by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsiseg.models.cards import ModelCard

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
#: Networks of imported checkpoints, by the name that their files have for them; stand in users' cards.
NETWORKS = {
    "sam": "wsiseg.models.sam:SamModel",
    "sam2": "wsiseg.models.transformers:Sam2",
    "sam3": "wsiseg.models.transformers:Sam3",
}
SAM_NETWORK = NETWORKS["sam"]

#: Models in the package, by name.
MODELS = {
    "nuclei-compact": ModelCard(
        name="nuclei-compact",
        network="wsiseg.models.nuclei_compact:NucleiCompact",
        weights=WEIGHTS_FOLDER / "nuclei-compact.safetensors",
        sha256="054d3e488d45b6b292640c77065cb65b174380cb9275e251663178a31d5e5aff",
        licence="Apache-2.0",
        source="training/train_nuclei_compact.py; card: wsiseg/models/weights/nuclei-compact.md",
        mpp=0.25,
        architecture="EfficientNet-Lite2 with a feature pyramid, 1.7 M parameters",
        instance_decoder=True,
        prompts=("points", "boxes", "text"),
        phrases=WEIGHTS_FOLDER / "nuclei-compact-phrases.safetensors",
        phrases_sha256="f85bf8fc322308146b473f79f4ced372651e39de265b5fc3ed54fdf08922317d",
    )
}


@dataclass(frozen=True, kw_only=True)
class Download:
    """A checkpoint that its authors publish.

    Attributes
    ----------
    address
        Over https.
    sha256
        sha256 of the file, hexadecimal.
    architecture
        In words: ``ViT-B``.
    licence
        Licence of the weights.
    mpp
        Microns per model px.
    """

    address: str
    sha256: str
    architecture: str
    licence: str = "Apache-2.0"
    mpp: float = 0.25


_SAM = "https://dl.fbaipublicfiles.com/segment_anything"
#: Checkpoints that ``wsiseg models download`` fetches, by name.
DOWNLOADS = {
    "sam-vit-b": Download(
        address=f"{_SAM}/sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        architecture="ViT-B",
    ),
    "sam-vit-l": Download(
        address=f"{_SAM}/sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        architecture="ViT-L",
    ),
    "sam-vit-h": Download(
        address=f"{_SAM}/sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        architecture="ViT-H",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """Files of which no sha256 is published: the user fetches and imports them.

    Attributes
    ----------
    model, decoder
        Addresses of the checkpoint and of its instance decoder.
    architecture
        In words: ``ViT-B``.
    mpp
        Microns per model px.
    """

    model: str
    decoder: str
    architecture: str
    mpp: float


# PathoSAM, as the authors' program fetches it (micro-sam, micro_sam/util.py). Whoever owns such an address can change what is behind it, and no
# sha256 tells. Trained on tiles of 512 px at 0.25 um/px, enlarged to 1024: 0.125.
_SHARE = "https://owncloud.gwdg.de/index.php/s"
#: Models that ``wsiseg models download`` explains how to get, by name.
BY_HAND = {
    "vit-b-histopathology": ByHand(
        model=f"{_SHARE}/sBB4H8CTmIoBZsQ/download",
        decoder=f"{_SHARE}/KO9AWqynI7SFOBj/download",
        architecture="ViT-B",
        mpp=0.125,
    ),
    "vit-l-histopathology": ByHand(
        model=f"{_SHARE}/IZgnn1cpBq2PHod/download",
        decoder=f"{_SHARE}/oIs6VSmkOp7XrKF/download",
        architecture="ViT-L",
        mpp=0.125,
    ),
    "vit-h-histopathology": ByHand(
        model=f"{_SHARE}/L7AcvVz7DoWJ2RZ/download",
        decoder=f"{_SHARE}/1qAKxy5H0jgwZvM/download",
        architecture="ViT-H",
        mpp=0.125,
    ),
}


@dataclass(frozen=True, kw_only=True)
class OnHub:
    """A model whose authors keep it on the Hugging Face hub, as a folder: the user fetches it with the hub's own tool.

    Attributes
    ----------
    repository
        Its name there.
    architecture
        In words.
    licence
        Licence of the weights.
    gated
        Its authors hand it out only to who has accepted the licence on its page.
    takes
        What it can be asked with.
    input_px
        Side of its tile, model px.
    mpp
        Microns per model px, to begin with: a tile of 128 um, with which Chain-of-Prompts' tables are better than with 250 um.
    """

    repository: str
    architecture: str
    licence: str
    gated: bool = False
    takes: tuple[str, ...] = ("points", "boxes")
    input_px: int = 1024
    mpp: float = 0.125


#: Models that ``wsiseg models download`` explains how to get from the hub, by name.
ON_HUB = {
    **{
        f"sam2.1-hiera-{size}": OnHub(
            repository=f"facebook/sam2.1-hiera-{size}", architecture=f"SAM 2.1, Hiera-{letter}", licence="Apache-2.0"
        )
        for size, letter in (("tiny", "T"), ("small", "S"), ("base-plus", "B+"), ("large", "L"))
    },
    "sam3": OnHub(
        repository="facebook/sam3",
        architecture="SAM 3 detector and tracker, ViT of width 1024 and depth 32",
        licence="SAM License",
        gated=True,
        takes=("points", "boxes", "text", "exemplars"),
        input_px=1008,
    ),
}
