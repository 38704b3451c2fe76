"""effkit demo: each technique on a small trained language model and real text, one line each, in under three minutes.

A technique gets its line from an entry of ROWS. Every row starts from a fresh copy of the model; a row that heals is
shown twice, as it comes out of the change and after a short training, the same for all. Adapters have a table of their
own, from ADAPTERS, since their point is another kind of text.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import effkit
from effkit import zoo
from effkit.attention import (
    GQAConfig,
    LinearAttentionConfig,
    LogLinearAttentionConfig,
    SlidingWindowConfig,
    SoftmaxAttentionConfig,
)
from effkit.change import Change, ChangeConfig
from effkit.cli import output
from effkit.cli.arguments import find_device
from effkit.norm import DyTConfig
from effkit.peft import LoRAConfig, SingLoRAConfig, VeRAConfig
from effkit.quant import FP8Config, NF4Config, quantization_report

PROMPT = 'def read_lines(path):\n    """Return'
SAMPLE_BYTES = 56  # with its title 80 columns wide


@dataclass(frozen=True)
class Row:
    """One technique: prepare changes a fresh copy of the model, and says how where that was one change.

    heals: show it healed too. distills: the first steps of a healing let the new modules learn the old ones' outputs.
    """

    name: str
    prepare: Callable[[nn.Module], Change | None]
    heals: bool = False
    distills: bool = False


@dataclass(frozen=True)
class AdapterRow:
    """One kind of adapter, and the learning rate it is trained with."""

    name: str
    config: ChangeConfig
    lr: float


@dataclass(frozen=True)
class Effort:
    """How much is computed: held-out windows per measurement, steps of a healing and windows per step.

    distill_steps are those steps of a healing that are spent on single modules, in rows that distill; adapt_steps the
    steps that an adapter is trained for.
    """

    windows: int
    heal_steps: int
    distill_steps: int
    heal_rows: int
    adapt_steps: int


@dataclass(frozen=True)
class Measured:
    """One line of the table. Speeds are of this machine and this run; everything else repeats."""

    technique: str
    heal_steps: int
    bits_per_byte: float
    parameters: int
    bytes: int
    cache_bytes_per_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    largest_logit_difference: float
    sample: str


@dataclass(frozen=True)
class Adapted:
    """One line of the table of adapters. saved_bytes: what a training step keeps for its backward pass."""

    adapter: str
    trainable: int
    saved_bytes: int
    bits_per_byte_before: float
    bits_per_byte: float
    largest_logit_difference_merged: float


def changed_by(config: ChangeConfig) -> Callable[[nn.Module], Change]:
    """The prepare function of a technique that `effkit.apply` puts into a model."""

    def prepare(model: nn.Module) -> Change:
        change = effkit.apply(model, config)
        assert isinstance(change, Change)
        return change

    return prepare


HALF = (1, 3, 5)  # not the first layer, which loses more than any other
ROWS = (
    Row("baseline (torch SDPA)", lambda model: None),
    Row("exact attention", changed_by(SoftmaxAttentionConfig())),
    Row("window of 128 tokens", changed_by(SlidingWindowConfig(window=128))),
    Row("window of 32 tokens", changed_by(SlidingWindowConfig(window=32))),
    Row("window 32, 4 sinks", changed_by(SlidingWindowConfig(window=32, sink_tokens=4))),
    Row("window 32 in 3 layers", changed_by(SlidingWindowConfig(window=32, layers=(0, 1, 2)))),
    Row("linear attention", changed_by(LinearAttentionConfig()), heals=True, distills=True),
    Row("linear in 3 layers", changed_by(LinearAttentionConfig(layers=HALF)), heals=True, distills=True),
    Row("log-linear attention", changed_by(LogLinearAttentionConfig()), heals=True, distills=True),
    Row("log-linear, 3 layers", changed_by(LogLinearAttentionConfig(layers=HALF)), heals=True, distills=True),
    Row("GQA, 8 -> 4 kv heads", changed_by(GQAConfig(num_kv_heads=4)), heals=True),
    Row("GQA, 8 -> 1 kv heads", changed_by(GQAConfig(num_kv_heads=1)), heals=True),
    Row("DyT for every norm", changed_by(DyTConfig()), heals=True),
    Row("FP8 weights", changed_by(FP8Config())),
    Row("NF4 weights", changed_by(NF4Config())),
    Row("NF4, double quantised", changed_by(NF4Config(double_quant=True))),
    Row("FP4 weights", changed_by(NF4Config(quant_type="fp4"))),
    Row("INT4 weights", changed_by(NF4Config(quant_type="int4"))),
)
ADAPTERS = (
    AdapterRow("LoRA, rank 8", LoRAConfig(rank=8, alpha=16, target_modules="all-linear"), 1e-2),
    AdapterRow("SingLoRA, rank 8", SingLoRAConfig(alpha=16, ramp_steps=5, target_modules="all-linear"), 1e-2),
    AdapterRow("VeRA, rank 64", VeRAConfig(rank=64, target_modules="all-linear"), 1e-1),
)
FULL = Effort(windows=24, heal_steps=30, distill_steps=12, heal_rows=2, adapt_steps=15)
QUICK = Effort(windows=4, heal_steps=2, distill_steps=1, heal_rows=2, adapt_steps=2)


