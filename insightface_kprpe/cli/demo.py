"""The verb that shows a page."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .faces import Aligned, DetectorThreshold, Pack, Root, count, fill_gallery, open_people, threshold_of


@app.command()
def demo(
    gallery: Annotated[
        str | None,
        typer.Option(help="who is known: folder of people, gallery file, or postgresql:// address; default: nobody"),
    ] = None,
    pack: Pack = "kprpe",
    root: Root = Path("~/.insightface"),
    threshold: Annotated[
        float | None, typer.Option(help="minimum cosine similarity for a match; default: the pack's, or 0.3")
    ] = None,
    det_thresh: DetectorThreshold = 0.5,
    aligned: Aligned = True,
    maps: Annotated[
        str | None, typer.Option(help="draw attention of this KPRPE network: a training run, or weights")
    ] = None,
    against: Annotated[str | None, typer.Option(help="and of this ViT without KPRPE, beside it")] = None,
    port: Annotated[int | None, typer.Option(help="of the page; default: the first free one from 7860 on")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="open the page in the browser")] = False,
) -> None:
    """Show a page to drop photos on: faces, keypoints, crops, quality, similarity, names, attention.

    It is served to this machine alone (127.0.0.1); Ctrl-C ends it. Examples: insightface-kprpe demo --gallery
    people.npz; after insightface-kprpe quickstart: insightface-kprpe demo --root work_dirs/quickstart/insightface
    --det-thresh 0.7 --maps work_dirs/quickstart/run --against work_dirs/quickstart/run_without_keypoints
    """
    from ..app.demo_page import Demo, import_gradio, serving
    from ..app.file_gallery import FileGallery
    from ..app.recognition import open_pack
    from ..evaluation.attention_figures import check_drawable
    from ..weights.sources import load_published

    if against is not None and maps is None:
        raise ValueError("--against is drawn beside --maps, which is missing")
    import_gradio()
    kprpe, plain = (None if weights is None else load_published(weights)[0] for weights in (maps, against))
    for net in (kprpe, plain):
        if net is not None:
            check_drawable(net, with_kprpe=net is kprpe)
    with nullcontext(FileGallery()) if gallery is None else open_people(gallery) as people:
        analysis = open_pack(pack, root, det_thresh, aligned=aligned)
        if gallery is not None:
            fill_gallery(people, gallery, analysis, crops=False)
        known = count(len(people.people()), "person", "people") if gallery is not None else "nobody"
        about = f"Pack {pack}, gallery of {known}"
        shown = Demo(analysis, people, threshold_of(analysis, threshold), about, kprpe, plain)
        with _asked_to_end() as ended, serving(shown, port, browser) as address:
            typer.echo(f"{address} is ready for photos; Ctrl-C ends it")
            ended.wait()
    typer.echo("ended; what was dropped on the page is deleted")


@contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """What Ctrl-C sets, and the system when it asks to end."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
