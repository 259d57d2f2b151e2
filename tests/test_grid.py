"""A weight as a 4-bit run saw it, made again block by block: the bits of bitsandbytes' own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorasft.model  # noqa: F401  # imports bitsandbytes without the hub
from lorasft.merge.blocks import Stored
from lorasft.merge.grid import Requantized
from lorasft.merge.shards import read_shard


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (37, 192), (513, 1024), (130, 40), (3, 1)])
def test_the_bits_of_the_loader(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02).to(torch.bfloat16)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    packed = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed = packed.to("cpu")
    wanted = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    shard = read_shard(tmp_path / "model.safetensors")
    with open(shard.path, "rb") as file:
        seen = Requantized(Stored(file, shard.entries[0], start=len(shard.header)), dtype)
        got = torch.cat([seen.read(start, min(50, shape[0] - start)) for start in range(0, shape[0], 50)])
    assert got.dtype == dtype and torch.equal(got, wanted)
    assert not torch.equal(got.to(torch.bfloat16), weight)
