"""The root of the command line, to which the other modules in this folder add their verbs."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..debugging import VARIABLE


class _Root(TyperGroup):
    """A group that reports a file that ends too early like any other error; typer would print "Aborted!"."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise ValueError(f"a file ends too early ({str(error) or 'no more data'})") from error


app = typer.Typer(
    name="insightface-kprpe",
    cls=_Root,
    help="Keypoint-relative (KPRPE) face recognition for InsightFace: train, verify, export, deploy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help=f"show the traceback of an error; same as {VARIABLE}=1")
    ] = False,
) -> None:
    """Handle the options that stand before a verb."""
    if debug:
        os.environ[VARIABLE] = "1"
