"""The demo runs as a user runs it, says the same on screen and in JSON, and its rows do not touch each other."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from effkit import zoo
from effkit.cli import app, output

demo = importlib.import_module("effkit.cli.demo")


def run(*arguments: str):
    return CliRunner().invoke(app, ["demo", "--quick", *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One quick run of all rows: the result, and its JSON."""
    file = tmp_path_factory.mktemp("demo") / "rows.json"
    result = run("--json", str(file))
    assert result.exit_code == 0, result.output
    return result, json.loads(file.read_text())


def lines_of(data) -> dict[tuple[str, bool], dict]:
    return {(line["technique"], line["heal_steps"] > 0): line for line in data["rows"]}


def test_every_technique_has_its_lines(whole):
    _, data = whole
    expected = {(row.name, healed) for row in demo.ROWS for healed in ((False, True) if row.heals else (False,))}
    assert set(lines_of(data)) == expected and len(data["rows"]) == len(expected)


def test_screen_shows_every_line_within_100_columns_and_nothing_else(whole):
    result, data = whole
    assert result.stderr == "" and "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    for line in data["rows"]:
        assert f"{line['bits_per_byte']:.3f}" in result.stdout
        assert f"|{demo._printable(line['sample'])[: demo.SAMPLE_BYTES]}" in result.stdout
    assert "effkit verify" in result.stdout and "docs/demo.md" in result.stdout


def test_numbers_are_those_of_the_zoo(whole):
    _, data = whole
    baseline = data["rows"][0]
    model = zoo.load_model()
    assert baseline["bits_per_byte"] == zoo.bits_per_byte(model, zoo.heldout_batches(demo.QUICK.windows))
    assert baseline["parameters"] == sum(p.numel() for p in model.parameters())
    assert baseline["largest_logit_difference"] == 0
    assert all(len(zoo.load_tokenizer()(line["sample"]).input_ids) > 0 for line in data["rows"])
    assert all(line["prefill_tokens_per_second"] > 0 < line["decode_tokens_per_second"] for line in data["rows"])


def test_techniques_do_what_they_say(whole):
    lines = lines_of(whole[1])
    baseline, exact = lines["baseline (torch SDPA)", False], lines["exact attention", False]
    assert exact["sample"] == baseline["sample"] and exact["parameters"] == baseline["parameters"]
    for heads in (4, 1):
        grouped = lines[f"GQA, 8 -> {heads} kv heads", False]
        assert grouped["cache_bytes_per_token"] * 8 == baseline["cache_bytes_per_token"] * heads
        assert grouped["parameters"] < baseline["parameters"]
        assert grouped["bits_per_byte"] > baseline["bits_per_byte"]
    for everywhere, hybrid in (
        ("linear attention", "linear in 3 layers"),
        ("log-linear attention", "log-linear, 3 layers"),
    ):
        order = [lines[name, False] for name in (everywhere, hybrid, "baseline (torch SDPA)")]
        sizes, caches, bits = (
            [line[key] for line in order] for key in ("parameters", "cache_bytes_per_token", "bits_per_byte")
        )
        assert sizes[0] > sizes[1] > sizes[2] and caches[0] < caches[1] < caches[2] and bits[0] > bits[1] > bits[2]


def test_quantised_weights_take_less_and_lose_little(whole):
    """The order of the formats is a matter of more windows: tests/quant/test_quality.py."""
    lines = lines_of(whole[1])
    baseline = lines["baseline (torch SDPA)", False]
    rows = [lines[name, False] for name in ("FP8 weights", "NF4 weights", "NF4, double quantised")]
    assert all(row["parameters"] == baseline["parameters"] == 4_492_800 for row in rows)
    dense = baseline["bytes"] - 4 * 4_423_680  # what is left of embeddings and norms
    packed = [8 * (row["bytes"] - dense) / 4_423_680 for row in rows]
    assert 8 < packed[0] < 8.01 and packed[1] == 4.5 and 4.126 < packed[2] < 4.13
    assert all(row["bits_per_byte"] < 1.05 * baseline["bits_per_byte"] for row in rows)
    assert all(row["largest_logit_difference"] > 0 for row in rows)


def test_adapters_learn_a_kind_of_text(whole):
    """Two steps are enough to see that they do; the formulas of what they train."""
    result, data = whole
    lora, singlora, vera = data["adapters"]
    layers = 6 * [(256, 256), (256, 128), (256, 128), (256, 256), (256, 704), (256, 704), (704, 256)]
    assert lora["trainable"] == 8 * sum(inputs + outputs for inputs, outputs in layers)
    assert singlora["trainable"] == 8 * sum(map(max, layers))
    assert vera["trainable"] == sum(64 + outputs for _, outputs in layers)
    before = zoo.bits_per_byte(zoo.load_model(), zoo.heldout_batches(4, kind="tree"))
    for line in (lora, singlora, vera):
        assert line["bits_per_byte_before"] == before > line["bits_per_byte"]
        assert f"{line['bits_per_byte']:.3f}" in result.stdout and line["adapter"] in result.stdout


def test_rows_start_from_a_fresh_model_and_json_alone_goes_to_stdout(whole, monkeypatch):
    baseline, grouped = demo.ROWS[0], next(row for row in demo.ROWS if row.heals)
    monkeypatch.setattr(demo, "ROWS", (grouped, baseline))
    bars = []
    monkeypatch.setattr(output, "progress", lambda make=output.progress: bars.append(make()) or bars[-1])
    result = run("--json", "-")
    assert result.exit_code == 0 and result.stderr == ""
    data = json.loads(result.stdout)
    for (name, healed), line in lines_of(data).items():
        before = lines_of(whole[1])[name, healed]
        assert {key: line[key] for key in line if "second" not in key} == {
            key: before[key] for key in before if "second" not in key
        }
    assert data["adapters"] == whole[1]["adapters"]
    (task,) = bars[0].tasks
    assert task.completed == task.total


def test_missing_folder_is_said_before_the_work(tmp_path):
    """In a process of its own, where nothing has imported effkit.cli.demo before the command does."""
    command = [sys.executable, "-m", "effkit.cli", "demo", "--json", "no/such/folder/rows.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert "'no/such/folder/rows.json'" in result.stderr and result.stderr.count("\n") == 1


def test_table_fits_80_columns():
    longest = max((row.name for row in demo.ROWS), key=len)
    line = demo.Measured(
        longest, 0, 12.3456, 4_492_800, 17_971_200, 6144.0, 123_456.0, 1234.0, 12.3456, "\n" + "x" * 200
    )
    healed = dataclasses.replace(line, heal_steps=100)
    file = io.StringIO()
    demo._print_rows(Console(file=file, width=80, markup=False, highlight=False), [line, healed], 100.0)
    shown = file.getvalue().splitlines()
    assert max(map(len, shown)) <= 80
    table = [text for text in shown if re.search(r" 17\.97 ", text)]
    assert len(table) == 2 and all(f"{longest} " in text or "healed, 100 steps" in text for text in table)
    assert all(text.endswith("12") for text in table)
    adapted = demo.Adapted(
        max((row.name for row in demo.ADAPTERS), key=len), 4_492_800, 123_456_789, 12.3456, 1.0, 1e-5
    )
    file = io.StringIO()
    demo._print_adapters(Console(file=file, width=80, markup=False, highlight=False), [adapted], demo.FULL)
    shown = file.getvalue().splitlines()
    assert max(map(len, shown)) <= 80 and shown[-1].endswith("1e-05")


def test_control_characters_are_shown_escaped():
    assert demo._printable("a\n\t\x00é\\") == "a\\n\\t\\x00é\\"