def run(json: str | None = None, quick: bool = False, device: str | None = None) -> None:
    """Runs the demo and prints its table; json names a file for the same numbers, "-" is standard output alone.

    quick measures a few windows and heals for two steps: enough to see that everything works, not to compare.
    device: default CUDA where there is one, else the CPU.
    """
    output.check_folder(json)
    start = time.perf_counter()
    effort, where = QUICK if quick else FULL, find_device(device)
    console = output.console(json)
    console.print(_introduction(effort), end="\n\n")
    with _quiet_transformers(), output.progress() as progress:
        bench = _Bench(effort, where, progress)
        measured = [line for row in ROWS for line in bench.measure_row(row)]
        adapted = [bench.adapt(row) for row in ADAPTERS]
    seconds = time.perf_counter() - start
    _print_rows(console, measured, seconds)
    _print_adapters(console, adapted, effort)
    lines = {"rows": [asdict(line) for line in measured], "adapters": [asdict(line) for line in adapted]}
    output.write_json(json, {**_conditions(effort, where, seconds), **lines})


class _Bench:
    """The model, the text and what is measured on them; progress counts windows passed forward."""

    def __init__(self, effort: Effort, device: torch.device, progress: Progress) -> None:
        self.effort, self.device, self.progress = effort, device, progress
        total = sum(_work(row, effort) for row in ROWS) + len(ADAPTERS) * _adapter_work(effort)
        self.task = progress.add_task("loading model and text", total=total)
        self.model = zoo.load_model(attn_implementation="sdpa").to(device)  # type: ignore[arg-type]
        self.tokenizer: Any = zoo.load_tokenizer()
        self.heldout = zoo.heldout_batches(effort.windows)
        self.training = zoo.training_batches(effort.heal_steps, effort.heal_rows)
        self.trees = zoo.training_batches(effort.adapt_steps, _TREE_ROWS, _TREE_LENGTH, kind="tree")
        self.heldout_trees = zoo.heldout_batches(_TREE_WINDOWS, kind="tree")
        self.logits = self._logits(self.model)
        self._sample(self.model)  # the first generation of a process is slow

    def measure_row(self, row: Row) -> Iterator[Measured]:
        """The lines of a technique: as it comes out of the change, and healed."""
        model = copy.deepcopy(self.model)
        change = row.prepare(model)
        model.eval()
        yield self._measure(row.name, 0, model)
        if row.heals:
            self._heal(row, model, change)
            yield self._measure(row.name, len(self.training), model)

    def adapt(self, row: AdapterRow) -> Adapted:
        """The line of an adapter."""
        self._advance(0, f"{row.name}: adapting to syntax trees")
        model = copy.deepcopy(self.model)
        effkit.apply(model, row.config)
        result = zoo.adapt(model, self.trees, self.heldout_trees, lr=row.lr, every=len(self.trees))
        self._advance(_adapter_work(self.effort))
        before, after = result.curve.values()
        assert result.merge_error is not None
        return Adapted(row.name, result.trainable, result.saved_bytes, before, after, result.merge_error)

    def _heal(self, row: Row, model: nn.Module, change: Change | None) -> None:
        """Trains on the same batches in every row; in one that distills, on the first of them only the new modules."""
        first = self.effort.distill_steps if row.distills else 0

        def show(step: int, loss: float, before: int = 0) -> None:
            told = f"{row.name}: healing, step {before + step} of {len(self.training)}"
            self._advance(3 * self.effort.heal_rows, told)

        if row.distills:
            assert change is not None
            zoo.distill(change, self.training[:first], on_step=show)
        zoo.heal(model, self.training[first:], lr=5e-4, on_step=functools.partial(show, before=first))

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
        size = quantization_report(model)
        return Measured(name, steps, bits, size.parameters, size.bytes, cache, prefill, decode, difference, sample)

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
        self.progress.update(self.task, advance=work, description=description, refresh=True)


