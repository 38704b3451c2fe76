"""The judge is judged: small mutations of torch paths and kernels, each of which must turn an equivalence test red.

A mutation replaces one text in a copy of the package; another process then judges the cases of the ledger named with
it, as tests/test_equivalence.py does. The untouched copy must stay green on the same cases.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from effkit.ops import INTERPRET

ROOT = Path(__file__).parent.parent

JUDGE = """
import sys
from effkit.ops import get_op
from effkit.testing import DTYPES, compare
import effkit
assert effkit.__file__.startswith({copy!r}), effkit.__file__
op, cases = get_op({op!r}), {cases!r}
found = [case for case in op.cases if case.name in cases]
assert len(found) == len(cases), "a case is missing from the ledger"
results = [compare(op, {backend!r}, case, DTYPES[0]) for case in found]
print(*results, sep="\\n")
sys.exit(0 if all(result.ok for result in results) else 3)
"""


@dataclass(frozen=True)
class Bug:
    """A text in a file and what a tired programmer might have written instead; the cases that must notice."""

    name: str
    file: str
    right: str
    wrong: str
    cases: tuple[str, ...]
    op: str = "softmax_attention"
    backend: str = "torch"


SOFTMAX, BLOCKS, MASK, WINDOW, SELECTION = (
    f"effkit/attention/{name}.py" for name in ("softmax", "_blocks", "_mask", "sliding_window", "_selection")
)
DYT = "effkit/norm/dyt.py"
RECURRENT, SSD, LINEAR, RETNET = (
    f"effkit/attention/{name}.py" for name in ("_recurrent", "mamba2", "linear", "retnet")
)
FENWICK, LOG_LINEAR, LOG_LINEAR_DELTA = (
    f"effkit/attention/{name}.py" for name in ("_fenwick", "log_linear", "log_linear_delta")
)
KERNELS = ("_common", "_softmax_tiles", "softmax_backward", "softmax_decode", "sliding_window", "dyt")
COMMON, TILES, BACKWARD, DECODE, WINDOW_KERNEL, DYT_KERNEL = (f"effkit/kernels/{name}.py" for name in KERNELS)
GLA, GLA_KERNEL = "effkit/attention/gla.py", "effkit/kernels/chunk_gla.py"
CHUNK_TILES, CHUNK_SCAN, LINEAR_KERNEL, LOG_LINEAR_KERNEL, LOG_LINEAR_DELTA_KERNEL = (
    f"effkit/kernels/{name}.py"
    for name in ("_chunk_tiles", "chunk_scan", "linear_attention", "log_linear", "log_linear_delta")
)
DELTA, DELTA_CHUNKS, DELTA_BACKWARD, DELTA_KERNEL = (
    "effkit/attention/deltanet.py",
    *(f"effkit/kernels/{name}.py" for name in ("_delta_chunks", "delta_backward", "chunk_delta")),
)
FP8, FP8_TILES, FP8_KERNEL = "effkit/quant/fp8.py", "effkit/kernels/_fp8.py", "effkit/kernels/fp8.py"
FOUR_BIT, FOUR_BIT_KERNEL, KBIT = "effkit/quant/four_bit.py", "effkit/kernels/four_bit.py", "effkit/quant/kbit.py"
LINEAR_4BIT, LINEAR_4BIT_KERNEL = "effkit/quant/nf4_linear.py", "effkit/kernels/linear_4bit.py"
FP8_MATMUL, FP8_LINEAR, FP8_LINEAR_KERNEL = (
    *(f"effkit/quant/{name}.py" for name in ("fp8_matmul", "fp8_linear")),
    "effkit/kernels/fp8_linear.py",
)
SMOOTH, SMOOTH_KERNEL = "effkit/quant/fp8_swiglu.py", "effkit/kernels/fp8_swiglu.py"
ADAMW, ADAMW_KERNEL = "effkit/quant/fp8_adamw.py", "effkit/kernels/fp8_adamw.py"
VERA, SINGLORA = "effkit/peft/vera.py", "effkit/peft/singlora.py"
LOW_RANK, DROPOUT, LOW_RANK_KERNEL, DROPOUT_KERNEL = (
    f"effkit/{name}.py" for name in ("peft/low_rank", "peft/_dropout", "kernels/low_rank", "kernels/_dropout")
)
DORA, IA3, COLUMNS = (f"effkit/peft/{name}.py" for name in ("dora", "ia3", "_columns"))
GROUPED, GROUPED_KERNEL = "effkit/peft/grouped.py", "effkit/kernels/grouped_lora.py"
BUGS = (
    Bug("own token not seen", RECURRENT, "device=c.device).tril()", "device=c.device).tril(-1)", ("a chunk",), "ssd"),
    Bug("decays summed in float32", RECURRENT, "g.double().cumsum(-1)", "g.cumsum(-1)", ("strong gates",), "ssd"),
    Bug("state not decayed", RECURRENT, "new + factor * state", "new + state", ("several chunks",), "ssd"),
    Bug("key decayed twice", SSD, "(c[..., -1:] - c)", "(c[..., -1:] - c + c[..., :1])", ("several chunks",), "ssd"),
    Bug("eps forgotten", LINEAR, "(o[..., width:] + eps)", "o[..., width:]", ("relu",), "linear_attention"),
    Bug("decay of another", RETNET, "decay[None, :, None]", "decay.flip(0)[None, :, None]", ("primes",), "retention"),
    Bug("window loses a key", MASK, "row + self.offset - before", "row + self.offset - before + 1",
        ("window, blocks",)),
    Bug("last key out of range", MASK, "row_end + self.offset + after", "row_end + self.offset - 1 + after",
        ("softcap",)),
    Bug("diagonal not masked", MASK, "key_end - 1 > row + self", "key_end > row_end + self", ("softcap",)),
    Bug("padding kept", MASK, "gone | (j >= self.lengths)", "gone | (j >= self.lengths - 1)", ("right padding",)),
    Bug("sink not counted", BLOCKS, "total + torch.exp(sink - top)", "total + 0 * torch.exp(sink - top)", ("sinks",)),
    Bug("gradient of lse dropped", BLOCKS, ".sum(3) - d_lse", ".sum(3) - 0 * d_lse", ("softcap",)),
    Bug("slope of softcap", BLOCKS, "softcap * bent, 1 - bent * bent", "softcap * bent, 1 - bent", ("softcap",)),
    Bug("gradient not scaled", BLOCKS, "None], k.shape[1])) * scale", "None], k.shape[1]))", ("softcap",)),
    Bug("sign of the sink's gradient", BLOCKS, "d_sinks = -(share * delta)", "d_sinks = (share * delta)", ("sinks",)),
    Bug("groups not causal", SOFTMAX, "k, v, is_causal=True", "k, v, is_causal=False", ("multi-query",)),
    Bug("scale forgotten", SOFTMAX, "is_causal=causal, scale=scale)", "is_causal=causal)", ("scaled",)),
    Bug("tail of a packed batch", SOFTMAX, "q.shape[2] - bounds[-1]", "q.shape[2] - bounds[-2]", ("packed",)),
    Bug("empty row divides", BLOCKS, "/ total.clamp_min(torch.finfo(scores.dtype).tiny)", "/ total",
        ("rows that see nothing",)),
    *(
        replace(bug, op="log_linear_attention")
        for bug in (
            Bug("block joins too late", FENWICK, "position % (1 << i) == 0", "position % (2 << i) == 0",
                ("several chunks",)),
            Bug("decay within a block forgotten", LOG_LINEAR, "late + across[..., None]", "late", ("small chunks",)),
            Bug("old blocks not decayed", LOG_LINEAR, "i: kept * block", "i: block", ("one past a chunk",)),
            Bug("last chunk not cut", LOG_LINEAR, "past_blocks((T - 1) % C)", "past_blocks(C - 1)", ("primes",)),
        )
    ),
    *(
        replace(bug, op="log_linear_gated_delta_rule")
        for bug in (
            Bug("nothing erased for queries", LOG_LINEAR_DELTA, "from_start = q * decay - scores @ erase",
                "from_start = q * decay", ("one past a chunk",)),
            Bug("nothing erased in blocks", LOG_LINEAR_DELTA, "kept * memory - key.mT @ erased", "kept * memory",
                ("small chunks",)),
            Bug("sources not erased", LOG_LINEAR_DELTA, "(scores @ inverse) * within_chunk", "scores * within_chunk",
                ("primes",)),
        )
    ),
    *(
        replace(bug, op="sliding_window_attention")
        for bug in (
            Bug("left edge not masked", MASK, "key < row_end - 1 + self", "key < row + self", ("both sides",)),
            Bug("sinks counted twice", WINDOW, " & ~in_band", "", ("sinks",)),
            Bug("parts weighed alike", WINDOW, "share_beside * o_beside", "share * o_beside", ("sinks",)),
            Bug("a key of a class forgotten", WINDOW, "residues + d - 1) // d", "residues) // d", ("dilated",)),
            Bug("heads in another order", WINDOW, "x[:, back].flatten", "x.flatten", ("a dilation for each head",)),
            Bug("rows of other tokens", SELECTION, "None], selected, x.gather(2, place))",
                "None], x.gather(2, place), selected)", ("global tokens",)),
        )
    ),
    *(
        replace(bug, op="sliding_window_attention", backend="triton")
        for bug in (
            Bug("a side loses a key", WINDOW_KERNEL, "2 * window + 1", "2 * window", ("own key alone",)),
            Bug("seen from one place short", WINDOW_KERNEL, "(sequences,), window", "(sequences,), window - 1",
                ("both sides, packed",)),
        )
    ),
    *(
        replace(bug, op="gated_linear_attention")
        for bug in (
            Bug("decay behind the border forgotten", GLA, "left_early + total_late", "left_early", ("several chunks",)),
            Bug("halves change places", GLA, "_, q_late = _halves(q", "q_late, _ = _halves(q", ("two",)),
            Bug("a token decays for itself", GLA, "left = g, torch.zeros_like(g)", "left = g, g", ("two",)),
        )
    ),
    *(
        replace(bug, op="gated_linear_attention", backend="triton")
        for bug in (
            Bug("border of its own half", GLA_KERNEL, "rows >> (level + 1) << (level + 1)", "rows >> level << level",
                ("a chunk",)),
            Bug("sums lose their second part", GLA_KERNEL, "if PARTS == 2:\n        exponent += ",
                "if PARTS == 3:\n        exponent += ", ("strong gates",)),
            Bug("odd blocks meet too", GLA_KERNEL, "tl.where(block % 2 == 0, block + 1, -1)", "block + 1",
                ("a chunk",)),
            Bug("gradient of a gate misses what is kept", GLA_KERNEL, "- written + kept[None, :]", "- written",
                ("several chunks",)),
            Bug("own products pass a gate", GLA_KERNEL, "(wide_k * dk - written)", "wide_k * dk", ("a chunk",)),
            Bug("memory not decayed", GLA_KERNEL, "b, memory * _across(", "b, memory + 0 * _across(",
                ("several chunks",)),
            Bug("segments do not decay", GLA_KERNEL, "memory *= factor[:, None]", "memory *= 1.0",
                ("several chunks",)),
            Bug("few tokens forget nothing", GLA_KERNEL, "memory * tl.exp(g) + k", "memory + k", ("two",)),
        )
    ),
    *(
        replace(bug, op="gated_delta_rule")
        for bug in (
            Bug("old value not taken back", DELTA, "value = w - e @ memory", "value = w", ("several chunks",)),
            Bug("what is found does not decay", DELTA, "q * decay, erase * decay", "q * decay, erase",
                ("several chunks",)),
            Bug("memory does not decay", DELTA, "factor * memory) + key.mT", "memory) + key.mT", ("several chunks",)),
            Bug("step size missing from the system", DELTA, "tril(), beta * (k @ k.mT)", "tril(), k @ k.mT",
                ("primes",)),
        )
    ),
    *(
        replace(bug, op="gated_delta_rule", backend="triton")
        for bug in (
            Bug("sign of a block of the inverse", DELTA_CHUNKS, "lower_left = -dot(", "lower_left = dot(", ("primes",)),
            Bug("blocks meet that do not touch", DELTA_CHUNKS, "(j >> level) + 1) & ((j >> level) % 2 == 0), m",
                "(j >> level) + 1), m", ("primes",)),
            Bug("erasures do not decay", DELTA_CHUNKS, "strength *= from_start", "strength += 0 * from_start",
                ("several chunks",)),
            Bug("values decay on their way out only", DELTA_CHUNKS, "memory *= across(chunk_ptr, C)\n" + 12 * " " +
                "values *=", "memory *= across(chunk_ptr, C)\n" + 12 * " " + "values += 0 *", ("several chunks",)),
            Bug("a memory in tiles that does not decay", DELTA_CHUNKS, "decay * memory)", "memory)", ("wide",)),
            Bug("nor does its gradient", DELTA_BACKWARD, "dmemory = decay * load", "dmemory = load", ("wide",)),
            Bug("erasures send nothing back", DELTA_BACKWARD, "cast(-dvalues, dtype)", "cast(0 * dvalues, dtype)",
                ("several chunks",)),
            Bug("pairs seen from one side", DELTA_BACKWARD, "dot(tl.trans(pairs), keys, dot(pairs, keys, dk))",
                "dot(pairs, keys, dk)", ("primes",)),
            Bug("gates of what is found", DELTA_BACKWARD, "tl.cumsum(-beta * found", "tl.cumsum(0 * beta * found",
                ("several chunks",)),
            Bug("step size where it is forgotten", DELTA_BACKWARD, "dbeta - found", "dbeta", ("several chunks",)),
            Bug("few tokens add up", DELTA_KERNEL, "error = values - tl.sum", "error = values - 0 * tl.sum", ("few",)),
        )
    ),
    *(
        replace(bug, op="dynamic_tanh")
        for bug in (
            Bug("bias forgotten", DYT, "t.add_(bias)", "t.add_(0 * bias)", ("primes",)),
            Bug("sum of the wrong factor", DYT, "(g * t).sum(0)", "(g * rows).sum(0)", ("primes",)),
            Bug("alpha missing from dx", DYT, "torch.mul(t, alpha, out=out)", "out.copy_(t)", ("primes",)),
            Bug("slope without weight", DYT, "g.mul_(weight)", "g.mul_(1)", ("primes",)),
        )
    ),
    *(
        replace(bug, backend="triton")
        for bug in (
            Bug("last key left out", TILES, "tl.minimum(key_hi, last + 1)", "tl.minimum(key_hi, last)", ("primes",)),
            Bug("window loses a key", TILES, "first - window + 1", "first - window + 2", ("window",)),
            Bug("window gains a key", TILES, "keys > position - window", "keys >= position - window", ("window",)),
            Bug("a tile too many without mask", TILES, "all_hi, hi) - a, 0) // BLOCK * BLOCK",
                "all_hi, hi) - a + BLOCK - 1, 0) // BLOCK * BLOCK", ("primes",)),
            Bug("denominator not rescaled", TILES, "total * shrink + tl", "total + tl", ("grouped",)),
            Bug("output not rescaled", TILES, "v, acc * shrink[:, None])", "v, acc)", ("grouped",)),
            Bug("slope of softcap", TILES, "grad *= 1 - capped * capped", "grad *= 1 - capped", ("softcap",)),
            Bug("sink counted twice", TILES, "tl.full([BLOCK_M], 1.0", "tl.full([BLOCK_M], 2.0", ("sinks",)),
            Bug("packed sequences meet", TILES, "tl.where(rest, T, row_lo), row", "tl.where(rest, T, 0), row",
                ("packed",)),
            Bug("starts ignored", TILES, "clamped(key_starts_ptr, n, 0, S)", "0", ("left padding",)),
            Bug("one head of the group", BACKWARD, "for g in range(group)", "for g in range(1)", ("grouped",)),
            Bug("gradient of lse dropped", BACKWARD, "delta -= tl.load(", "delta -= 0 * tl.load(", ("grouped",)),
            Bug("key gradient not scaled", BACKWARD, "dk * scale, 0.0)", "dk, 0.0)", ("primes",)),
            Bug("delta left out", BACKWARD, "tl.trans(v)) - delta[:, None]", "tl.trans(v))", ("primes",)),
            Bug("a row too few for a key", TILES, "lo = tl.maximum(row_lo, first - shift)",
                "lo = tl.maximum(row_lo, first - shift + 1)", ("primes",)),
            Bug("splits weighed alike", DECODE, "tl.exp2(part_lse - base)", "tl.exp2(part_lse - part_lse)",
                ("decode",)),
            Bug("a split starts late", DECODE, "lo += split * share", "lo += split * (share + 1)", ("decode",)),
            Bug("wrong head of a group", DECODE, "kv_head * group + row % group", "kv_head + row % group", ("decode",)),
        )
    ),
    *(
        replace(bug, op="dynamic_tanh", backend="triton")
        for bug in (
            Bug("slope of tanh", DYT_KERNEL, "(1 - t * t)", "(1 - t)", ("primes",)),
            Bug("wrong sum for the weight", DYT_KERNEL, "sum_weight += dy * t", "sum_weight += dy", ("primes",)),
            Bug("wrong sum for alpha", DYT_KERNEL, "sum_alpha += through * x", "sum_alpha += through", ("primes",)),
            Bug("rows of a stripe skipped", DYT_KERNEL, "stripe + stripe, N)", "stripe + stripe - BLOCK_N, N)",
                ("many rows",)),
            Bug("series of tanh", COMMON, "2 / 15 +", "1 / 15 +", ("all but linear", "around the bend")),
        )
    ),
    *(
        replace(bug, op="ssd", backend="triton")
        for bug in (
            Bug("last gate of a chunk left out", CHUNK_TILES, "hi = tl.load(c_ptr + C - 1) - tl.load(c_ptr + i)",
                "hi = tl.load(c_ptr + C - 2) - tl.load(c_ptr + i)", ("one past a chunk",)),
            Bug("gates summed in float32", CHUNK_TILES, "exponent = hi + (tl.load", "exponent = hi + 0 * (tl.load",
                ("strong gates",)),
            Bug("keys decay by their own gate", CHUNK_SCAN, "tl.cumsum(written, 0) - written", "tl.cumsum(written, 0)",
                ("one past a chunk",)),
            Bug("gradient not scaled", CHUNK_SCAN, "dmemories, dfirst, scale, C", "dmemories, dfirst, 1.0, C",
                ("small chunks",)),
            Bug("segments do not decay", CHUNK_SCAN, "memory *= tl.load(factors_ptr + at)", "memory *= 1.0",
                ("several chunks",)),
            Bug("token halved", CHUNK_SCAN, "memory += k[:, None] * values[None, :]",
                "memory += 0.5 * k[:, None] * values[None, :]", ("two",)),
        )
    ),
    *(
        replace(bug, op="log_linear_attention", backend="triton")
        for bug in (
            Bug("a level too low", LOG_LINEAR_KERNEL, "tl.where(bit < LOG_C, within, bit + 1)",
                "tl.where(bit < LOG_C, within, bit)", ("one past a chunk",)),
            Bug("halves joined without decay", LOG_LINEAR_KERNEL, "_between(until_ptr, half, end) * first + second",
                "first + second", ("small chunks",)),
            Bug("a block that nobody reads", LOG_LINEAR_KERNEL, "level & 1 == 0) & (end <= last)",
                "level & 1 == 0) & (end < last)", ("one past a chunk",)),
            Bug("the state decays from the block", LOG_LINEAR_KERNEL,
                "gradient += _between(until_ptr, first, N) * held", "gradient += held", ("strong gates",)),
            Bug("what passes a chunk has no gates", LOG_LINEAR_KERNEL, "tl.where(sees, all_read - after, added_before)",
                "tl.where(sees, all_read - after, 0.0)", ("no decay",)),
            Bug("the state has no gates", LOG_LINEAR_KERNEL, "kept += tl.load(", "kept += 0 * tl.load(", ("no decay",)),
        )
    ),
    *(
        replace(bug, op="log_linear_gated_delta_rule", backend="triton")
        for bug in (
            Bug("blocks do not join", LOG_LINEAR_DELTA_KERNEL, "if target != slot:", "if target < slot:",
                ("no decay",)),
            Bug("erasure adds", LOG_LINEAR_DELTA_KERNEL, "gradient -= _onto(", "gradient += _onto(", ("no decay",)),
            Bug("decay of blocks has no gradient", LOG_LINEAR_DELTA_KERNEL, "overlap += block * dblock",
                "overlap += 0 * block * dblock", ("no decay",)),
            Bug("keys do not see what they erase", LOG_LINEAR_DELTA_KERNEL, "dkey -= dot(erased, dblock)",
                "dkey -= 0 * dot(erased, dblock)", ("no decay",)),
        )
    ),
    *(
        replace(bug, op="linear_attention", backend="triton")
        for bug in (
            Bug("weights of the past forgotten", LINEAR_KERNEL, "total += tl.sum(q * _", "total += tl.sum(0 * q * _",
                ("one past a chunk",)),
            Bug("sums take their own chunk", LINEAR_KERNEL, "(tl.cumsum(x, 0) - x)", "tl.cumsum(x, 0)",
                ("one past a chunk",)),
            Bug("gradient of the quotient dropped", LINEAR_KERNEL, "(dscores - delta[None, :])", "dscores",
                ("primes",)),
            Bug("sums run forward", LINEAR_KERNEL, "n = N - 1 - place", "n = place", ("several chunks",)),
            Bug("token missing from its own sum", CHUNK_SCAN, "key_sum += k", "key_sum += 0 * k", ("one",)),
        )
    ),
    Bug("cast does not saturate", FP8, "v.clamp_(-largest, largest).nan", "v.nan", ("strange values, e5m2",),
        "encode_fp8"),
    Bug("NaN keeps its sign", FP8, ".nan_to_num_(nan=math.nan)", "", ("strange values",), "encode_fp8"),
    Bug("denormals divide to infinity", FP8, ".max)).clamp(min=2.0**-126)", ".max))", ("strange values",),
        "encode_fp8"),
    Bug("power of two rounded down", FP8, " + 0x7FFFFF) >> 23", ") >> 23", ("powers of two",), "encode_fp8"),
    Bug("sign lost", FP8, "(wide & 0x80) << 8 | ", "", ("rows",), "decode_fp8"),
    Bug("ties away from zero", FP8_TILES, "((bits >> CUT) & 1)", "1", ("ties",), "encode_fp8", "triton"),
    Bug("subnormals not rounded", FP8_TILES, "(size < LEAST, subnormal", "(size < 0, subnormal", ("rows",),
        "encode_fp8", "triton"),
    Bug("each row of a block for itself", FP8_KERNEL, "amax = tl.max(amax, 0) + tl.zeros([TILE_R],",
        "amax += tl.zeros([TILE_R],", ("weight",), "encode_fp8", "triton"),
    Bug("block sees its neighbour", FP8_KERNEL, "(column_in_group < width) & (columns < C)", "(columns < C)",
        ("wide blocks",), "encode_fp8", "triton"),
    Bug("stripe ends early", FP8_KERNEL, "own * steps + steps)", "own * steps + 1)", ("long rows",), "encode_fp8",
        "triton"),
    Bug("scale of another block", FP8_KERNEL, "rows // BLOCK_ROWS) * across", "rows // BLOCK_ROWS)", ("weight",),
        "decode_fp8", "triton"),
    Bug("a tie goes up", FOUR_BIT, "torch.le(z, threshold", "torch.lt(z, threshold", ("ties",), "encode_4bit"),
    Bug("negative ties away from zero", FOUR_BIT, "thresholds.nextafter(thresholds.new_tensor(-1.0))", "thresholds",
        ("fp4, ties",), "encode_4bit"),
    Bug("halves of a byte swapped", FOUR_BIT, "ranks[:, 1], ranks[:, 0]", "ranks[:, 0], ranks[:, 1]", ("odd",),
        "encode_4bit"),
    Bug("scale of the block before", FOUR_BIT, "* absmax[whole]", "* absmax[whole - 1]", ("one past a block",),
        "decode_4bit"),
    Bug("a branch taken for another", FOUR_BIT_KERNEL, "t[13], t[9]", "t[9], t[13]", ("odd",), "encode_4bit", "triton"),
    Bug("a tie goes up", FOUR_BIT_KERNEL, "b0 = ~(z <= ", "b0 = (z >= ", ("ties",), "encode_4bit", "triton"),
    Bug("reciprocal of nothing", FOUR_BIT_KERNEL, "absmax < _TINY", "absmax < 0", ("zeros",), "encode_4bit", "triton"),
    Bug("halves of a byte swapped", FOUR_BIT_KERNEL, "pair >> 4, pair & 15", "pair & 15, pair >> 4", ("odd",),
        "decode_4bit", "triton"),
    Bug("one scale for all", KBIT, "absmax[whole:].expand", "absmax[:1].expand", ("primes",), "decode_kbit"),
    *(
        replace(bug, op="linear_4bit")
        for bug in (
            Bug("columns of the first piece", LINEAR_4BIT, "slice(columns.start // 2, columns.stop // 2)",
                "slice(0, (columns.stop - columns.start) // 2)", ("several pieces",)),
            Bug("bias of the first piece", LINEAR_4BIT, "else bias[rows]", "else bias[: rows.stop - rows.start]",
                ("several pieces",)),
            Bug("bytes taken for scales", LINEAR_4BIT,
                "absmax = decode_scales(absmax.flatten(), nested_absmax, nested_offset).view_as(absmax)",
                "absmax = absmax.float()", ("double quantised",)),
            Bug("mean of the tokens", LINEAR_4BIT, ".sum(0, dtype=wide)", ".mean(0, dtype=wide)", ("primes",)),
        )
    ),
    *(
        replace(bug, op="linear_4bit", backend="triton")
        for bug in (
            Bug("low half first", LINEAR_4BIT_KERNEL, "_decoded(packed >> 4, scale", "_decoded(packed & 15, scale",
                ("primes",)),
            Bug("scale of the step", LINEAR_4BIT_KERNEL, "((k + starts) // BLOCK_SIZE)",
                "((k + 0 * starts) // BLOCK_SIZE)", ("primes",)),
            Bug("mean scale left out", LINEAR_4BIT_KERNEL, "* nested + tl.load(nested_offset_ptr)", "* nested",
                ("double quantised",)),
            Bug("last share not added", LINEAR_4BIT_KERNEL, "in range(n_splits)", "in range(n_splits - 1)",
                ("several shares",)),
            Bug("share ends early", LINEAR_4BIT_KERNEL, "split * share + share, K)", "split * share + BLOCK_K, K)",
                ("several shares",)),
            Bug("bias in every share", LINEAR_4BIT_KERNEL, "bias if n_splits == 1 else None", "bias",
                ("several shares",)),
        )
    ),
    *(
        replace(bug, op="linear_fp8")
        for bug in (
            Bug("scales of the first tile", FP8_MATMUL, "scale.narrow(axis, start // step", "scale.narrow(axis, 0",
                ("several tiles",)),
            Bug("rows of the first tile", FP8_MATMUL, "codes.narrow(axis, start, min", "codes.narrow(axis, 0, min",
                ("several tiles, rows",)),
            Bug("mean of the tokens", FP8_LINEAR, ".sum(0).to(ctx.bias_dtype)", ".mean(0).to(ctx.bias_dtype)",
                ("rows",)),
        )
    ),
    Bug("bias scaled", FP8_MATMUL, "y if bias is None else y + bias).to(dtype)\n\n\ndef matmul_fp8(",
        "y if bias is None else y + bias * a_scale).to(dtype)\n\n\ndef matmul_fp8(", ("tensor",), "matmul_fp8"),
    Bug("formats exchanged", FP8_MATMUL, "wide = decoded(a, a_scale, a_format", "wide = decoded(a, a_scale, b_format",
        ("gradients",), "matmul_fp8"),
    *(
        replace(bug, op="linear_fp8", backend="triton")
        for bug in (
            Bug("scale of the first step", FP8_LINEAR_KERNEL, "step * BLOCK_K // BLOCK", "0 * BLOCK_K // BLOCK",
                ("blocks",)),
            Bug("scale of the first tile", FP8_LINEAR_KERNEL, "(first // ROWS)", "(0 * first // ROWS)", ("blocks",)),
            Bug("share ends early", FP8_LINEAR_KERNEL, "first + share, steps)", "first + share - 1, steps)",
                ("decoding",)),
            Bug("bias in every share", FP8_LINEAR_KERNEL, "bias if splits == 1 else None", "bias", ("decoding",)),
            Bug("always e4m3", FP8_LINEAR_KERNEL, "W_MANTISSA=FORMATS[w_format].mantissa", "W_MANTISSA=3",
                ("rows, e5m2",)),
        )
    ),
    Bug("block of the weight", FP8_LINEAR_KERNEL, "n0, n, N, stride_xs, x_block", "n0, n, N, stride_xs, 0 * x_block",
        ("blocks",), "matmul_fp8", "triton"),
    Bug("powers of two doubled", SMOOTH, "exponent - (mantissa == 0.5)", "exponent - 0 * (mantissa == 0.5)",
        ("powers of two",), "smooth_swiglu"),
    Bug("last rows alone", SMOOTH, "torch.maximum(amax, out.abs().amax(0))", "out.abs().amax(0)", ("several pieces",),
        "smooth_swiglu"),
    Bug("gate's gradient without up", SMOOTH, "silu_backward(d * u, g", "silu_backward(d, g", ("primes",),
        "smooth_swiglu"),
    Bug("not to the format's peak", SMOOTH, ".mul_(PEAK[format]), format)", ".mul_(PEAK['e4m3']), format)",
        ("several axes, e5m2",), "encode_smooth_fp8"),
    Bug("floor of the logarithm", SMOOTH_KERNEL, "(amax + 0x7FFFFF) >> 23", "amax >> 23", ("primes",), "smooth_swiglu",
        "triton"),
    Bug("last stripe not folded", SMOOTH_KERNEL, "in range(n_stripes)", "in range(n_stripes - 1)", ("primes",),
        "smooth_swiglu", "triton"),
    Bug("scales of the first channels", SMOOTH_KERNEL, "tl.load(scale_ptr + channels,",
        "tl.load(scale_ptr + channels % BLOCK_C,", ("one past a block",), "encode_smooth_fp8", "triton"),
    Bug("bias of v forgotten", ADAMW, "(root(v) * unbias_root_v + eps)", "(root(v) + eps)", ("weight",),
        "adamw_fp8_step"),
    Bug("v not rounded up", ADAMW, "(new_v > 0) & (results[3] == 0)", "(new_v < 0) & (results[3] == 0)",
        ("v is rounded up",), "adamw_fp8_step"),
    Bug("decay after the step", ADAMW_KERNEL, "decay * p - step_size *", "decay * p - decay * step_size *",
        ("weight",), "adamw_fp8_step", "triton"),
    Bug("m rounded up, too", ADAMW_KERNEL, "there, M_MANTISSA, False)", "there, M_MANTISSA, ROUND_UP)",
        ("v is rounded up",), "adamw_fp8_step", "triton"),
    *(
        replace(bug, op="lora_linear")
        for bug in (
            Bug("gradient not divided", LOW_RANK, ".mul_(factor(scale, dy, dropout))", ".mul_(factor(scale, dy, 0.0))",
                ("primes, dropout",)),
            Bug("gradient of x not dropped", LOW_RANK, "dx[piece].mul_(keep)", "dx[piece].mul_(1)",
                ("primes, dropout",)),
            Bug("x not dropped for a", LOW_RANK, "(rows[piece] * keep)", "rows[piece]", ("primes, dropout",)),
            Bug("gradient of the adapter alone", LOW_RANK, "dx if weight is None else dx.addmm_",
                "dx if a is a else dx.addmm_", ("primes",)),
            Bug("sign bits in the hash", DROPOUT, "h.bitwise_xor_(spare.bitwise_and_((1 << 32 - shift) - 1))",
                "h.bitwise_xor_(spare)", ("primes, dropout",)),
        )
    ),
    *(
        replace(bug, op="lora_linear", backend="triton")
        for bug in (
            Bug("last part not added", LOW_RANK_KERNEL, "in range(n_parts)", "in range(n_parts - 1)",
                ("one past a block",)),
            Bug("share ends early", LOW_RANK_KERNEL, "share * width + width, K)", "share * width + BLOCK_C, K)",
                ("one past a block",)),
            Bug("mask of the first rows", LOW_RANK_KERNEL, "x = dropped(x, _keys(seed_ptr, rows)",
                "x = dropped(x, _keys(seed_ptr, rows - t)", ("beside a result, dropout",)),
            Bug("mask of the first columns", LOW_RANK_KERNEL, "dropped(dx, _keys(seed_ptr, rows), start,",
                "dropped(dx, _keys(seed_ptr, rows), 0,", ("primes, dropout",)),
            Bug("sums of the first rows", LOW_RANK_KERNEL, "db_ptr + stripe * M * R", "db_ptr + 0 * stripe * M * R",
                ("one past a block",)),
            Bug("halves exchanged", DROPOUT_KERNEL, "tl.join(both << 16 >> 16, both >> 16)",
                "tl.join(both >> 16, both << 16 >> 16)", ("primes, dropout",)),
        )
    ),
    *(
        replace(bug, op="vera_linear")
        for bug in (
            Bug("one vector forgotten", VERA, ".unsqueeze(1) * b * lambda_d.to(wide)", ".unsqueeze(1) * b",
                ("primes",)),
            Bug("gradient of the factor for that of b", VERA, "(d_factor * b).to(wide)", "d_factor.to(wide)",
                ("primes",)),
            Bug("gradient without the other vector", VERA, "(by_both @ lambda_d.to(wide))", "by_both.sum(1)",
                ("primes",)),
            Bug("never off", VERA, "dtype=torch.float32) if gate is None else gate", "dtype=torch.float32)", ("off",)),
        )
    ),
    Bug("last rows", SINGLORA, "factor[:K].T", "factor[-K:].T", ("wide out",), "singlora_linear"),
    Bug("gradient of one side", SINGLORA, "factor[:K].T", "factor[:K].detach().T", ("square",), "singlora_linear"),
    Bug("nothing dropped", LOW_RANK_KERNEL, "views(x, factor, weight, base), scale, weight, bias, base, seed, dropout=",
        "views(x, factor, weight, base), scale, weight, bias, base, seed, dropout=0 * ", ("dropout",),
        "singlora_linear", "triton"),
    *(
        replace(bug, op="grouped_lora")
        for bug in (
            Bug("order not undone", GROUPED, "index_copy_(0, self.order, x)", "copy_(x)", ("decoding",)),
            Bug("scale of the first adapter", GROUPED, "alpha=scales[e]", "alpha=scales[0]", ("unsorted",)),
            Bug("only the last run trains", GROUPED, "da[e] += ds_own", "da[e] = ds_own", ("unsorted, many tokens",)),
        )
    ),
    *(
        replace(bug, op="dora_linear")
        for bug in (
            Bug("result not divided by the ratio", DORA, "(up * d_up).sum(1)) / (1 + stretch)", "(up * d_up).sum(1))",
                ("primes",)),
            Bug("update taken for the base", DORA, "(direct - (up * d_up).sum(1))", "direct", ("gate",)),
            Bug("bias stretched", DORA, "(-stretch * bias).to(x.dtype)", "(0 * bias).to(x.dtype)", ("primes",)),
            Bug("divided by what is all but zero", DORA, ">= -0.5).all()", ">= -1e9).all()", ("tiny lengths",)),
            Bug("gradient not stretched", DORA, "stretch if ctx.dropout else 1 + stretch", "1 + 0 * stretch",
                ("primes",)),
            Bug("change of all of x", DORA, "change = F.linear(seen,", "change = F.linear(rows,",
                ("primes, dropout",)),
            Bug("gate forgets the update", DORA, "gate * stretch, gate * g)", "gate * stretch, g)", ("gate",)),
            Bug("last rows not added up", COLUMNS, "total = total + (left", "total = (left", ("several pieces",)),
        )
    ),
    *(
        replace(bug, op="ia3_linear")
        for bug in (
            Bug("result not divided", IA3, "(total / factor if ctx.keep_result else total)", "total", ("primes",)),
            Bug("divided by zero", IA3, "(vector.abs() >= 1 / 64)", "(vector.abs() >= 0)", ("tiny and zero",)),
            Bug("x for the result", IA3, "_Scaled.apply(x, vector, False)", "_Scaled.apply(x, vector, True)",
                ("tiny and zero, feed-forward",)),
        )
    ),
    *(
        replace(bug, op="grouped_lora", backend="triton")
        for bug in (
            Bug("rows without an adapter get the first", GROUPED_KERNEL, "tl.where(e == -1, E, E + 1)",
                "tl.where(e == -1, 0, E + 1)", ("unsorted",)),
            Bug("first tile of the group again", GROUPED_KERNEL, "(tile - tiles_end + tiles) * BLOCK_N", "0 * tiles",
                ("one adapter",)),
            Bug("last share not added", GROUPED_KERNEL, "range(SPLITS - 1)", "range(SPLITS - 2)",
                ("decoding, deep",)),
            Bug("last tiles of groups not computed", GROUPED_KERNEL, "min(B, E + 2) if T % BLOCK_N else 0", "0",
                ("unsorted",)),
        )
    ),
)  # fmt: skip


def planted() -> Iterator[Any]:
    for bug in BUGS:
        if (bug.backend == "triton") == INTERPRET:
            name = f"{bug.op}-{bug.name.replace(' ', '_')}"
            yield pytest.param(bug, id=name, marks=[pytest.mark.interpreter] if INTERPRET else [])


def copy_package(to: Path) -> Path:
    shutil.copytree(ROOT / "src" / "effkit", to / "effkit", ignore=shutil.ignore_patterns("__pycache__", "model"))
    shutil.copytree(ROOT / "kernels", to / "effkit" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return to


def judge(copy: Path, op: str, backend: str, cases: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    script = JUDGE.format(copy=str(copy), op=op, backend=backend, cases=cases)
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, cwd=copy, capture_output=True, text=True)


@pytest.mark.parametrize("bug", list(planted()))
def test_planted_bug_is_caught(bug: Bug, tmp_path: Path) -> None:
    file = copy_package(tmp_path) / bug.file
    source = file.read_text()
    assert source.count(bug.right) == 1, f"{bug.right!r} stands {source.count(bug.right)} times in {bug.file}"
    file.write_text(source.replace(bug.right, bug.wrong))
    ended = judge(tmp_path, bug.op, bug.backend, bug.cases)
    assert ended.returncode == 3, f"not caught, or crashed:\n{ended.stdout}\n{ended.stderr[-2000:]}"
    assert "WRONG" in ended.stdout


def controls() -> Iterator[Any]:
    for op, backend in sorted({(bug.op, bug.backend) for bug in BUGS}):
        if (backend == "triton") == INTERPRET:
            yield pytest.param(op, backend, marks=[pytest.mark.interpreter] if INTERPRET else [])


@pytest.mark.parametrize(("op", "backend"), list(controls()))
def test_the_untouched_copy_is_green(op: str, backend: str, tmp_path: Path) -> None:
    cases = tuple(sorted({case for bug in BUGS if (bug.op, bug.backend) == (op, backend) for case in bug.cases}))
    ended = judge(copy_package(tmp_path), op, backend, cases)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
