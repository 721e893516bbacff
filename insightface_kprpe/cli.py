"""The command line: ``insightface-kprpe VERB``. It parses, calls the library, prints; nothing else lives here."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="insightface-kprpe",
    help="Keypoint-relative (KPRPE) face recognition for InsightFace: train, verify, export, deploy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
evaluate_app = typer.Typer(help="Measure a model on a protocol.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate_app, name="evaluate")

Run = Annotated[Path, typer.Argument(help="output folder of a training run (config.json and model.pt)")]


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="folder for everything that is made")] = Path("work_dirs/quickstart"),
) -> None:
    """Everything once, on drawn faces: data, training, verification, ONNX, model pack, FaceAnalysis (5 minutes)."""
    from .quickstart import run_quickstart

    run_quickstart(output)


@app.command()
def models() -> None:
    """List the networks that a config's `network` may name."""
    from .backbones import list_models

    typer.echo("\n".join(list_models()))


@app.command(context_settings={"allow_interspersed_args": False})
def train(
    config: Annotated[str, typer.Argument(help="config file, or the name of a shipped one (e.g. quickstart)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="replace values")] = None,
) -> None:
    """Train in this process. Several: torchrun --nproc_per_node=N -m insightface_kprpe.training.trainer CONFIG ..."""
    from .training.trainer import main as train_main

    train_main([config, *(overrides or [])])


@evaluate_app.command("bin")
def evaluate_bin(
    sets: Annotated[list[str], typer.Argument(help=".bin files of pairs, or synthetic / synthetic_unaligned")],
    model: Annotated[Path, typer.Option(help="output folder of a training run")],
    batch_size: Annotated[int, typer.Option(help="crops a forward pass")] = 64,
    flip: Annotated[bool, typer.Option(help="add the embedding of the mirrored crop")] = True,
) -> None:
    """10-fold verification accuracy on InsightFace .bin sets; landmarks from NAME_ldmk_5points.csv beside each."""
    from .deployment.weights import load_run
    from .evaluation.embedding import TorchEmbedder
    from .evaluation.verification import open_verification, verify

    embed = TorchEmbedder(load_run(model))
    for name in sets:
        pairs = open_verification(name)
        result = verify(embed, pairs, batch_size, flip)
        typer.echo(
            f"{pairs.name}: accuracy {result.accuracy:.2f} +- {result.std:.2f} %  cosine threshold "
            f"{result.cosine_threshold:.3f}  ({len(pairs.is_same)} pairs, flip {'added' if flip else 'off'})"
        )


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="ONNX file to write")],
    image_only: Annotated[bool, typer.Option(help="one input: every face is taken for an aligned one")] = False,
    licence: Annotated[str, typer.Option(help="licence of the weights, stored in the file")] = "unknown",
) -> None:
    """Export a trained network to ONNX (images + keypoints -> embedding) and check it against torch."""
    from .deployment.onnx_export import export_onnx
    from .deployment.weights import load_run

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
) -> None:
    """Build a model pack for FaceAnalysis(name=NAME) from a trained network and a detector."""
    from .deployment.model_pack import build_from_network
    from .deployment.weights import load_run

    folder = build_from_network(load_run(run), detector, name, root, licence, detector_licence)
    typer.echo(f"{folder}\nuse it: FaceAnalysis(name={name!r}, root={str(root)!r})")


def main() -> None:
    """Run the command line; what a user can mend is one sentence and exit status 1, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (ValueError, RuntimeError, ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
