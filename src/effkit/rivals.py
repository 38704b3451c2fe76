"""What users call today instead: the rivals that `effkit bench` times beside an op.

A rival takes the arguments of the op's torch function by name and says by `cannot(...)` why it cannot compute them, or
None. Masks are made once and kept, as a model shares one among its layers: making them is not timed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.attention.linear import FEATURE_MAPS
from effkit.ops import resolve
from effkit.quant.four_bit import decode_4bit, decode_scales
from effkit.quant.fp8_matmul import decoded


@dataclass(frozen=True)
class Rival:
    """A function to be timed, and why it cannot compute some arguments."""

    call: Callable[..., Any]
    cannot: Callable[..., str | None]

    def __call__(self, **arguments: Any) -> Any:
        return self.call(**arguments)


def rival(cannot: Callable[..., str | None]) -> Callable[[Callable[..., Any]], Rival]:
    """Decorator: the function is a rival that cannot compute what `cannot(**arguments)` gives a reason against."""
    return lambda call: Rival(call, cannot)


def _more_than_plain(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """Reason against arguments of softmax_attention beyond causal, window and scale."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    more = [name for name in given if name not in ("causal", "window", "scale")]
    return f"does not take {', '.join(more)}" if more else None


def _too_many_scores(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """Reason against a score matrix (float32, several copies of it) that would fill the machine."""
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * 4
    limit = 8 if q.is_cuda else 1
    if size > limit << 30:
        return f"its scores take {size / 2**30:.1f} GiB, several times over"
    return _more_than_plain(q, k, v, **options)


def _not_on_cuda(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    return _more_than_plain(q, k, v, **options) if q.is_cuda else "for CUDA only"


@rival(_more_than_plain)
def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: is_causal where it means the same, else a boolean mask."""
    grouped = q.shape[1] != k.shape[1]
    square = q.shape[2] == k.shape[2] and window is None
    sees_all = not causal or (q.shape[2] == 1 and window is None)  # nobody masks the only query of a decoding step
    mask = None if sees_all or square else _boolean_mask(q.shape[2], k.shape[2], window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and square and not sees_all, scale=scale, enable_gqa=grouped
    )


@rival(lambda **_: None)
def sdpa_in_window(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **options: Any) -> Tensor:
    """scaled_dot_product_attention with a boolean mask for whatever `sliding_window_attention` lets a query see."""
    global_tokens = options.pop("global_tokens", None)
    positions = None if global_tokens is None else tuple(map(tuple, global_tokens.tolist()))
    mask = _window_mask(q.shape[2], k.shape[2], positions, q.device, **options)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _more_than_sequences(**arguments: Any) -> str | None:
    """Reason against arguments of a recurrent op beyond its tensors at each token and their scale."""
    per_token = ("q", "k", "v", "g", "beta", "level_scales", "scale")
    more = [name for name, value in arguments.items() if value is not None and name not in per_token]
    return f"does not take {', '.join(more)}" if more else None


def _no_fla(q: Tensor, **arguments: Any) -> str | None:
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    return _more_than_sequences(**arguments) if q.is_cuda else "for CUDA only"


@rival(_more_than_sequences)
def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Causal softmax attention in the place of a recurrent op: another function, but what a model has without it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@rival(_more_than_sequences)
def transformers_ssd(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What transformers' Mamba-2 computes without mamba_ssm, chunks of its default. Steps of 1 leave v and g alone."""
    scan = inspect.unwrap(resolve("transformers.models.mamba2.modeling_mamba2:mamba2_chunk_scan"))
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
    return scan(v, torch.ones_like(g), g, k, q, chunk_size=256).transpose(1, 2).to(v.dtype)


@rival(_more_than_sequences)
def transformers_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """What transformers' Qwen3-Next computes without flash-linear-attention."""
    chunked = inspect.unwrap(resolve("transformers.models.qwen3_next.modeling_qwen3_next:torch_chunk_gated_delta_rule"))
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
    return chunked(q, k, v, g, beta)[0].transpose(1, 2)


def _too_many_pairs(q: Tensor, **arguments: Any) -> str | None:
    return _more_than_sequences(**arguments) or _too_many_scores(q, q, q)


@rival(_too_many_pairs)
def log_linear_quadratic(q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor) -> Tensor:
    """Log-linear attention as a product of T x T matrices: scores, decays and weights of levels.

    Decays are added up over all tokens in float32, as one would; at some hundreds of them that costs the exact digits.
    """
    c = g.float().cumsum(-1)
    decay = (c[..., :, None] - c[..., None, :]).tril().exp().tril()
    scales = level_scales.gather(3, _levels(q.shape[2], q.device).expand(*g.shape, -1))
    return (((q @ k.mT) * decay * scales).to(v.dtype)) @ v


def _fla(path: str, **fixed: Any) -> Rival:
    """The kernel of flash-linear-attention behind "folder:function". Its layout is [B, T, H, ...]: views of ours."""

    def call(**arguments: Any) -> Tensor:
        kernel = resolve(f"fla.ops.{path}")
        views = {name: x.transpose(1, 2) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        return kernel(**views, **fixed)[0].transpose(1, 2)

    return Rival(call, _no_fla)


fla_ssd = _fla("simple_gla:chunk_simple_gla", scale=1.0)
fla_retention = _fla("retention:chunk_retention")
fla_gated_linear_attention = _fla("gla:chunk_gla")
fla_delta_rule = _fla("delta_rule:chunk_delta_rule")
fla_gated_delta_rule = _fla("gated_delta_rule:chunk_gated_delta_rule")
fla_log_linear_attention = _fla("log_linear_attn:chunk_log_linear_attn")


@rival(_no_fla)
def fla_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel of flash-linear-attention behind the features of elu + 1, which it leaves to its callers."""
    phi = FEATURE_MAPS["elu+1"]
    return _fla("linear_attn:chunk_linear_attn", scale=1.0).call(q=phi(q), k=phi(k), v=v)


class _Layer(nn.Module):
    """What transformers' function asks of the layer that calls it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.eval()


@rival(_too_many_scores)
def transformers_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """attn_implementation="eager" of transformers: repeated keys, the whole score matrix, an additive mask."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    mask = _additive_mask(q.shape[2], k.shape[2], window, q.device, q.dtype) if causal else None
    scaling = q.shape[3] ** -0.5 if scale is None else scale
    return eager_attention_forward(_Layer(q.shape[1] // k.shape[1]), q, k, v, mask, scaling)[0].transpose(1, 2)


@rival(_not_on_cuda)
def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """torch.nn.attention.flex_attention, compiled for the shape."""
    mask = _block_mask(q.shape[2], k.shape[2], window, q.device) if causal else None
    return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _cannot_compile(x: Tensor, **_: Any) -> str | None:
    missing = not x.is_cuda and not any(map(shutil.which, ("g++", "clang++", "c++")))
    return "torch.compile needs a C++ compiler" if missing else None


def _no_liger(x: Tensor, weight: Tensor | None = None, **_: Any) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if not x.is_cuda:
        return "for CUDA only"
    return "needs a weight" if weight is None else None


@rival(lambda **_: None)
def dyt_eager(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The expression, operation by operation."""
    return _dyt(x, alpha, weight, bias)


@rival(_cannot_compile)
def dyt_compiled(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The expression through torch.compile, for the shape."""
    return _compiled_dyt()(x, alpha, weight, bias)


@rival(_no_liger)
def dyt_liger(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Liger's kernel."""
    liger_dyt = resolve("liger_kernel.transformers.functional:liger_dyt")
    return liger_dyt(x, alpha.reshape(1), weight, bias)


def _no_bitsandbytes(quant_type: str = "nf4", codebook: Tensor | None = None, **_: Any) -> str | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if codebook is not None and len(codebook) != 256:
        return "takes codebooks of 256 entries"
    return "has no int4" if quant_type == "int4" else None


@rival(_no_bitsandbytes)
def bitsandbytes_encode_4bit(x: Tensor, *, block_size: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """What bitsandbytes has for the device: CUDA; on a CPU torch operations."""
    quantize = resolve("bitsandbytes.functional:quantize_4bit")
    packed, state = quantize(x, blocksize=block_size, quant_type=quant_type)
    return packed.flatten(), state.absmax


@rival(_no_bitsandbytes)
def bitsandbytes_decode_4bit(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """What bitsandbytes has for the device: CUDA; on a CPU C++ with vector instructions."""
    state = resolve("bitsandbytes.functional:QuantState")(
        absmax=absmax, shape=torch.Size(shape), dtype=dtype, blocksize=block_size, quant_type=quant_type
    )
    return resolve("bitsandbytes.functional:dequantize_4bit")(packed[:, None], state)


@rival(lambda packed, **_: _cannot_compile(packed))
def decode_4bit_compiled(packed: Tensor, absmax: Tensor, **options: Any) -> Tensor:
    """effkit's torch path through torch.compile, for the shape."""
    return _compiled_decode_4bit()(packed, absmax, **options)


@functools.cache
def _compiled_decode_4bit() -> Callable[..., Any]:
    return torch.compile(resolve("effkit.quant.four_bit:decode_4bit_torch"), dynamic=False)


@rival(_no_bitsandbytes)
def bitsandbytes_encode_kbit(x: Tensor, codebook: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Its 8-bit quantisation in blocks. On a CPU it rounds by a table, and is one code off now and then."""
    codes, state = resolve("bitsandbytes.functional:quantize_blockwise")(x, codebook, blocksize=block_size)
    return codes, state.absmax


@rival(_no_bitsandbytes)
def bitsandbytes_decode_kbit(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
) -> Tensor:
    """Its 8-bit dequantisation in blocks."""
    state = resolve("bitsandbytes.functional:QuantState")(
        absmax=absmax, code=codebook, dtype=dtype, blocksize=block_size
    )
    return resolve("bitsandbytes.functional:dequantize_blockwise")(codes, state)


def _dyt(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = torch.tanh(alpha * x)
    y = y if weight is None else weight * y
    return y if bias is None else y + bias


@functools.cache
def _compiled_dyt() -> Callable[..., Any]:
    return torch.compile(_dyt, dynamic=False)


@rival(lambda **_: None)
def fp8_encode_eager(x: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """Division by the largest magnitude and torch's cast, operation by operation."""
    return _fp8_encode(x, **how)


@rival(_cannot_compile)
def fp8_encode_compiled(x: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """The same through torch.compile, for the shape."""
    return _compiled_fp8_encode()(x, **how)


def _fp8_encode(
    x: Tensor, granularity: str = "tensor", format: str = "e4m3", block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    dtype = torch.float8_e4m3fn if format == "e4m3" else torch.float8_e5m2
    height, width = x.shape[-2:]
    rows, columns = {"tensor": (height, width), "row": (1, width), "block": block}[granularity]
    tiles = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    scale = tiles.abs().amax((-1, -3), keepdim=True).float() / torch.finfo(dtype).max
    codes = (tiles / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    shape = () if granularity == "tensor" else scale.squeeze(-1).squeeze(-2).shape
    return codes.view(torch.uint8).reshape(x.shape), scale.reshape(shape)


@functools.cache
def _compiled_fp8_encode() -> Callable[..., Any]:
    return torch.compile(_fp8_encode, dynamic=False)


@rival(lambda **_: None)
def fp8_decode_eager(codes: Tensor, scale: Tensor, **how: Any) -> Tensor:
    """torch's cast and a product, operation by operation."""
    return _fp8_decode(codes, scale, **how)


@rival(lambda codes, **_: _cannot_compile(codes))
def fp8_decode_compiled(codes: Tensor, scale: Tensor, **how: Any) -> Tensor:
    """The same through torch.compile, for the shape."""
    return _compiled_fp8_decode()(codes, scale, **how)


def _fp8_decode(
    codes: Tensor, scale: Tensor, granularity: str, dtype: torch.dtype, block: tuple[int, int] = (128, 128)
) -> Tensor:
    tiles = codes.view(torch.float8_e4m3fn).unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    return (tiles.float() * scale[..., :, None, :, None]).to(dtype).reshape(codes.shape)


@functools.cache
def _compiled_fp8_decode() -> Callable[..., Any]:
    return torch.compile(_fp8_decode, dynamic=False)


@rival(lambda **_: None)
def smooth_swiglu_eager(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU and the scales of its channels, operation by operation."""
    return _smooth_swiglu(gate, up)


@rival(lambda gate, up: _cannot_compile(gate))
def smooth_swiglu_compiled(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same through torch.compile, for the shape."""
    return _compiled_smooth_swiglu()(gate, up)


def _smooth_swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    h = F.silu(gate) * up
    amax = h.detach().abs().flatten(0, -2).amax(0).float()
    return h, torch.where(amax > 0, torch.exp2(-torch.ceil(torch.log2(amax))), 1.0)


@rival(lambda **_: None)
def encode_smooth_fp8_eager(h: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scaling, clamping and torch's own cast, operation by operation."""
    return _encode_smooth_fp8(h, channel_scale)


@rival(lambda h, channel_scale: _cannot_compile(h))
def encode_smooth_fp8_compiled(h: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same through torch.compile, for the shape."""
    return _compiled_encode_smooth_fp8()(h, channel_scale)


def _encode_smooth_fp8(h: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    codes = (h.float() * (channel_scale * 256)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, torch.full((), 1 / 256, device=h.device)


@functools.cache
def _compiled_encode_smooth_fp8() -> Callable[..., Any]:
    return torch.compile(_encode_smooth_fp8, dynamic=False)


@functools.cache
def _compiled_smooth_swiglu() -> Callable[..., Any]:
    return torch.compile(_smooth_swiglu, dynamic=False)


@rival(lambda **_: None)
def adamw_eager(param: Tensor, grad: Tensor, **arguments: Any) -> Tensor:
    """torch.optim.AdamW on moments in float32, operation by operation."""
    return _adamw(param, grad, fused=False, **arguments)


@rival(lambda **_: None)
def adamw_fused(param: Tensor, grad: Tensor, **arguments: Any) -> Tensor:
    """torch.optim.AdamW on moments in float32, in torch's own kernel."""
    return _adamw(param, grad, fused=True, **arguments)


def _adamw(param: Tensor, grad: Tensor, *, fused: bool, step: int, **_: Any) -> Tensor:
    optimizer = _adamw_of(param.shape, param.dtype, param.device, fused)
    (own,) = optimizer.param_groups[0]["params"]
    own.grad = grad
    optimizer.step()
    return own.detach()


@functools.lru_cache(maxsize=2)
def _adamw_of(shape: torch.Size, dtype: torch.dtype, device: torch.device, fused: bool) -> torch.optim.AdamW:
    """An optimizer of one parameter, kept with its state: filling that is not timed."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
    return torch.optim.AdamW([parameter], fused=fused, foreach=False)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=1)
def _levels(t: int, device: torch.device) -> Tensor:
    """[T, T] the bit length of t XOR s, 0 where it is not looked at."""
    index = torch.arange(t, device=device)
    return torch.frexp((index[:, None] ^ index).float()).exponent.long().tril()


def _no_bitsandbytes_linear(**arguments: Any) -> str | None:
    """Reason against bitsandbytes' 4-bit product, whose scales are those of effkit where they are not quantised."""
    if arguments.get("nested_absmax") is not None:
        return "its nested scales have other codes"
    return _no_bitsandbytes(**arguments)


def _no_repacking(x: Tensor, weight: Tensor, **arguments: Any) -> str | None:
    """Reason against bitsandbytes' kernel for the evaluation of a layer on a CPU."""
    reason = _no_bitsandbytes_linear(**arguments)
    if reason is None and (x.is_cuda or not resolve("bitsandbytes.functional:has_avx512bf16")()):
        reason = "for CPUs with bfloat16 instructions only"
    if reason is None and (x.dtype != torch.bfloat16 or len(weight) % 32):
        reason = "computes in bfloat16, for multiples of 32 features out"
    return reason


@rival(_no_bitsandbytes_linear)
def bitsandbytes_linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """bitsandbytes' 4-bit product with the weight as it is stored."""
    state = _bitsandbytes_state(weight, absmax, block_size, quant_type, x.dtype)
    return resolve("bitsandbytes:matmul_4bit")(x, weight.view(-1, 1), state, bias=bias)


@rival(_no_repacking)
def bitsandbytes_repacked_linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """bitsandbytes' layer on a CPU: in evaluation a copy of the weight in another order, its scales in bfloat16.

    With gradients, as it is judged, it takes the weight as it is stored.
    """
    if x.requires_grad:
        return bitsandbytes_linear_4bit(
            x=x, weight=weight, absmax=absmax, bias=bias, block_size=block_size, quant_type=quant_type
        )
    packed, state = _repacked(weight, absmax, block_size, quant_type, x.dtype)
    return resolve("bitsandbytes:matmul_4bit")(x, packed, state, bias=bias)


def _no_peft(weight: Tensor | None = None, **arguments: Any) -> str | None:
    """Reason against peft's layer around a dense one."""
    if weight is None:
        return "wraps a dense layer, here is its result"
    return None if importlib.util.find_spec("peft") else "peft is not installed"


@rival(_no_peft)
def peft_lora_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """peft's layer, made once, with the factors in their own dtype; its masks are other ones."""
    return _peft_lora_layer(a, b, scale, weight, bias, dropout)(x)


@functools.lru_cache(maxsize=1)
def _peft_lora_layer(
    a: Tensor, b: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, dropout: float
) -> nn.Module:
    """The layer that peft puts in the place of a dense one. It holds the tensors themselves, which want gradients."""
    config = resolve("peft:LoraConfig")(r=len(a), lora_dropout=dropout, target_modules=["0"])
    layer: Any = resolve("peft:inject_adapter_in_model")(config, nn.Sequential(_dense_layer(weight, bias)))[0]
    layer.scaling["default"] = float(scale)
    for factor, value in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
        del factor.weight
        factor.weight = value
    return layer.train()


@rival(_no_peft)
def peft_vera_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> Tensor:
    """peft's VeRA layer, made once, with the vectors and projections in their own dtypes."""
    return _peft_vera_layer(a, b, lambda_d, lambda_b, weight, bias, dropout)(x)


@functools.lru_cache(maxsize=1)
def _peft_vera_layer(
    a: Tensor, b: Tensor, lambda_d: Tensor, lambda_b: Tensor, weight: Tensor, bias: Tensor | None, dropout: float
) -> nn.Module:
    """The layer that peft puts in the place of a dense one. It holds the tensors themselves, which want gradients."""
    config = resolve("peft:VeraConfig")(r=len(a), vera_dropout=dropout, target_modules=["0"])
    layer: Any = resolve("peft:get_peft_model")(nn.Sequential(_dense_layer(weight, bias)), config).base_model.model[0]
    layer.vera_A["default"], layer.vera_B["default"] = a, b
    for vectors, value in ((layer.vera_lambda_d, lambda_d), (layer.vera_lambda_b, lambda_b)):
        del vectors.default  # the parameter: the key stays
        vectors.default = value
    return layer.train()


def _no_changed_weight(weight: Tensor | None = None, dropout: float = 0.0, **arguments: Any) -> str | None:
    """Reason against a product with W + dW."""
    if weight is None:
        return "changes the weight of a dense layer, here is its result"
    return "drops no inputs of the change alone" if dropout else None


@rival(_no_changed_weight)
def materialized_singlora(
    x: Tensor,
    factor: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """As published: the changed weight is made in every pass, and autograd differentiates through it."""
    M, K = weight.shape
    return F.linear(x, weight + (scale * (factor[:M] @ factor[:K].T)).to(x.dtype), bias)


@rival(lambda **arguments: "its masks are other ones" if arguments.get("seed") is not None else None)
def dora_as_written(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    gate: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """The equation as peft computes it once it has the lengths of the rows: autograd keeps what is in between."""
    result: Any = base if weight is None else F.linear(x, weight, bias)
    plain = result if bias is None else result - bias
    ratio = magnitude / norm
    change = (ratio - 1) * plain + ratio * scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return (result + (change if gate is None else gate * change)).to(x.dtype)


@rival(lambda **arguments: None)
def ia3_as_written(
    x: Tensor, vector: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, feedforward: bool = False
) -> Tensor:
    """The equation as peft computes it, in the dtype of the vector: autograd keeps the result of the layer, too."""
    factor = vector.flatten()
    if feedforward:
        x = (x.to(factor.dtype) * factor).to(x.dtype)
    y = x if weight is None else F.linear(x, weight, bias)
    return y if feedforward else (y * factor).to(y.dtype)


def _dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear with this frozen weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


@rival(lambda weight=None, **_: None if weight is not None else "there is no dense layer")
def linear_without_adapter(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """The frozen layer alone: no adapter is faster."""
    return F.linear(x, weight, bias)


@rival(lambda **_: None)
def dense_linear_of_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    *,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> Tensor:
    """A dense layer with the dequantised weight: three to eight times the bytes, nothing to decode."""
    return F.linear(
        x, _dense_of_4bit(weight, absmax, nested_absmax, nested_offset, block_size, quant_type, x.dtype), bias
    )


@functools.lru_cache(maxsize=1)
def _bitsandbytes_state(weight: Tensor, absmax: Tensor, block_size: int, quant_type: str, dtype: torch.dtype) -> Any:
    """What bitsandbytes keeps beside a packed weight."""
    return resolve("bitsandbytes.functional:QuantState")(
        absmax=absmax.flatten(),
        shape=torch.Size((weight.shape[0], 2 * weight.shape[1])),
        code=resolve("bitsandbytes.functional:get_4bit_type")(quant_type, device=weight.device),
        blocksize=block_size,
        quant_type=quant_type,
        dtype=dtype,
    )


@functools.lru_cache(maxsize=1)
def _repacked(
    weight: Tensor, absmax: Tensor, block_size: int, quant_type: str, dtype: torch.dtype
) -> tuple[Tensor, Any]:
    """The weight as a layer of bitsandbytes holds it after its first evaluation."""
    state = _bitsandbytes_state.__wrapped__(weight, absmax, block_size, quant_type, dtype)  # a new one, to be changed
    return resolve("bitsandbytes.functional:_convert_weight_packed_for_cpu")(weight, state)


@functools.lru_cache(maxsize=1)
def _dense_of_4bit(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """The dequantised weight [M, K]."""
    scales = absmax.flatten()
    if nested_absmax is not None and nested_offset is not None:
        scales = decode_scales(scales, nested_absmax, nested_offset)
    shape = (weight.shape[0], 2 * weight.shape[1])
    return decode_4bit(weight.flatten(), scales, shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type)


def _no_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None = None, **_: Any
) -> str | None:
    """Reason against torch._scaled_mm as it is, without padding."""
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 9):
        return "this device has no FP8 products"
    if any(scale.ndim == 2 and scale.shape[1] > 1 for scale in (a_scale, b_scale)):
        return "does not take blocks"
    return "wants K and M in multiples of 16" if a.shape[-1] % 16 or b.shape[0] % 16 else None


@rival(_no_scaled_mm)
def torch_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """torch._scaled_mm, with the fast sums that its users ask for; scales of rows make it bfloat16."""
    of = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    a, b = a.view(of[options.get("a_format", "e4m3")]), b.view(of[options.get("b_format", "e4m3")])
    dtype = torch.bfloat16 if a_scale.ndim or bias is None or bias.dtype == torch.float32 else bias.dtype
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(
        a, b.t(), a_scale, b_scale.t().contiguous(), bias=bias, out_dtype=dtype, use_fast_accum=a.is_cuda
    )


@rival(lambda **_: None)
def dense_of_fp8(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The dense product in the dtype of the bias, for which both matrices were decoded once."""
    dtype = torch.bfloat16 if bias is None else bias.dtype
    a_format, b_format = (options.get(name, "e4m3") for name in ("a_format", "b_format"))
    return F.linear(_dense_of_fp8(a, a_scale, a_format, dtype), _dense_of_fp8(b, b_scale, b_format, dtype), bias)


@rival(lambda **_: None)
def dense_linear_of_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, format: str = "e4m3"
) -> Tensor:
    """A dense layer with the dequantised weight: two or four times the bytes, nothing to decode."""
    return F.linear(x, _dense_of_fp8(weight, weight_scale, format, x.dtype), bias)


@rival(lambda **arguments: None)
def loop_of_adapters(base: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """As peft does: one adapter after the other, each for a copy of its rows."""
    y = base.clone()
    for e, places in _rows_of_adapters(rows).items():
        y[places] += (x[places] @ a[e].T @ b[e].T * scale[e]).to(y.dtype)
    return y


@functools.lru_cache(maxsize=1)
def _rows_of_adapters(rows: Tensor) -> dict[int, Tensor]:
    """The rows of each adapter, which peft knows from a list of names."""
    present = rows[rows >= 0].unique().tolist()
    return {e: (rows == e).nonzero()[:, 0] for e in present}


@functools.lru_cache(maxsize=2)
def _dense_of_fp8(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The matrix that codes and scales stand for."""
    return decoded(codes, scale, format, dtype)


@functools.lru_cache(maxsize=1)
def _boolean_mask(t: int, s: int, window: int | None, device: torch.device) -> Tensor:
    """[T, S], True where a causal query, aligned bottom-right, sees the key."""
    position = torch.arange(t, device=device)[:, None] + s - t
    keys = torch.arange(s, device=device)
    visible = keys <= position
    return visible if window is None else visible & (keys > position - window)


@functools.lru_cache(maxsize=1)
def _window_mask(
    t: int,
    s: int,
    global_positions: tuple[tuple[int, ...], ...] | None,
    device: torch.device,
    *,
    window: int,
    causal: bool = True,
    sink_tokens: int = 0,
) -> Tensor:
    """[T, S] or [B, 1, T, S], True where a query sees a key."""
    distance = torch.arange(t, device=device)[:, None] + s - t - torch.arange(s, device=device)
    near = (distance < window) if causal else (distance.abs() <= window)
    visible = near | (torch.arange(s, device=device) < sink_tokens)
    if global_positions is not None:
        is_global = torch.zeros(len(global_positions), s, dtype=torch.bool, device=device)
        is_global.scatter_(1, torch.tensor(global_positions, device=device), True)
        visible = visible | is_global[:, None, None] | is_global[:, None, :, None]
    return visible & (distance >= 0) if causal else visible


@functools.lru_cache(maxsize=1)
def _additive_mask(t: int, s: int, window: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, 1, T, S], 0 where the key is seen, else the lowest number."""
    hidden = ~_boolean_mask(t, s, window, device)
    return torch.zeros(1, 1, t, s, device=device, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


@functools.lru_cache(maxsize=1)
def _block_mask(t: int, s: int, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = k <= q + s - t
        return near if window is None else near & (k > q + s - t - window)

    return create_block_mask(visible, None, None, t, s, device=device)
