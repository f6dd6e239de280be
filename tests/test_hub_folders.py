"""Folders of the hub: what is recognised, what of them is kept, and what each refusal says."""

from __future__ import annotations

import importlib.util
import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from wsiseg.errors import ConfigError, WeightsError
from wsiseg.models import load_model
from wsiseg.models.catalogue import verify
from wsiseg.models.store import card_of_file, find_card, import_model
from wsiseg.models.testing import tiny_hub_model
from wsiseg.models.transformers import networks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet():
    """Its progress bars are not for a test's output."""
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder of each class, as ``save_pretrained`` writes it."""
    root = tmp_path_factory.mktemp("hub")
    for kind in ("sam2", "sam2_video", "sam3", "sam3_tracker", "sam3_video"):
        tiny_hub_model(kind).save_pretrained(root / kind)
    return root


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Path:
    """A SAM 2 that a test may damage."""
    there = tmp_path / "hub"
    there.mkdir()
    for file in (folders / "sam2").iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    return there


def tile(model) -> torch.Tensor:
    shape = (1, 3, model.input_px, model.input_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "takes", "architecture"),
    [
        ("sam2", ("points", "boxes"), "SAM 2, Hiera of width 8 and depth 7"),
        ("sam2_video", ("points", "boxes"), "SAM 2.1, Hiera of width 8 and depth 7"),
        ("sam3", ("text", "exemplars"), "SAM 3 detector, ViT of width 32 and depth 3"),
        ("sam3_tracker", ("points", "boxes"), "SAM 3 tracker, ViT of width 32 and depth 3"),
        (
            "sam3_video",
            ("points", "boxes", "text", "exemplars"),
            "SAM 3 detector and tracker, ViT of width 32 and depth 3",
        ),
    ],
)
def test_each_class_is_imported_and_loaded(folders, tmp_path, kind, takes, architecture):
    notes: list[str] = []
    card = import_model(
        folders / kind, "mine", mpp=0.5, licence="MIT", source="here", folder=tmp_path, on_note=notes.append
    )
    assert card == find_card("mine", tmp_path)
    assert (card.prompts, card.architecture) == (takes, architecture)
    assert (card.licence, card.source, card.mpp) == ("MIT", "here", 0.5)
    assert card.input_px == (320 if kind.startswith("sam2") else 280)
    assert card.parameters == sum(value.numel() for value in load_file(card.weights).values())
    verify(card)
    assert any("for video" in note for note in notes) == ("video" in kind)
    of_file = card_of_file(card.weights)
    assert (of_file.network, of_file.prompts, of_file.input_px) == (card.network, takes, card.input_px)
    model = load_model(str(card.weights), "cpu")
    assert model.prompts == takes
    with torch.inference_mode():
        found = model.encode(tile(model))
    assert found.high.shape == (1, 32, 80, 80)
    assert found.low.shape == (1, 32, 20, 20)
    assert found.high.isfinite().all()


def test_a_video_folder_and_an_image_folder_of_the_same_weights_are_one_model(folders, tmp_path):
    """SAM 2.1 is published as the video model; its image part is what ``Sam2Model`` reads of it."""
    video = tiny_hub_model("sam2_video")
    image = transformers.Sam2Model.from_pretrained(folders / "sam2_video").eval()
    image.save_pretrained(tmp_path / "image")
    video.save_pretrained(tmp_path / "video")
    masks, weights = [], []
    for name in ("image", "video"):
        card = import_model(tmp_path / name, name, folder=tmp_path)
        weights.append(load_file(card.weights))
        model = load_model(str(tmp_path / f"{name}.safetensors"), "cpu")
        with torch.inference_mode():
            points = torch.tensor([[100.0, 90.0]])
            masks.append(model.decode(model.encode(tile(model)), torch.zeros(1, dtype=torch.long), points).logits)
    image_part, both = weights
    assert all(torch.equal(value, both[name]) for name, value in image_part.items())
    # Products of matrices may round differently where the tensors lie in memory.
    torch.testing.assert_close(*masks, rtol=1e-5, atol=1e-5)


def test_shards_are_one_model(folders, tmp_path):
    tiny_hub_model("sam2").save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    cards = [
        import_model(path, name, folder=tmp_path, source="here")
        for name, path in (("one", folders / "sam2"), ("many", tmp_path / "shards"))
    ]
    found = [load_file(card.weights) for card in cards]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_weights_keep_their_precision_and_are_computed_in_ours(copy, tmp_path):
    """A checkpoint in bf16 is stored as it is, and works in fp32 on the CPU."""
    path = copy / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    card = import_model(copy, "half", folder=tmp_path)
    assert {value.dtype for value in load_file(card.weights).values()} == {torch.bfloat16}
    model = load_model(str(card.weights), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_sam_1_of_the_library_becomes_a_sam_checkpoint(tmp_path):
    """Its names are SAM's again, and its masks are the library's."""
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 320,
            "mlp_dim": 192,
            "global_attn_indexes": [1],
        },
        prompt_encoder_config={"image_size": 320, "image_embedding_size": 20},
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = transformers.SamModel(config).eval()
    reference.save_pretrained(tmp_path / "hub")
    card = import_model(tmp_path / "hub", "sam", folder=tmp_path)
    assert (card.network, card.architecture, card.input_px) == (
        "wsiseg.models.sam:SamModel",
        "ViT of width 48 and depth 2",
        320,
    )
    model = load_model(str(card.weights), "cpu")
    image, points = tile(model), torch.tensor([[100.0, 90.0], [30.0, 250.0]])
    mean, sd = (v.cpu() for v in (model.pixel_mean, model.pixel_sd))
    with torch.inference_mode():
        got = model.decode(model.encode(image), torch.zeros(2, dtype=torch.long), points, full_tile=True).logits
        wanted = reference(
            pixel_values=(image - mean) / sd, input_points=points[None, :, None] - 0.5, multimask_output=False
        ).pred_masks[0, :, 0]
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_the_card_has_what_the_folder_states(copy, tmp_path):
    """Licence from README.md, name and revision from the hub's cache, mean and sd of the pixels from the processor."""
    there = tmp_path / "models--lab--sam2-nuclei" / "snapshots" / "0a1b2c"
    there.parent.mkdir(parents=True)
    copy.rename(there)
    (there / "README.md").write_text(
        "---\nlicense: other\nlicense_name: sam-license\ntags:\n- x\n---\n# A model\nlicense: no\n"
    )
    processor = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]}}
    (there / "processor_config.json").write_text(json.dumps(processor))
    card = import_model(there, "mine", folder=tmp_path)
    assert card.licence == "sam-license"
    assert card.source == "https://huggingface.co/lab/sam2-nuclei, revision 0a1b2c"
    model = load_model(str(card.weights), "cpu")
    assert model.pixel_mean.flatten().tolist() == pytest.approx([25.5, 51, 76.5])
    assert model.pixel_sd.flatten().tolist() == pytest.approx([127.5, 127.5, 63.75])


