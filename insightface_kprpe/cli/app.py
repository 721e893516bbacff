"""The command line's root, which the other modules of this folder add their verbs to."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..debugging import VARIABLE


class _Root(TyperGroup):
    """A group in which a file that ends too early is an error like others; by itself, it would say "Aborted!"."""

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
    debug: Annotated[bool, typer.Option("--debug", help=f"errors with their traceback; or {VARIABLE}=1")] = False,
) -> None:
    if debug:
        os.environ[VARIABLE] = "1"
