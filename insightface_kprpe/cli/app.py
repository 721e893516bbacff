"""The command line's root, which the other modules of this folder add their verbs to."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="insightface-kprpe",
    help="Keypoint-relative (KPRPE) face recognition for InsightFace: train, verify, export, deploy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
