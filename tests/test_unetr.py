"""The instance decoder of micro-sam: the savings in it change nothing, and its form is read from the checkpoint."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.testing import disturb


def reference(state: dict[str, torch.Tensor], z12: torch.Tensor) -> torch.Tensor:
    """The forward pass as it is specified, step by step, nothing rearranged -> logits of the three maps."""

    def up(x, key):
        if f"{key}.block.weight" in state:
            return F.conv_transpose2d(x, state[f"{key}.block.weight"], state[f"{key}.block.bias"], stride=2)
        doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return F.conv2d(doubled, state[f"{key}.conv.weight"], state[f"{key}.conv.bias"])

    def conv(x, key):
        return F.conv2d(x, state[f"{key}.weight"], state[f"{key}.bias"], padding=1)

    def block(x, key):
        return F.relu(conv(F.instance_norm(F.relu(conv(F.instance_norm(x), f"{key}.block.1"))), f"{key}.block.4"))

    def deconv(x, key):
        norm = {k: state[f"{key}.block.2.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        return F.relu(F.batch_norm(conv(up(x, f"{key}.block.0"), f"{key}.block.1.block"), **norm))

    skips = [z12]
    for k in range(1, 5):
        skips.append(deconv(skips[-1], f"deconv{k}"))
    x = block(z12, "base")
    for k in range(3):
        x = up(x, f"decoder.samplers.{k}")
        skip = skips[k + 1]
        first = (skip.shape[1] - x.shape[1]) // 2
        x = block(torch.cat([x, skip[:, first : first + x.shape[1]]], 1), f"decoder.blocks.{k}")
    x = block(torch.cat([up(x, "deconv_out"), skips[4]], 1), "decoder_head")
    return F.conv2d(x, state["out_conv.weight"], state["out_conv.bias"])


def random_decoder(width: int, *, transposed: bool) -> InstanceDecoder:
    torch.manual_seed(0)
    decoder = InstanceDecoder(width, transposed=transposed).eval().requires_grad_(requires_grad=False)
    disturb(decoder)
    return decoder


@pytest.mark.parametrize("transposed", [False, True])
def test_folded_decoder_is_the_specified_one(transposed):
    decoder = random_decoder(64, transposed=transposed)
    state = {k: v.clone() for k, v in decoder.state_dict().items()}
    embedding = torch.randn(2, 256, 8, 8)
    with torch.inference_mode():
        wanted = reference(state, embedding)
        for network in (decoder, decoder.folded()):
            maps, high = network(embedding)
            assert maps.shape == (2, 3, 128, 128)
            assert high.shape == (2, 16, 32, 32)
            assert float((maps - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.parametrize(("transposed", "parameters"), [(False, 9_591_235), (True, 11_028_931)])
def test_published_size(transposed, parameters):
    decoder = InstanceDecoder(transposed=transposed)
    assert len(decoder.state_dict()) == 66
    assert sum(p.numel() for p in decoder.parameters()) == parameters


@pytest.mark.parametrize("transposed", [False, True])
def test_form_is_read_from_the_tensors(transposed):
    state = InstanceDecoder(32, transposed=transposed).state_dict()
    again = InstanceDecoder.like(state)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_maps_of_one_tile_do_not_depend_on_its_neighbours_in_the_batch():
    decoder = random_decoder(32, transposed=False).folded()
    embedding = torch.randn(3, 256, 8, 8)
    with torch.inference_mode():
        together = decoder(embedding)[0]
        for k in range(3):
            assert torch.allclose(together[k], decoder(embedding[k : k + 1])[0][0], atol=1e-5)
