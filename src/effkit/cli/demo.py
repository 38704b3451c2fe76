"""effkit demo: each technique on a small trained language model and real text, one line each, in under three minutes.

A technique gets its line from an entry of ROWS. Every row starts from a fresh copy of the model; a row with heal_steps
is shown twice, as it comes out of the change and after that many training steps.
"""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import effkit
from effkit import zoo
from effkit.attention import GQAConfig, SoftmaxAttentionConfig
from effkit.change import ChangeConfig
from effkit.cli import output
from effkit.cli.arguments import find_device

PROMPT = "def read_lines(path):\n"
SAMPLE_BYTES = 60


@dataclass(frozen=True)
class Row:
    """One technique: prepare takes a fresh copy of the model and returns the changed one, which heal_steps may train."""

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    heal_steps: int = 0


@dataclass(frozen=True)
class Effort:
    """How much is computed: held-out windows per measurement, windows per training step, most steps of a healing."""

    windows: int
    heal_rows: int
    most_steps: int


@dataclass(frozen=True)
class Measured:
    """One line of the table. Speeds are of this machine and this run; everything else repeats."""

    technique: str
    heal_steps: int
    bits_per_byte: float
    parameters: int
    cache_bytes_per_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    largest_logit_difference: float
    sample: str


def changed_by(*configs: ChangeConfig) -> Callable[[nn.Module], nn.Module]:
    """The prepare function of techniques that `effkit.apply` puts into a model."""

    def prepare(model: nn.Module) -> nn.Module:
        effkit.apply(model, *configs)
        return model

    return prepare


ROWS = (
    Row("baseline (torch SDPA)", lambda model: model),
    Row("exact attention", changed_by(SoftmaxAttentionConfig())),
    Row("window of 128 tokens", changed_by(SoftmaxAttentionConfig(window=128))),
    Row("window of 32 tokens", changed_by(SoftmaxAttentionConfig(window=32))),
    Row("GQA, 8 -> 4 kv heads", changed_by(GQAConfig(num_kv_heads=4)), heal_steps=40),
    Row("GQA, 8 -> 1 kv heads", changed_by(GQAConfig(num_kv_heads=1)), heal_steps=40),
)
FULL = Effort(windows=48, heal_rows=4, most_steps=1000)
QUICK = Effort(windows=4, heal_rows=2, most_steps=2)


def run(json: str | None = None, quick: bool = False, device: str | None = None) -> None:
    """Runs the demo and prints its table; json names a file for the same numbers, "-" is standard output alone.

    quick measures a few windows and heals for two steps: enough to see that everything works, not to compare.
    device: default CUDA where there is one, else the CPU.
    """
    if json not in (None, "-") and not Path(str(json)).parent.is_dir():
        output.fail(f"--json is {json!r}, but {str(Path(str(json)).parent)!r} is no folder")
    start = time.perf_counter()
    bench = _Bench(QUICK if quick else FULL, find_device(device))
    console = output.console(json)
    console.print(_introduction(bench.effort), end="\n\n")
    with _quiet_transformers(), output.progress() as progress:
        measured = list(bench.measure_all(ROWS, progress))
    seconds = time.perf_counter() - start
    _print_rows(console, measured, seconds)
    output.write_json(json, {**_conditions(bench, seconds), "rows": [asdict(row) for row in measured]})


