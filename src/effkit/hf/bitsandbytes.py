"""bitsandbytes' 4-bit checkpoints, read and written key for key; bitsandbytes itself is not needed.

    model = load_bitsandbytes("folder")     a HuggingFace model whose quantised layers are NF4Linear
    save_bitsandbytes(model, "other")       any model with NF4Linear layers, as bitsandbytes and transformers read it

A quantised weight `P` is stored as P (two codes to a byte, [n / 2, 1]), P.absmax, P.quant_map (the table of 16 values),
under double quantisation also P.nested_absmax and P.nested_quant_map, and P.quant_state.bitsandbytes__nf4 or __fp4: the
bytes of a JSON object with the type, block size, dtype and shape. What is read here dequantises bit for bit to what
bitsandbytes gives, and is written back byte for byte: inference never changes what is saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effkit.quant.four_bit import NestedScales, Quantized4bit, code_table
from effkit.quant.kbit import NESTED_BLOCK, codebook

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str = "weight") -> Quantized4bit:
    """The quantised tensor `name` from the tensors that bitsandbytes stores for it, under its own keys.

    Raises ValueError naming the key that is missing, or whose contents are not what the others say.
    """
    meta = _metadata(tensors, name)
    shape, block_size, quant_type = tuple(meta["shape"]), meta["blocksize"], meta["quant_type"]
    elements = math.prod(shape)
    blocks = -(-elements // block_size)
    packed = _need(tensors, name).contiguous().view(torch.uint8).flatten()
    _check_length(name, packed, (elements + 1) // 2)
    _check_map(f"{name}.quant_map", _need(tensors, f"{name}.quant_map"), code_table(quant_type))
    absmax = _need(tensors, f"{name}.absmax")
    _check_length(f"{name}.absmax", absmax, blocks)
    nested = None
    if "nested_blocksize" in meta:
        if meta["nested_blocksize"] != NESTED_BLOCK:
            raise ValueError(f"{name}: nested_blocksize is {meta['nested_blocksize']}, expected {NESTED_BLOCK}")
        _check_map(f"{name}.nested_quant_map", _need(tensors, f"{name}.nested_quant_map"), codebook("dynamic", 8))
        scales = _need(tensors, f"{name}.nested_absmax")
        _check_length(f"{name}.nested_absmax", scales, -(-blocks // NESTED_BLOCK))
        offset = torch.tensor(meta["nested_offset"], dtype=torch.float32, device=absmax.device)
        nested = NestedScales(scales.float(), offset)
    expected = torch.uint8 if nested else torch.float32
    if absmax.dtype != expected:
        raise ValueError(f"{name}.absmax has dtype {absmax.dtype}, expected {expected}")
    return Quantized4bit(packed, absmax, shape, _DTYPES[meta["dtype"]], block_size, quant_type, nested)


def to_bitsandbytes(q: Quantized4bit, name: str = "weight", *, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores for a quantised tensor, under its keys.

    storage   dtype that the codes are seen as, bitsandbytes' quant_storage; their bytes are the same in each
    """
    if q.quant_type not in _TYPES:
        raise ValueError(f"{name} is {q.quant_type}, which bitsandbytes does not know; choices: {', '.join(_TYPES)}")
    meta: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": q.shape,
    }
    tensors = {
        name: q.packed.view(storage).view(-1, 1),
        f"{name}.absmax": q.absmax,
        f"{name}.quant_map": code_table(q.quant_type).clone(),
    }
    if q.nested is not None:
        tensors[f"{name}.nested_absmax"] = q.nested.absmax
        tensors[f"{name}.nested_quant_map"] = codebook("dynamic", 8).clone()
        meta |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": q.nested.offset.item(),
        }
    tensors[f"{name}{_STATE}{q.quant_type}"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return tensors


def read_state_dict(state: Mapping[str, Tensor]) -> tuple[dict[str, Quantized4bit], dict[str, Tensor]]:
    """The quantised tensors of a state dict of bitsandbytes' 4-bit format, by name, and all others as they are."""
    names = [key.partition(_STATE)[0] for key in state if _STATE in key]
    quantized = {name: from_bitsandbytes(state, name) for name in names}
    used = {key for name, q in quantized.items() for key in _keys(name, q)}
    others = {key: tensor for key, tensor in state.items() if key not in used}
    stray = [key for key in others if key.endswith((".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"))]
    if stray:
        raise ValueError(f"the checkpoint has {stray[0]} but no {stray[0].rpartition('.')[0]}{_STATE}nf4 or fp4")
    return quantized, others


def _keys(name: str, q: Quantized4bit) -> list[str]:
    parts = ["", ".absmax", ".quant_map", f"{_STATE}{q.quant_type}"]
    nested = [".nested_absmax", ".nested_quant_map"] if q.nested else []
    return [name + part for part in (*parts, *nested)]


def _metadata(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON object of a quantised tensor, each of its values as it must be."""
    found = [key for key in tensors if key.startswith(name + _STATE)]
    if len(found) != 1 or found[0].removeprefix(name + _STATE) not in _TYPES:
        raise ValueError(f"{name} has the keys {found}, expected one of {[name + _STATE + kind for kind in _TYPES]}")
    (key,) = found
    try:
        meta = json.loads(bytes(tensors[key].tolist()))
    except ValueError as error:
        raise ValueError(f"{key} holds no JSON: {error}") from error
    wanted = {"quant_type", "blocksize", "dtype", "shape"}
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
    if not isinstance(meta, dict) or meta.keys() not in (wanted, wanted | nested):
        raise ValueError(f"{key} has {sorted(meta)}, expected {sorted(wanted)}, and perhaps {sorted(nested)}")
    if meta["quant_type"] != key.removeprefix(name + _STATE):
        raise ValueError(f"{key}: quant_type is {meta['quant_type']!r}, expected that of the key")
    if meta["dtype"] not in _DTYPES:
        raise ValueError(f"{key}: dtype is {meta['dtype']!r}, choices: {', '.join(_DTYPES)}")
    return meta


def _need(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"the checkpoint has no {key}: it is incomplete")
    return tensors[key]


def _check_length(key: str, tensor: Tensor, length: int) -> None:
    if tensor.numel() != length:
        raise ValueError(f"{key} has {tensor.numel()} elements, expected {length} for the shape in its quant_state")


def _check_map(key: str, tensor: Tensor, table: Tensor) -> None:
    if not torch.equal(tensor.cpu().float(), table):
        raise ValueError(f"{key} is another table than that of its type: this checkpoint cannot be read")
