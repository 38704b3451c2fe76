"""python -m effkit.cli, the same as the program effkit."""

from effkit.cli import app

app(prog_name="effkit")