class _Bench:
    """The model, the text and the measurements; a row's work is counted in windows passed forward."""

    def __init__(self, effort: Effort, device: torch.device) -> None:
        self.effort, self.device = effort, device

    def measure_all(self, rows: tuple[Row, ...], progress: Progress) -> Iterator[Measured]:
        self.progress = progress
        self.task = progress.add_task("loading", total=sum(map(self._work, rows)))
        self.model = zoo.load_model(attn_implementation="sdpa").to(self.device)  # type: ignore[arg-type]
        self.tokenizer: Any = zoo.load_tokenizer()
        self.heldout = zoo.heldout_batches(self.effort.windows)
        steps = max(map(self._steps, rows))
        self.training = zoo.training_batches(steps, self.effort.heal_rows) if steps else []
        self.logits = self._logits(self.model)
        self._sample(self.model)  # the first generation of a process is slow
        for row in rows:
            yield from self._measure_row(row)

    def _measure_row(self, row: Row) -> Iterator[Measured]:
        model = row.prepare(copy.deepcopy(self.model)).eval()
        yield self._measure(row.name, 0, model)
        steps = self._steps(row)
        if steps:

            def show(step: int, bits: float) -> None:
                self._advance(3 * self.effort.heal_rows, f"{row.name}: healing, step {step} of {steps}")

            zoo.heal(model, self.training[:steps], on_step=show)
            yield self._measure(row.name, steps, model)

    def _measure(self, name: str, steps: int, model: nn.Module) -> Measured:
        self._advance(0, f"{name}: measuring")
        difference = float((self._logits(model) - self.logits).abs().max())
        start = time.perf_counter()
        bits = zoo.bits_per_byte(model, self._counted(self.heldout))
        prefill = self.effort.windows * zoo.CONTEXT / (time.perf_counter() - start)
        start = time.perf_counter()
        sample = self._sample(model)
        decode = SAMPLE_BYTES / (time.perf_counter() - start)
        self._advance(_SAMPLE_WORK)
        cache = zoo.cache_bytes_per_token(model, self.heldout[0][:1, :-1])
        parameters = sum(p.numel() for p in model.parameters())
        return Measured(name, steps, bits, parameters, cache, prefill, decode, difference, sample)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        return model(input_ids=self.heldout[0][:, :-1].to(self.device), use_cache=False).logits

    def _sample(self, model: Any) -> str:
        """The greedy continuation of PROMPT, always SAMPLE_BYTES tokens long."""
        prompt = self.tokenizer(PROMPT, return_tensors="pt").to(self.device)
        length = dict(min_new_tokens=SAMPLE_BYTES, max_new_tokens=SAMPLE_BYTES)
        ids = model.generate(**prompt, **length, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        return self.tokenizer.decode(ids.tolist())

    def _counted(self, batches: list[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield batch
            self._advance(len(batch))

    def _advance(self, work: int, description: str | None = None) -> None:
        self.progress.update(self.task, advance=work, description=description)

    def _steps(self, row: Row) -> int:
        return min(row.heal_steps, self.effort.most_steps)

    def _work(self, row: Row) -> int:
        measure = self.effort.windows + _SAMPLE_WORK
        steps = self._steps(row)
        # A training step costs about three forward passes.
        return measure + (3 * self.effort.heal_rows * steps + measure if steps else 0)


_SAMPLE_WORK = 12  # windows that could be read in the time of one sample, about


def _introduction(effort: Effort) -> str:
    return (
        "The model is a byte-level Llama of 4.5 million parameters that comes with effkit. The text is the Python "
        f"standard library of this interpreter, {platform.python_version()}: {len(zoo.stdlib_files('heldout'))} of its "
        "modules were kept out of the training, and bits per byte (lower is better) is measured on "
        f"{effort.windows} windows of {zoo.CONTEXT} bytes of them. Each technique changes a fresh copy of the model; "
        "'healed' is the changed model after a short training on the other modules."
    )


def _print_rows(console: Console, measured: list[Measured], seconds: float) -> None:
    # Plain columns: the whole table fits 80 columns.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("technique", no_wrap=True)
    speeds = ("prefill\ntokens/s", "decode\ntokens/s")
    for head in ("bits per\nbyte", "parameters", "cache\nB/token", *speeds, "logits\nmoved"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in measured:
        table.add_row(
            _title(row),
            f"{row.bits_per_byte:.3f}",
            f"{row.parameters:,}",
            f"{row.cache_bytes_per_token:,.0f}",
            f"{row.prefill_tokens_per_second:,.0f}",
            f"{row.decode_tokens_per_second:,.0f}",
            f"{row.largest_logit_difference:.2g}",
        )
    console.print(table)
    console.print(f"\nGreedy continuations of {PROMPT!r}:")
    for row in measured:
        console.print(f"{_title(row):21}  {_printable(row.sample)}", no_wrap=True, overflow="ellipsis")
    console.print(
        f"\nlogits moved: the largest difference from a logit of the baseline. Speeds are of this run on this machine "
        f"({seconds:.0f} s in all). What the rows show: docs/demo.md. That every fast path equals its equation here: "
        "effkit verify."
    )


def _title(row: Measured) -> str:
    return f"  healed, {row.heal_steps} steps" if row.heal_steps else row.technique


def _printable(text: str) -> str:
    """The text on one line, with newlines and other control characters as Python would write them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _conditions(bench: _Bench, seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "effkit": effkit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": str(bench.device),
        "threads": torch.get_num_threads(),
        "heldout_windows": bench.effort.windows,
        "context": zoo.CONTEXT,
        "heal_rows": bench.effort.heal_rows,
        "prompt": PROMPT,
        "seconds": round(seconds, 1),
    }


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Within the block transformers prints neither progress bars nor anything below an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
