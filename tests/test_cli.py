"""The command line: what it prints, its JSON, its exit codes."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from effkit.cli import app
from effkit.ops import OPS, load_ops

OP = "softmax_attention"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def wrong_op(monkeypatch):
    """An op whose torch backend is off by one per cent."""
    op = load_ops()["dynamic_tanh"]

    def front(*, backend, **arguments):
        return op.function(**arguments, backend="reference") * (1.01 if backend == "torch" else 1.0)

    monkeypatch.setitem(OPS, "wrong", dataclasses.replace(op, name="wrong", function=front, triton=None))
    return "wrong"


def test_help_does_not_wait_for_torch():
    code = "import sys; import effkit.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_runs_as_a_module():
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "effkit.cli", "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert all(command in done.stdout for command in ("list", "show", "verify", "bench", "demo"))
    assert "\x1b" not in done.stdout


def test_list_names_every_op_and_its_verification(run):
    before = json.loads(run("list", "--json", "-").stdout)
    assert [technique["op"] for technique in before["techniques"]] == list(load_ops())
    assert not any(finding for technique in before["techniques"] for finding in technique["verified"].values())
    assert "not run" in run("list").stdout


def test_list_remembers_what_verify_found(run, wrong_op):
    assert run("verify", wrong_op, "--case", "primes").exit_code == 1
    assert "failed" not in run("list").stdout  # one case is not a verification
    assert run("verify", wrong_op).exit_code == 1
    assert "NO, it failed" in run("list").stdout


def test_tables_fit_a_hundred_columns(run):
    for arguments in (("list",), ("show", OP), ("verify", OP, "--case", "primes")):
        assert max(map(len, run(*arguments).stdout.splitlines())) <= 100


def test_show_says_what_the_ledger_says(run):
    for name, op in load_ops().items():
        text = " ".join(run("show", name).stdout.split())
        assert op.paper in text
        assert " ".join(op.shapes.split()) in text
        assert all(case.name in text for case in (*op.cases, *op.bench))
        shown = json.loads(run("show", name, "--json", "-").stdout)
        assert shown["shapes"] == op.shapes
        assert shown["backend_here"]["cpu"]["backend"] == "torch"


def test_verify_writes_json_for_programs(run, tmp_path):
    arguments = ("verify", OP, "--backend", "torch", "--dtype", "fp32", "--case", "primes", "--json")
    on_stdout = json.loads(run(*arguments, "-").stdout)
    assert run(*arguments, str(tmp_path / "v.json")).exit_code == 0
    in_file = json.loads((tmp_path / "v.json").read_text())
    assert on_stdout["ok"] and on_stdout["results"] == in_file["results"]
    (result,) = in_file["results"]
    assert (result["op"], result["case"], result["dtype"], result["backend"]) == (OP, "primes", "fp32", "torch")
    assert {row["tensor"] for row in result["rows"]} == {"out", "d q", "d k", "d v"}


def test_verify_fails_loudly(run, wrong_op):
    assert "3 judged, 3 wrong" in run("verify", wrong_op, "--case", "primes").stdout
    result = run("verify", wrong_op, "--case", "primes", "--fail-fast")
    assert result.exit_code == 1
    assert "1 judged, 1 wrong" in result.stdout
    assert "worst at" in result.stdout


def test_an_implementation_that_raises_is_a_failure(run, wrong_op, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of\nshared memory")

    monkeypatch.setitem(OPS, wrong_op, dataclasses.replace(OPS[wrong_op], function=broken))
    result = run("verify", wrong_op, "--case", "primes", "--dtype", "fp32")
    assert result.exit_code == 1
    assert "raised RuntimeError: out of shared memory" in " ".join(result.stdout.split())
    written = run("verify", wrong_op, "--case", "primes", "--dtype", "fp32", "--json", "-").stdout
    assert "Infinity" not in written  # which is not JSON
    assert json.loads(written)["results"][0]["rows"][0]["error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "attention"), "no op named 'attention', choices: softmax_attention"),
        (("show", "attention"), "no op named 'attention', choices: softmax_attention"),
        (("bench", "attention"), "no op named 'attention', choices: softmax_attention"),
        (("verify", OP, "--case", "prime"), "--case is 'prime', choices: 'one'"),
        (("verify", OP, "--dtype", "float"), "--dtype is 'float', choices: 'fp32', 'fp16', 'bf16'"),
        (("verify", OP, "--device", "tpu"), "--device is 'tpu', choices: 'cpu', 'cuda'"),
        (("verify", OP, "--device", "cuda:99"), "--device is 'cuda:99', but torch sees"),
        (("verify", OP, "--backend", "cuda"), "backend 'cuda' cannot be judged on"),
        (
            ("verify", OP, "--json", "/no/such/folder/v.json"),
            "cannot write '/no/such/folder/v.json': there is no folder",
        ),
        (("bench", OP, "--case", "dense"), "--case is 'dense', choices: 'dense causal'"),
        (("bench", OP, "--rival", "flash"), "--rival is 'flash', choices: 'sdpa'"),
    ],
)
def test_usage_errors_are_one_line_with_the_choices(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"effkit: {message}") and result.stderr.count("\n") == 1
    assert not result.stdout


def test_bench_times_what_it_verified(run, tmp_path):
    arguments = ("bench", OP, "--quick", "--case", "grouped decode", "--rival", "sdpa", "--json")
    data = json.loads(run(*arguments, "-").stdout)
    assert {row["provider"] for row in data["rows"]} == {"effkit torch", "sdpa"}
    assert {row["case"] for row in data["rows"]} == {"grouped decode"}
    assert all("effkit triton" in line for line in data["skipped"])


def test_bench_refuses_to_time_what_is_wrong(run, wrong_op):
    result = run("bench", wrong_op, "--quick", "--json", "-")
    assert result.exit_code == 1
    assert "not timed, because it is wrong" in result.stderr
    assert not result.stdout