_SAMPLE_WORK = 12  # windows that could be read in the time of one sample, about
_TREE_ROWS, _TREE_LENGTH, _TREE_WINDOWS = 2, 128, 4


def _work(row: Row, effort: Effort) -> int:
    """What a row costs, in windows passed forward; a training step costs about three of them per window."""
    measure = effort.windows + _SAMPLE_WORK
    return measure + (3 * effort.heal_rows * effort.heal_steps + measure if row.heals else 0)


def _adapter_work(effort: Effort) -> int:
    """The same for an adapter: two measurements, and steps on windows of a quarter of the length."""
    return 2 * _TREE_WINDOWS + 3 * _TREE_ROWS * effort.adapt_steps // 4


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
    for head in ("bits per\nbyte", "weights\nMB", "cache\nB/token", *speeds, "logits\nmoved"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in measured:
        table.add_row(
            _title(line),
            f"{line.bits_per_byte:.3f}",
            f"{line.bytes / 1e6:.2f}",
            f"{line.cache_bytes_per_token:,.0f}",
            f"{line.prefill_tokens_per_second:,.0f}",
            f"{line.decode_tokens_per_second:,.0f}",
            f"{line.largest_logit_difference:.2g}",
        )
    console.print(table)
    console.print(f"\nGreedy continuations of {PROMPT!r}:")
    for line in measured:
        console.print(f"{_title(line):21} |{_printable(line.sample)}|", no_wrap=True, overflow="ellipsis")
    console.print(
        f"\nlogits moved: the largest difference from a logit of the baseline. Speeds are of this run on this machine "
        f"({seconds:.0f} s in all). What the rows show: docs/demo.md. That every fast path equals its equation here: "
        "effkit verify."
    )


def _print_adapters(console: Console, adapted: list[Adapted], effort: Effort) -> None:
    console.print(
        f"\nAdapters, trained for {effort.adapt_steps} steps on {_TREE_ROWS} windows of {_TREE_LENGTH} bytes of "
        "syntax trees, which the model has never read, and measured on those of held-out modules. All other weights "
        "are frozen. What a longer training shows: docs/adapter_training.md.\n"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("adapter", no_wrap=True)
    for head in (
        "trained\nnumbers",
        "kept for\nbackward, MB",
        "bits per\nbyte before",
        "after",
        "merging moves\nlogits by",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for line in adapted:
        table.add_row(
            line.adapter,
            f"{line.trainable:,}",
            f"{line.saved_bytes / 1e6:.1f}",
            f"{line.bits_per_byte_before:.3f}",
            f"{line.bits_per_byte:.3f}",
            f"{line.largest_logit_difference_merged:.1g}",
        )
    console.print(table)


def _title(line: Measured) -> str:
    return f"  healed, {line.heal_steps} steps" if line.heal_steps else line.technique


def _printable(text: str) -> str:
    """The text on one line, with newlines and other control characters as Python would write them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _conditions(effort: Effort, device: torch.device, seconds: float) -> dict[str, Any]:
    import transformers

    return {
        "effkit": effkit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "effort": asdict(effort),
        "context": zoo.CONTEXT,
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
