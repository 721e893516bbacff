"""Verbs that bring a network into use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app

Run = Annotated[Path, typer.Argument(help="output folder of a training run (config.json and model.pt)")]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="output folder of a training run; or a DFA: its run, or weights file")],
    out: Annotated[Path, typer.Argument(help="ONNX file to write")],
    image_only: Annotated[
        bool, typer.Option(help="one input: keypoints are found by the aligner inside (*_dfa), else the template's")
    ] = False,
    licence: Annotated[str, typer.Option(help="licence of the weights, stored in the file")] = "unknown",
) -> None:
    """Export a trained network to ONNX (images + keypoints -> embedding) and check it against torch.

    A DFA becomes a detector for crops of one face, which insightface.model_zoo loads as it is.
    """
    from ..deployment.detector_export import export_detector
    from ..deployment.onnx_export import export_onnx
    from ..deployment.weights import load_run
    from ..dfa.weights import holds_dfa, load_dfa

    if holds_dfa(run):
        typer.echo(f"{export_detector(load_dfa(run), out, licence)}: a detector for crops of one face")
        return
    report = export_onnx(load_run(run), out, image_only, licence)
    typer.echo(f"{report.path}: {' + '.join(report.inputs)} -> embedding, cosine to torch >= {report.cosine:.6f}")


@app.command()
def pack(
    run: Run,
    detector: Annotated[Path, typer.Option(help="face detector, ONNX in InsightFace's SCRFD layout with landmarks")],
    name: Annotated[str, typer.Option(help="what FaceAnalysis(name=...) will say")] = "kprpe",
    root: Annotated[Path, typer.Option(help="InsightFace's root folder")] = Path("~/.insightface"),
    licence: Annotated[str, typer.Option(help="licence of the recognition weights")] = "unknown",
    detector_licence: Annotated[str, typer.Option(help="licence of the detector")] = "unknown",
    aligner: Annotated[
        Path | None, typer.Option(help="exported DFA that refines the detector's landmarks after register()")
    ] = None,
) -> None:
    """Build a model pack for FaceAnalysis(name=NAME) from a trained network and a detector."""
    from ..deployment.model_pack import build_from_network
    from ..deployment.weights import load_run

    folder = build_from_network(load_run(run), detector, name, root, licence, detector_licence, aligner)
    typer.echo(f"{folder}\nuse it: FaceAnalysis(name={name!r}, root={str(root)!r})")
