"""The command line: effkit list | show | verify | bench | demo.

Commands import what they need when they run, so that `effkit --help` does not wait for torch. Exit codes: 0 done, 1
something was judged wrong, 2 the command was not understood.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Efficiency techniques for language models that you can read, trust and run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Ops = Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Names as in `effkit list`; default: all.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for standard output.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Cases = Annotated[list[str] | None, typer.Option("--case", metavar="NAME", help="Only this case; may be repeated.")]


@app.callback()
def _root() -> None:
    """Efficiency techniques for language models that you can read, trust and run."""


@app.command("list")
def list_command(json: Json = None) -> None:
    """List the techniques, and which are verified here."""
    from effkit.cli import catalog

    catalog.print_list(json)


@app.command()
def show(op: Annotated[str, typer.Argument(metavar="OP")], json: Json = None) -> None:
    """Explain one technique, and which backend it takes here."""
    from effkit.cli import catalog

    catalog.print_op(op, json)


@app.command()
def verify(
    ops: Ops = None,
    device: Device = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="torch or triton; may be repeated; default: all that can run here.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, fp16 or bf16; may be repeated; default: all.")] = None,
    case: Cases = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    json: Json = None,
) -> None:
    """Judge outputs and gradients against the reference.

    Every backend that can run here is judged, on every case and dtype; exit code 1 on a failure.
    """
    from effkit.cli import verification

    verification.verify(ops or [], device, backend or [], dtype or [], case or [], fail_fast, json)


@app.command()
def bench(
    ops: Ops = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; default: bf16 on cuda, else fp32.")] = None,
    case: Cases = None,
    rival: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this rival; may be repeated; default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter measurements, for a first look.")] = False,
    json: Json = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the rows; needs matplotlib.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Append the rows to benchmarks/results.")] = False,
) -> None:
    """Time ops against their rivals, once verified."""
    from effkit.cli import benchmarks

    benchmarks.bench(ops or [], device, dtype, case or [], rival or [], quick, json, plot, save)


@app.command("demo")
def demo_command(
    quick: Annotated[bool, typer.Option("--quick", help="Less text and fewer healing steps.")] = False,
    device: Device = None,
    json: Json = None,
) -> None:
    """Watch the techniques at work on a small trained model."""
    from effkit.cli import demo

    demo.run(json=json, quick=quick, device=device)


def main() -> None:
    """The `effkit` program."""
    app()
