"""Measures candidate tiles of the kernels on this GPU and proposes the entries of their tables.

    python benchmarks/tune.py --out tiles.json [--seconds 100] [OP ...]

Two passes. First every candidate is compiled, run and judged against the reference, in several processes, for the
compiler takes most of the time; what does not fit into the GPU or is wrong is out. Then those that are left are timed
in turns. The proposal is printed in the form of the tables in kernels/*.py, to be pasted there by somebody who looks;
tests/test_ahead_of_time.py then says whether a tile spills registers or is too large for an architecture.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effkit import bench
from effkit.ops import Case, get_op
from effkit.testing import judge, make_inputs

DTYPES = {2: torch.bfloat16, 4: torch.float32}

# (BLOCK_M, BLOCK_N, num_warps, num_stages) of a program that owns rows and sweeps keys; one that owns keys and sweeps
# rows takes them the other way around.
ROWS = {
    (64, 2): [(128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    (128, 2): [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)],
    (256, 2): [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 3), (64, 32, 4, 3)],
    (64, 4): [(32, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1), (32, 64, 4, 1), (64, 64, 8, 1)],
    (128, 4): [(32, 32, 8, 1), (32, 32, 4, 1), (64, 32, 8, 1), (32, 64, 8, 1), (16, 32, 4, 1)],
    (256, 4): [(16, 16, 8, 1), (16, 16, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)],
}
KEYS = {key: [(n, m, warps, stages) for m, n, warps, stages in tiles] for key, tiles in ROWS.items()}
DECODE = {
    key: [(64, 32, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2), (64, 128, 8, 3)]
    for key in ((64, 2), (128, 2), (256, 2))
}
# (BLOCK_N, BLOCK_C, num_warps)
CHANNELS = {
    key: [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (4, 1024, 8), (8, 1024, 8), (16, 1024, 8), (4, 512, 4)]
    for key in ((1024, 2), (1024, 4))
}
# (BLOCK_K, BLOCK_V, num_warps, num_stages)
_CHUNK_TILES = {
    2: [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 64, 8, 2),
        (32, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 128, 8, 2),
    ],
    4: [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1), (64, 64, 8, 1)],
}
CHUNKS = {(width, size): tiles for size, tiles in _CHUNK_TILES.items() for width in (64, 128, 256)}
# Gates of each channel: their decays take the registers of more columns of keys.
_CHANNEL_TILES = {
    2: [
        (16, 64, 4, 2),
        (32, 64, 4, 2),
        (32, 64, 8, 2),
        (32, 64, 8, 3),
        (32, 128, 8, 2),
        (64, 64, 8, 2),
        (64, 128, 8, 2),
    ],
    4: [(16, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1), (16, 16, 8, 1)],
}
GATED_CHUNKS = {(width, size): tiles for size, tiles in _CHANNEL_TILES.items() for width in (64, 128, 256)}

# (BLOCK_M, BLOCK_K, num_warps, num_stages) of a 4-bit weight; the first number of a key counts tokens.
FOUR_BIT = {
    key: [(64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 2), (64, 256, 8, 3), (128, 64, 8, 4)]
    for key in ((16, 2), (64, 2))
}
# (BLOCK_T, BLOCK_C, num_warps, num_stages) of a product with a thin side; the first number of a key is the rank.
THIN = {
    key: [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3), (128, 128, 8, 3)]
    for key in ((16, 2), (64, 2))
}
THIN_BOTH = {(16, 2): [(128, 64, 4, 3), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4), (256, 128, 8, 2)]}
# (BLOCK_N, BLOCK_C, num_warps, num_stages) of adapters by row; the first number of a key is the rank up to which.
FEW_ROWS = {(64, 2): [(16, 64, 4, 4), (16, 128, 4, 3), (16, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 3)]}
MANY_ROWS = {(64, 2): [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)]}

# key is (architecture, width, bytes of an element), tile the values of the kernel module's Tile.
Key = tuple[int, int, int]


@dataclass(frozen=True)
class Table:
    """A table of tiles, and the inputs on which its kernel is judged and timed."""

    path: str
    op: str
    backward: bool
    tiles: Mapping[tuple[int, int], Sequence[tuple[int, ...]]]
    judged: Callable[[int], Case]
    timed: Callable[[int, int], Case]

    @property
    def module(self) -> Any:
        return importlib.import_module(self.path.partition(":")[0])

    @property
    def entries(self) -> dict[Key, Any]:
        return getattr(self.module, self.path.partition(":")[2])


@dataclass(frozen=True)
class Trial:
    """One candidate for one entry of a table."""

    table: Table
    key: Key
    tile: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.table.path} {self.key} {self.tile}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.key[2]]

    def install(self) -> None:
        """Puts the tile into the table, where the kernel's next launch finds it."""
        self.table.entries[self.key] = self.table.module.Tile(*self.tile)


