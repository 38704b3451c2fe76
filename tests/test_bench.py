"""Benchmarks: rows say what was measured, rivals compute the same thing, tables are made from committed rows."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effkit import bench
from effkit.ops import Case, load_ops, resolve
from effkit.rivals import Rival
from effkit.testing import assert_equivalent, make_inputs

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = Case("small", dict(B=1, Hq=4, Hkv=2, T=33, S=33, D=16, Dv=16), dict(causal=True))


def _script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


report = _script("report")


@pytest.fixture(scope="module")
def attention():
    return load_ops()["softmax_attention"]


@pytest.fixture(scope="module")
def rows(attention):
    return bench.run(attention, SMALL, device=CPU, dtype=torch.float32, rivals=["sdpa"], seconds=0.01).rows


def test_a_row_is_enough_to_repeat_it(rows):
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, provider) for mode in bench.MODES for provider in ("effkit torch", "sdpa")
    ]
    for row in json.loads(json.dumps(rows)):
        assert row["sizes"] == SMALL.sizes and row["options"] == SMALL.options
        assert row["dtype"] == "float32" and row["rounds"] >= 5
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["torch"] == torch.__version__.partition("+")[0] and row["threads"] == torch.get_num_threads()
        assert row["judged"]["agrees"] and row["peak_bytes"] is None and row["power_limit_w"] is None
        assert "to_effkit" not in row


def test_a_row_names_the_commit(rows):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(rows[0]["commit"]) == len(head.strip()) and isinstance(rows[0]["dirty"], bool)


def test_rates_are_the_ledgers_counts_over_the_median(attention, rows):
    forward, both = rows[0], rows[2]
    assert forward["flops"] == attention.flops(SMALL) and forward["bytes"] == 4 * attention.traffic(SMALL)
    assert both["flops"] == 3 * forward["flops"] and both["bytes"] == 2.5 * forward["bytes"]
    for row in rows:
        assert row["gb_per_s"] == row["bytes"] / row["median_ms"] / 1e6
        least = max(row["bytes"] / row["copy_gb_per_s"] / 1e6, row["flops"] / row["matrix_tflop_per_s"] / 1e9)
        assert row["share_of_ceiling"] == least / row["median_ms"]


def test_what_is_wrong_is_not_timed(attention):
    def front(*, backend, **arguments):
        return attention.function(**arguments, backend="reference") * (1.01 if backend == "torch" else 1.0)

    wrong = dataclasses.replace(attention, function=front, triton=None)
    with pytest.raises(bench.NotVerified, match="not timed, because it is wrong"):
        bench.run(wrong, SMALL, device=CPU, dtype=torch.float32, rivals=[], seconds=0.01)


def test_a_rival_that_breaks_is_left_out_with_the_reason(attention, monkeypatch):
    def broken(**_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("effkit.bench.resolve", lambda path: Rival(broken, lambda **_: None))
    found = bench.run(attention, SMALL, device=CPU, dtype=torch.float32, rivals=["sdpa"], seconds=0.01)
    assert found.skipped["sdpa"] == "raised RuntimeError: no kernel image"
    assert {row["provider"] for row in found.rows} == {"effkit torch"}


def test_the_kernel_is_not_timed_without_a_gpu(attention):
    providers, skipped = bench.line_up(attention, SMALL, make_inputs(attention, SMALL, torch.float32))
    assert "effkit triton" not in [provider.name for provider in providers]
    assert "CUDA" in skipped["effkit triton"] and skipped["flex"] == "for CUDA only"


def test_everybody_takes_turns():
    order = []
    times = bench.interleave([lambda i=i: order.append(i) for i in range(3)], CPU, 0.0)
    assert [len(each) for each in times] == [5, 5, 5]
    changes = [i for i, _ in itertools.groupby(order)][3:]  # behind the calls that set the clocks
    assert changes == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0]


def test_the_judged_case_keeps_the_widths():
    op = load_ops()["dynamic_tanh"]
    case = Case("wide", {"*N": (4096, 3), "C": 4096}, large=True)
    assert bench.shortened(op, case, 512).sizes == {"*N": (512, 3), "C": 4096}
    attention = load_ops()["softmax_attention"]
    sizes = dict(B=1, Hq=8, Hkv=8, T=1, S=32768, D=128, Dv=64)
    assert bench.shortened(attention, Case("long", sizes), 512).sizes == {**sizes, "S": 512}
    ssd = load_ops()["ssd"]  # its gates end in the length, which is no width
    assert bench.shortened(ssd, ssd.bench[-1], 512).sizes == {**ssd.bench[-1].sizes, "T": 512}


@pytest.mark.parametrize("name", ["sdpa", "transformers eager"])
@pytest.mark.parametrize(
    ("heads", "lengths", "options"),
    [
        ((2, 2), (33, 33), dict(causal=True)),
        ((4, 2), (33, 33), dict(causal=True, window=5)),
        ((4, 1), (1, 40), dict(causal=True)),
        ((4, 2), (7, 40), dict(causal=True, scale=0.3)),
        ((2, 2), (9, 20), {}),
    ],
)
def test_rivals_of_attention_compute_the_same(attention, name, heads, lengths, options):
    case = Case("rival", dict(B=2, Hq=heads[0], Hkv=heads[1], T=lengths[0], S=lengths[1], D=16, Dv=16), options)
    inputs = make_inputs(attention, case, torch.float32)
    rival = resolve(attention.rivals[name])
    assert rival.cannot(**inputs, **options) is None
    assert_equivalent(
        lambda **tensors: rival(**tensors, **options),
        lambda **tensors: attention.function(**tensors, **options, backend="reference"),
        inputs,
    )


def test_rivals_say_what_they_cannot(attention):
    inputs = make_inputs(attention, SMALL, torch.float32)
    for name in ("sdpa", "transformers eager"):
        assert "softcap" in resolve(attention.rivals[name]).cannot(**inputs, causal=True, softcap=3.0)
    long = torch.empty(1, 64, 16384, 1)
    assert "64.0 GiB" in resolve(attention.rivals["transformers eager"]).cannot(q=long, k=long, v=long)


@pytest.mark.parametrize(
    ("name", "rival"),
    [("ssd", "transformers"), ("gated_delta_rule", "transformers"), ("log_linear_attention", "quadratic")],
)
def test_rivals_of_recurrent_ops_compute_the_same(name, rival):
    op = load_ops()[name]
    case = dataclasses.replace(op.case("primes"), options={}, given=())
    inputs = make_inputs(op, case, torch.float32)
    rival = resolve(op.rivals[rival])
    assert rival.cannot(**inputs) is None
    assert_equivalent(
        rival, lambda **tensors: op.function(**tensors, backend="reference"), inputs, grads=("q", "k", "v")
    )
    assert "initial_state" in rival.cannot(**inputs, initial_state=torch.zeros(()))
    assert resolve(op.rivals["fla"]).cannot(**inputs) in ("for CUDA only", "flash-linear-attention is not installed")


def test_dense_attention_stands_beside_recurrent_ops_as_another_function():
    op = load_ops()["ssd"]
    case = dataclasses.replace(op.case("primes"), options={}, given=())
    found = bench.run(op, case, device=CPU, dtype=torch.float32, rivals=["dense sdpa"], seconds=0.01)
    agrees = {(row["provider"], row["mode"]): row["judged"]["agrees"] for row in found.rows}
    assert agrees["dense sdpa", "forward+backward"] is False and agrees["effkit torch", "forward"] is True


@pytest.mark.parametrize("given", [(), ("weight",), ("weight", "bias")])
def test_the_eager_rival_of_dynamic_tanh_computes_the_same(given):
    op = load_ops()["dynamic_tanh"]
    inputs = make_inputs(op, Case("rival", {"*N": (5, 3), "C": 17}, given=given), torch.float32)
    assert_equivalent(resolve(op.rivals["eager"]), lambda **kw: op.function(**kw, backend="reference"), inputs)


def test_every_rival_of_the_ledger_exists():
    for op in load_ops().values():
        for path in op.rivals.values():
            assert isinstance(resolve(path), Rival)


def _row(provider, ms, timestamp="2026-01-01T00:00:00+00:00", **more):
    about = dict(device="d", op="o", case="c", dtype="float32", mode="forward")
    return {**about, "provider": provider, "median_ms": ms, "timestamp": timestamp, **more}


def test_ratios_are_to_what_effkit_takes_in_the_same_measurement():
    first = [_row("effkit torch", 8.0), _row("effkit triton", 2.0), _row("sdpa", 3.0)]
    second = [_row("effkit torch", 5.0, "2026-01-02T00:00:00+00:00"), _row("sdpa", 10.0, "2026-01-02T00:00:00+00:00")]
    assert [row["to_effkit"] for row in bench.compared(first + second)] == [4.0, None, 1.5, None, 2.0]


@pytest.mark.parametrize(
    ("number", "text"), [(1234.56, "1230"), (12.345, "12.3"), (0.12345, "0.123"), (0.00012345, "0.00012")]
)
def test_numbers_are_printed_without_powers_of_ten(number, text):
    assert bench.short(number) == text


def test_plot_draws_a_file(rows, tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot(bench.compared(rows), tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_rows(path):
    text = path.read_text(encoding="utf-8")
    assert text == report.replaced(text, report.PAGES[path](), path.name), "run python benchmarks/report.py"


def test_committed_rows_are_whole_and_in_their_file():
    for path in report.RESULTS.glob("*.jsonl"):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            assert bench.results_path(row) == path
            assert row["op"] in load_ops() and row["median_ms"] > 0 and row["commit"]
            assert row["judged"]["agrees"] or not row["provider"].startswith("effkit ")


def test_saved_rows_come_back(rows, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    bench.append(rows[:2])
    bench.append(rows[2:])
    (found,) = report.load(tmp_path / "benchmarks" / "results").values()
    assert found == bench.compared(rows)


def test_tables_take_the_newest_row_of_each_provider(rows, tmp_path):
    older = [{**row, "timestamp": "2020-01-01T00:00:00+00:00", "median_ms": 1e6} for row in rows]
    flex = [{**row, "timestamp": "2021-01-01T00:00:00+00:00", "median_ms": 2.0} for row in rows[:2]]
    flex[1] |= {"provider": "flex", "median_ms": 14.0}
    (tmp_path / "machine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *older, *flex]))
    found = report.load(tmp_path)
    assert {row["provider"]: row["to_effkit"] for row in found["machine"]}["flex"] == 7
    for row in rows:
        assert any(row.items() <= newest.items() for newest in found["machine"])
    for text in (report.render_short(found), report.render_full(found)):
        assert bench.short(rows[0]["median_ms"]) in text and "7.00x" in text and "1000000" not in text


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ({}, "-"),
        ({1024: 0.5, 2048: 0.9, 4096: 1.5}, "faster from T=4096 on, 1.50x at T=4096"),
        ({1024: 1.2, 2048: 0.9, 4096: 1.5}, "faster from T=4096 on, 1.50x at T=4096"),
        ({1024: 1.2, 2048: 2.0}, "faster from T=1024 on, 2.00x at T=2048"),
        ({1024: 0.2, 2048: 0.4}, "slower up to T=2048, 0.40x there"),
    ],
)
def test_the_crossing_with_dense_attention_is_found(ratios, text):
    assert report.crossing(ratios) == text


def test_growth_is_told_for_ops_measured_at_several_lengths(rows, tmp_path):
    ms = {"T=1024": (1.0, 0.5), "T=2048": (2.5, 2.0), "T=4096": (5.0, 9.0)}
    own = [{**rows[0], "case": case, "provider": "effkit torch", "median_ms": t} for case, (t, _) in ms.items()]
    dense = [{**row, "provider": report.DENSE, "median_ms": t} for row, (_, t) in zip(own, ms.values(), strict=True)]
    turns = [{**row, "among": "lengths", "median_ms": t} for row, t in zip(own, (1.0, 2.1, 4.2), strict=True)]
    (tmp_path / "machine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own + dense + turns))
    text = report.render_full(report.load(tmp_path))
    assert "| 1024 to 4096 | 2.10x, 2.00x | faster from T=4096 on, 1.80x at T=4096 |" in text


def test_lengths_are_timed_in_turns():
    op = load_ops()["ssd"]
    short = [
        dataclasses.replace(case, sizes={**case.sizes, "T": T}) for case, T in zip(op.bench, (8, 16), strict=False)
    ]
    rows = bench.run_lengths(op, short, device=CPU, dtype=torch.float32, seconds=0.01)
    assert [row["case"] for row in rows] == ["T=1024", "T=2048"] * 2
    assert {row["mode"] for row in rows} == set(bench.MODES)
    assert all(
        row["provider"] == "effkit torch" and row["among"] == "lengths" and row["judged"]["agrees"] for row in rows
    )
    assert bench.at_lengths(op, op.bench[:3]) == list(op.bench[:3])
    assert not bench.at_lengths(op, op.bench[:1]) and not bench.at_lengths(load_ops()["dynamic_tanh"], op.bench)


def test_a_page_without_markers_is_an_error():
    with pytest.raises(ValueError, match=r"page\.md has no markers"):
        report.replaced("text", "tables", "page.md")


def test_candidates_fit_the_tables_of_the_kernels():
    tune = _script("tune")
    for trial in tune.trials(90):
        assert isinstance(trial.table.entries, dict)
        assert tuple(trial.table.module.Tile(*trial.tile)) == trial.tile
        op = load_ops()[trial.table.op]
        for case in (trial.table.judged(trial.key[1]), trial.table.timed(trial.key[1], trial.key[2])):
            op.signature.shape_of(next(shape.name for shape in op.signature.inputs), case.sizes)
    table, key = "m:T", (90, 128, 2)
    measured = [dict(table=table, key=key, tile=(n,), ms=ms) for n, ms in ((1, 3.0), (2, 1.0), (3, 2.0))]
    assert tune.fastest(measured) == {table: [measured[1]]}


def test_the_processes_of_a_gpu_run_judge_every_case_once():
    run = _script("run")
    small, large = run.shares(12)
    dealt = [(share[0], name) for share in small + large for name in share[2::2]]
    assert sorted(dealt) == sorted((op.name, case.name) for op in load_ops().values() for case in op.cases)
    assert 6 <= len(small) <= 18 + len(load_ops())
    assert {share[0] for part in run.shares(12, ["dynamic_tanh"]) for share in part} <= {"dynamic_tanh"}