def test_without_statements_there_are_defaults(folders, tmp_path):
    """ImageNet's for SAM 2, a half for SAM 3; the licence is not guessed."""
    for kind, mean in (("sam2", 0.485), ("sam3_tracker", 0.5)):
        card = import_model(folders / kind, "mine", folder=tmp_path, overwrite=True)
        assert (card.licence, card.source) == ("unknown", str(folders / kind))
        assert load_model(str(card.weights), "cpu").pixel_mean.flatten()[0] == pytest.approx(255 * mean)


# Refusals


def edit(copy: Path, **changes: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))


def only_pickles(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()


def without_a_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["mask_decoder.iou_token.weight"], tensors["mask_decoder.conv_s0.bias"]
    save_file(tensors, copy / "model.safetensors")


def with_another_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "classifier.weight": torch.zeros(2, 2)}, copy / "model.safetensors")


def with_a_misshapen_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "mask_decoder.iou_token.weight": torch.zeros(1, 33)}, copy / "model.safetensors")


def with_nan(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["mask_decoder.iou_token.weight"][0, 0] = torch.nan
    save_file(tensors, copy / "model.safetensors")


def cut(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def index(copy: Path, file: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))


def two_files(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    save_file({"a": torch.zeros(1)}, copy / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda c: (c / "config.json").unlink(), "{}: no config.json in it; pass the folder that has config.json"),
        (lambda c: (c / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda c: (c / "config.json").write_text("[]"), "config.json: holds a list, not an object"),
        (
            only_pickles,
            "{}: its weights are pickled (pytorch_model.bin), which can run code and is not read; get the model's *.s",
        ),
        (no_weights, "{}: no *.safetensors file in it; download the weights too"),
        (
            lambda c: edit(c, auto_map={"AutoModel": "m.M"}),
            "asks for code of its own (auto_map), which is never run; pass a folder",
        ),
        (
            lambda c: edit(c, vision_config={"backbone_config": {"auto_map": {}}}),
            "asks for code of its own (auto_map), which is never run; pass a folder of SAM 2.1",
        ),
        (
            lambda c: edit(c, model_type="bert"),
            "a model of type 'bert', which is not supported; pass a folder of SAM 2.1",
        ),
        (lambda c: edit(c, model_type=None), "a model of type 'None', which is not supported"),
        (
            lambda c: edit(c, model_type="sam"),
            "image_encoder.patch_embed.proj.weight is missing; pass a complete SAM checkpoint",
        ),
        (lambda c: edit(c, model_type="sam3_tracker"), "{}: transformers cannot build this configuration ("),
        (lambda c: edit(c, quantization_config={}), "quantised weights, which are not supported"),
        (lambda c: edit(c, vision_config={"num_feature_levels": "x"}), "{}: transformers refuses the configuration ("),
        (
            lambda c: edit(c, mask_decoder_config={"num_attention_heads": 0}),
            "{}: transformers cannot build this configuration (",
        ),
        (without_a_tensor, "2 missing (first: sam.mask_decoder.conv_s0.bias) tensors"),
        (with_another_tensor, "1 unexpected (first: sam.classifier.weight) tensors"),
        (with_a_misshapen_tensor, "1 misshapen (first: sam.mask_decoder.iou_token.weight) tensors"),
        (with_nan, "1 tensors hold NaN or infinity (first: mask_decoder.iou_token.weight)"),
        (cut, "model.safetensors: not a readable safetensors file ("),
        (lambda c: index(c, "gone.safetensors"), "gone.safetensors: the file is missing; download the folder again"),
        (lambda c: index(c, "../model.safetensors"), "not an index of *.safetensors files beside it"),
        (lambda c: index(c, "weights.bin"), "not an index of *.safetensors files beside it"),
        (two_files, "{}: 2 *.safetensors files and no model.safetensors.index.json; download the whole folder"),
        (
            lambda c: (c / "preprocessor_config.json").write_text('{"image_mean": [1]}'),
            "image_mean and image_std of its processor must be three numbers each; found [1]",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wsiseg: Callable[..., tuple[int, str]],
    damage: Callable[[Path], None],
    sentence: str,
) -> None:
    monkeypatch.setenv("WSISEG_MODELS", str(tmp_path / "models"))
    damage(copy)
    status, said = wsiseg("models", "import", copy, "--name", "mine")
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert said.rstrip().endswith(line)
    assert sentence.format(copy) in line
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())


def test_code_in_a_folder_is_not_run(copy, tmp_path):
    """A Python file beside the weights is nobody's business as long as the configuration does not ask for it."""
    (copy / "modeling_sam2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    import_model(copy, "mine", folder=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_no_model_name_and_no_decoder(folders, tmp_path):
    with pytest.raises(WeightsError, match=r"a folder; a model in one is converted once, .*: wsiseg models import"):
        load_model(str(folders / "sam2"))
    with pytest.raises(ConfigError, match="--decoder: belongs to a SAM checkpoint that is one file"):
        import_model(folders / "sam2", "mine", decoder=tmp_path / "d.pt", folder=tmp_path)


def test_without_the_library_its_models_say_how_to_get_it(folders, tmp_path, monkeypatch):
    card = import_model(folders / "sam2", "mine", folder=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = re.escape(
        "--model: SAM 2.1 and SAM 3 need the package transformers; install it, in the checkout: pip install '.[transformers]'"
    )
    with pytest.raises(ConfigError, match=sentence):
        load_model(str(card.weights), "cpu")
    with pytest.raises(ConfigError, match=sentence):
        import_model(folders / "sam2", "other", folder=tmp_path)
    assert not (tmp_path / "other.safetensors").exists()


def test_an_older_library_is_named(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(networks.importlib, "import_module", lambda name: SimpleNamespace(__version__="4.50.0"))
    with pytest.raises(
        ConfigError,
        match=r"--model: transformers 4\.50\.0 does not know SAM 3; install it, in the checkout: pip install",
    ):
        networks.library()


def test_a_note_of_another_version_is_refused(folders, tmp_path):
    card = import_model(folders / "sam2", "mine", folder=tmp_path)
    tensors = load_file(card.weights)
    save_file(tensors, card.weights, metadata={"wsiseg": '{"network": "sam2", "mpp": 0.5, "normalise": "none"}'})
    with pytest.raises(WeightsError, match="belong to another version; import the checkpoint again"):
        load_model(str(card.weights), "cpu")
