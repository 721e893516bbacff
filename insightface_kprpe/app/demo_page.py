"""The demo's page: what :mod:`.photo_report` makes of photos that are dropped on it, served to this machine alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..backbones import VisionTransformer
from ..data.picture_files import readable_suffixes
from .gallery import Gallery
from .photo_report import (
    COLUMNS,
    POINTS,
    PhotoReport,
    attention_pictures,
    crops_picture,
    report_photos,
    similarity_picture,
)

HOST = "127.0.0.1"
_CSS = """
footer {display: none !important}
.gradio-container {max-width: 1200px !important; width: 100% !important; margin: auto}
"""
_NO_MAPS = (
    "To see what keypoints do to attention, start the demo with `--maps` and a training run with KPRPE, and with "
    "`--against` and one without (the quickstart leaves both: `run` and `run_without_keypoints`)."
)


@dataclass
class Demo:
    """What a page shows photos with.

    Attributes:
        app: insightface's ``FaceAnalysis`` after ``register()``, prepared.
        gallery: of people, made with the same model; it may be empty.
        threshold: cosine similarity from which on a face is somebody's, to begin with.
        about: a line about the pack and the gallery.
        kprpe: a network with KPRPE whose attention is drawn; None: none is.
        plain: a network without KPRPE, drawn beside it.
    """

    app: Any
    gallery: Gallery
    threshold: float
    about: str
    kprpe: VisionTransformer | None = None
    plain: VisionTransformer | None = None

    def show(self, files: list[str] | None, threshold: float) -> tuple[PhotoReport, str, list, list, Any, Any]:
        """The report on some photos, and of it notes, photos, table, crops and the matrix."""
        report = report_photos(self.app, self.gallery, files or [], threshold)
        notes = "\n".join(f"- {note}" for note in report.notes)
        matrix = similarity_picture(report, threshold)
        return report, notes, report.photos, report.rows, crops_picture(report), matrix

    def show_maps(self, report: PhotoReport | None, number: int | None, point: str) -> list:
        """The two images of attention; None where there is no such face (any more)."""
        if report is None or number is None or number > len(report.crops):
            return [None, None]
        return attention_pictures(report, number, point, self.kprpe, self.plain)


def import_gradio() -> ModuleType:
    """gradio, told to stay silent.

    Raises:
        ImportError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask its makers for news, and tell them of the start
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the demo needs: pip install 'insightface-kprpe[demo]'") from error
    return gradio


def build_page(demo: Demo) -> Any:
    """The page as gradio's ``Blocks``."""
    gr = import_gradio()

    with gr.Blocks(title="insightface-kprpe", analytics_enabled=False) as page:
        gr.Markdown(f"# Who is it?\n{demo.about}. Photos stay on this machine, and are deleted when the demo ends.")
        report = gr.State()
        with gr.Row():
            kinds = sorted(readable_suffixes())
            files = gr.File(label="photos", file_count="multiple", file_types=kinds, scale=2, height=180)
            threshold = gr.Slider(
                0,
                1,
                demo.threshold,
                step=0.01,
                label="threshold",
                info="minimum cosine similarity of one person's faces",
            )
        notes = gr.Markdown()
        with gr.Column(visible=False) as results:
            gr.Markdown("## Faces, keypoints, names")
            photos = gr.Gallery(show_label=False, columns=2, height="auto", object_fit="contain")
            table = gr.Dataframe(headers=list(COLUMNS), interactive=False, wrap=True, show_label=False)
            gr.Markdown(
                "## What the recognition model sees\n"
                "Quality, 0 to 1: how close the keypoints are to the template's, times the score of their detector."
            )
            crops = _picture(gr)
            gr.Markdown("## How similar the faces are\nThe cosine of every two; framed from the threshold on.")
            matrix = _picture(gr)
            maps = None if demo.kprpe is None else _add_maps(gr, demo, report)
        if maps is None:
            gr.Markdown(_NO_MAPS)
        outputs = [report, notes, photos, table, crops, matrix, results, *(maps or [])[:1]]
        refresh = _telling(gr, lambda *given: _refresh(gr, demo, *given)[: len(outputs)])
        for event in (files.change, threshold.release):
            refreshed = event(refresh, [files, threshold], outputs)
            if maps is not None:
                _, draw, arguments, pictures = maps
                refreshed.then(draw, arguments, pictures)
    return page


def _refresh(gr: ModuleType, demo: Demo, files: list[str] | None, threshold: float) -> list:
    """What :meth:`Demo.show` shows, whether there is anything to see, and which faces there are to choose from."""
    report, *shown = demo.show(files, threshold)
    numbers = list(range(1, 1 + len(report.crops)))
    choice = gr.Dropdown(numbers, value=numbers[0] if numbers else None)
    return [report, *shown, gr.Column(visible=bool(report.photos)), choice]


def _picture(gr: ModuleType) -> Any:
    return gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])


def _add_maps(gr: ModuleType, demo: Demo, report: Any) -> tuple[Any, Callable, list, list]:
    """The part of the page about attention: whose, and how its images are made of what."""
    gr.Markdown("## Where the network looks\nThe red star is the query, circles are the keypoints, darker is more.")
    with gr.Row():
        face = gr.Dropdown([], label="face", info="its number above")
        point = gr.Dropdown(list(POINTS), value="nose", label="query", info="the point whose patch looks at the others")
    pictures = [_picture(gr), _picture(gr)]
    arguments, draw = [report, face, point], _telling(gr, demo.show_maps)
    for event in (face.input, point.input):
        event(draw, arguments, pictures)
    return face, draw, arguments, pictures


def _telling(gr: ModuleType, function: Callable) -> Callable:
    """A function whose errors are shown on the page as the sentences that they are."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, RuntimeError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


@contextmanager
def serving(demo: Demo, port: int | None = None, in_browser: bool = False) -> Iterator[str]:
    """Serve the page while the block runs; what was dropped on it is deleted then.

    Args:
        demo: what it shows photos with.
        port: of this machine; None: the first free one from 7860 on.
        in_browser: also open it.

    Returns:
        The address.

    Raises:
        ImportError: the extra ``demo`` is missing.
        ValueError: the port is taken.
    """
    gr = import_gradio()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="insightface-kprpe-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # gradio keeps what was dropped on a page, and never deletes it
        page = build_page(demo)
        try:
            yield _launch(page, port, in_browser, theme=gr.themes.Default(**fonts), css=_CSS)
        finally:
            page.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _launch(page: Any, port: int | None, in_browser: bool, **looks: Any) -> str:
    quietly = {"quiet": True, "prevent_thread_lock": True, "share": False, "ssr_mode": False, "footer_links": []}
    try:
        return page.launch(server_name=HOST, server_port=port, inbrowser=in_browser, **quietly, **looks)[1]
    except OSError as error:
        wanted = "all ports from 7860 on are" if port is None else f"port {port} is"
        raise ValueError(f"{wanted} taken on {HOST}; choose another with --port") from error