def _attention(b: int, heads: tuple[int, int], lengths: tuple[int, int], width: int) -> Case:
    sizes = dict(B=b, Hq=heads[0], Hkv=heads[1], T=lengths[0], S=lengths[1], D=width, Dv=width)
    return Case(f"tune {b} {heads} {lengths} {width}", sizes, dict(causal=True))


def _norm(rows: int) -> Case:
    return Case(f"tune {rows}", {"*N": (rows,), "C": 4096}, given=("weight", "bias"))


def _recurrent(b: int, heads: int, length: int, width: int) -> Case:
    levels = (length - 1).bit_length() + 1
    sizes = dict(B=b, Hq=heads, Hk=heads, Hv=heads, H=heads, T=length, K=width, V=width, R=b, N=0, L=levels)
    return Case(f"tune {b} {heads} {length} {width}", sizes)


def _scan(width: int, size: int) -> Case:
    """About the same work for each width."""
    return _recurrent(4, 1024 // width, 4096 if size == 2 else 1024, width)


def _prefill(width: int, size: int) -> Case:
    """About the same work for each width; float32 has no tensor cores and gets less."""
    return _attention(2, (2048 // width, 2048 // width), (4096, 4096) if size == 2 else (1024, 1024), width)


def _four_bit(tokens: int, width: int) -> Case:
    sizes = {"*N": (tokens,), "K": width, "M": width, "P": width // 2, "G": width // 64, "S": 1}
    return Case(f"tune {tokens} {width}", sizes)


def _low_rank(tokens: int, width: int, rank: int) -> Case:
    sizes = {"*N": (tokens,), "K": width, "M": width, "R": rank}
    return Case(f"tune {tokens} {width} {rank}", sizes, dict(dropout=0.1), given=("weight", "seed"))


def _by_row(rows: int, tokens: int, width: int) -> Case:
    sizes = dict(B=rows, T=tokens, K=width, M=width, R=16, E=4)
    return Case(f"tune {rows} {tokens} {width}", sizes, ints={"rows": tuple(i % 4 for i in range(rows))})


_small = functools.partial(_attention, 1, (4, 2), (300, 333))
_decode = functools.partial(_attention, 2, (8, 2), (1, 3000))
_short_low_rank = functools.partial(_low_rank, 300, 448)
_short_scan = functools.partial(_recurrent, 1, 2, 300)
TABLES = (
    Table("effkit.kernels.softmax_attention:_FWD", "softmax_attention", False, ROWS, _small, _prefill),
    Table("effkit.kernels.softmax_backward:DQ", "softmax_attention", True, ROWS, _small, _prefill),
    Table("effkit.kernels.softmax_backward:DKV", "softmax_attention", True, KEYS, _small, _prefill),
    Table(
        "effkit.kernels.softmax_decode:DECODE",
        "softmax_attention",
        False,
        DECODE,
        _decode,
        lambda width, size: _attention(16, (32, 8), (1, 8192), width),
    ),
    Table("effkit.kernels.chunk_scan:MEMORIES", "ssd", False, CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.chunk_scan:OUTPUT", "ssd", False, CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.chunk_scan:GRADIENTS", "ssd", True, CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.chunk_gla:MEMORIES", "gated_linear_attention", False, CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.chunk_gla:OUTPUT", "gated_linear_attention", False, GATED_CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.chunk_gla:GRADIENTS", "gated_linear_attention", True, GATED_CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.log_linear:BLOCKS", "log_linear_attention", False, CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.log_linear:OUTPUT", "log_linear_attention", True, CHUNKS, _short_scan, _scan),
    Table("effkit.kernels.log_linear:GRADIENTS", "log_linear_attention", True, CHUNKS, _short_scan, _scan),
    Table(
        "effkit.kernels.linear_4bit:TILES",
        "linear_4bit",
        False,
        FOUR_BIT,
        lambda tokens: _four_bit(tokens, 448),
        lambda tokens, size: _four_bit(tokens, 4096),
    ),
    *(
        Table(
            f"effkit.kernels.low_rank:{name}",
            "lora_linear",
            name.endswith("BWD") or name == "MASKED",
            tiles,
            _short_low_rank,
            lambda rank, size: _low_rank(4096, 4096, rank),
        )
        for name, tiles in (("DOWN", THIN), ("UP_BWD", THIN_BOTH), ("DOWN_BWD", THIN), ("MASKED", THIN))
    ),
    *(
        Table(
            f"effkit.kernels.grouped_lora:{name}",
            "grouped_lora",
            name == "MANY",
            tiles,
            lambda rank, tokens=tokens: _by_row(5, tokens, 448),
            lambda rank, size, tokens=tokens, rows=rows: _by_row(rows, tokens, 4096),
        )
        for name, tiles, rows, tokens in (("FEW", FEW_ROWS, 64, 1), ("MANY", MANY_ROWS, 16, 512))
    ),
    Table(
        "effkit.kernels.dyt:_FWD",
        "dynamic_tanh",
        False,
        CHANNELS,
        lambda width: _norm(77),
        lambda width, size: _norm(8192),
    ),
    Table(
        "effkit.kernels.dyt:_BWD",
        "dynamic_tanh",
        True,
        CHANNELS,
        lambda width: _norm(77),
        lambda width, size: _norm(8192),
    ),
)


def trials(arch: int, ops: Sequence[str] = ()) -> list[Trial]:
    """All candidates for the kernels of these ops (default: all), the present entries among them.

    Half precision first, then the widths that models have.
    """
    found = []
    for table in TABLES:
        if ops and table.op not in ops:
            continue
        for (width, size), tiles in table.tiles.items():
            key = (arch, width, size)
            present = [tuple(table.entries[key])] if key in table.entries else []
            found += [Trial(table, key, tile) for tile in dict.fromkeys([*present, *tiles])]
    return sorted(found, key=lambda trial: (trial.key[2], trial.key[1] == 256, trial.key[1] == 64))


def judged(trial: Trial, device: torch.device) -> str:
    """ "ok", or why the tile is out."""
    op = get_op(trial.table.op)
    case = trial.table.judged(trial.key[1])
    inputs = make_inputs(op, case, trial.dtype, device)
    grads = tuple(name for name in op.grads if name in inputs) if trial.table.backward else ()
    trial.install()
    try:
        rows = judge(
            functools.partial(op.function, **case.options, backend="triton"),
            functools.partial(op.function, **case.options, backend="reference"),
            inputs,
            grads,
        )
    except Exception as error:  # whatever the compiler or the launch says of a tile: it is out, and the reason is kept
        torch.cuda.synchronize(device)  # raises where the GPU is lost to this process: no later verdict would be true
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    wrong = [f"{row.tensor}: {row.detail}" for row in rows if not row.ok]
    return f"wrong: {wrong[0]}" if wrong else "ok"


def judge_all(deadline: float, ops: Sequence[str]) -> dict[str, str]:
    """The verdict of each trial by its name, from many processes at once; those out of time are missing."""
    workers = max(1, min(12, (os.cpu_count() or 4) - 2))
    verdicts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jsonl" for i in range(workers)]
        command = (sys.executable, __file__, "--judge")
        shares = [(*command, f"{i}/{workers}", "--out", str(path), *ops) for i, path in enumerate(paths)]
        processes = [subprocess.Popen(share) for share in shares]
        for process in processes:
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for path in paths:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            verdicts |= dict(json.loads(line) for line in lines if line.endswith("]"))
    return verdicts


def judge_share(share: str, every: list[Trial], out: Path, device: torch.device) -> None:
    """One process of judge_all: every n-th trial, each verdict written as it comes."""
    first, _, step = share.partition("/")
    with out.open("w", encoding="utf-8") as file:
        for trial in every[int(first) :: int(step)]:
            file.write(json.dumps([trial.name, judged(trial, device)]) + "\n")
            file.flush()


def time_group(group: list[Trial], device: torch.device) -> list[float]:
    """Median milliseconds of the candidates for one entry, timed in turns."""
    table, key = group[0].table, group[0].key
    op, case = get_op(table.op), table.timed(key[1], key[2])
    inputs = make_inputs(op, case, group[0].dtype, device)

    def forward() -> Any:
        return op.function(**inputs, **case.options, backend="triton")

    if table.backward:
        grads = [name for name in op.grads if name in inputs and name not in op.frozen]
        leaves = [inputs[name].requires_grad_() for name in grads]
        group[0].install()
        out = forward()
        cotangent = torch.randn_like(out)

    def run(trial: Trial) -> Any:
        trial.install()
        return torch.autograd.grad(out, leaves, cotangent, retain_graph=True) if table.backward else forward()

    calls = [functools.partial(run, trial) for trial in group]
    return [sorted(times)[len(times) // 2] for times in bench.interleave(calls, device, 0.05)]


def grouped(some: Iterable[Trial]) -> list[list[Trial]]:
    """Trials by entry."""
    groups: dict[tuple[str, Key], list[Trial]] = {}
    for trial in some:
        groups.setdefault((trial.table.path, trial.key), []).append(trial)
    return list(groups.values())


def fastest(measured: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each table the quickest measurement of each entry."""
    best: dict[tuple[str, Key], dict[str, Any]] = {}
    for entry in sorted(measured, key=lambda entry: entry["ms"], reverse=True):
        best[entry["table"], entry["key"]] = entry
    tables: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(best):
        tables.setdefault(best[key]["table"], []).append(best[key])
    return tables


def tune(out: Path, seconds: float, device: torch.device, arch: int, ops: Sequence[str]) -> None:
    """Judges, times, writes after each entry, and prints the proposal."""
    start = time.monotonic()
    present = {table.path: dict(table.entries) for table in TABLES}
    every = trials(arch, ops)
    verdicts = judge_all(start + 0.6 * seconds, ops)
    measured: list[dict[str, Any]] = []
    for group in grouped(trial for trial in every if verdicts.get(trial.name) == "ok"):
        if time.monotonic() > start + seconds:
            break
        times = time_group(group, device)
        group[times.index(min(times))].install()  # the kernels beside it are timed with the best
        for trial, ms in zip(group, times, strict=True):
            now = tuple(present[trial.table.path].get(trial.key, ())) == trial.tile
            measured.append(dict(table=trial.table.path, key=trial.key, tile=trial.tile, ms=ms, present=now))
        best = fastest(measured)
        result = {**bench.environment(device), "proposal": best, "measured": measured, "judged": verdicts}
        out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{len(verdicts)} of {len(every)} candidates judged, {len(measured)} timed")
    for path, entries in fastest(measured).items():
        print(path)
        for entry in entries:
            same = [other for other in measured if (other["table"], other["key"]) == (path, entry["key"])]
            before = "".join(f", present {other['ms']:.3f} ms" for other in same if other["present"])
            print(f"    {entry['key']}: Tile{entry['tile']},  # {entry['ms']:.3f} ms{before}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all measurements")
    parser.add_argument("ops", nargs="*", metavar="OP", help="tables of the kernels of these ops (default: all)")
    parser.add_argument("--seconds", type=float, default=300, help="after which no further entry is begun")
    parser.add_argument("--judge", metavar="I/N", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune.py measures a GPU, and torch sees none here", file=sys.stderr)
        return 2
    from effkit.kernels._common import architecture

    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    if arguments.judge:
        judge_share(arguments.judge, trials(arch, arguments.ops), arguments.out, device)
    else:
        tune(arguments.out, arguments.seconds, device, arch, arguments.ops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
