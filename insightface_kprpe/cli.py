"""The command line: ``insightface-kprpe VERB``. It parses, calls the library, prints; nothing else lives here."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from .geometry import SCORE_THRESHOLD

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


@app.command("train-dfa", context_settings={"allow_interspersed_args": False})
def train_dfa(
    config: Annotated[str, typer.Argument(help="config file, or the name of a shipped one (e.g. dfa_small)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="replace values")] = None,
) -> None:
    """Train the landmark network in this process. Several: torchrun ... -m insightface_kprpe.dfa.training CONFIG ..."""
    from .dfa.training import main as train_main

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


@evaluate_app.command("landmarks")
def evaluate_landmarks(
    data: Annotated[Path, typer.Argument(help="folder with label.txt (RetinaFace's format) and its pictures")],
    models: Annotated[list[str], typer.Argument(metavar="NAME=PATH...", help="train-dfa's output, or weights files")],
    out: Annotated[Path | None, typer.Option(help="folder for landmarks.json and the curves, landmarks.png")] = None,
    robustness: Annotated[bool, typer.Option(help="also on blurred, small, rotated and shifted crops")] = False,
) -> None:
    """Error of landmark networks, as a fraction of sqrt(box area) (NME), their failures (NME > 0.1), and their size."""
    import torch

    from .data.landmark_dataset import LandmarkDataset
    from .dfa import load_dfa
    from .dfa.network import count_parameters_and_flops
    from .evaluation import landmarks as protocol

    if not all("=" in model for model in models):
        raise ValueError(f"models must be NAME=PATH, e.g. DFA=work_dirs/dfa_small, got {' '.join(models)}")
    nets = {name: load_dfa(path) for name, _, path in (model.partition("=") for model in models)}
    results, tables = {}, {}
    typer.echo(f"{'model':24}     NME   failures   mean score   parameters   GFLOP")
    for name, net in nets.items():
        dataset = LandmarkDataset(data, net.image_size, labelled_only=True)
        parameters, flops = count_parameters_and_flops(net, torch.zeros(1, 3, net.image_size, net.image_size))
        results[name] = found = protocol.evaluate_landmarks(lambda images, net=net: net.locate(images)[:2], dataset)
        typer.echo(
            f"{name:24}  {found.nme:.4f}    {found.failure_rate:5.1f} %       {found.score:.4f}   {parameters:10,}   "
            f"{flops / 1e9:5.2f}"
        )
        if robustness:
            tables[name] = protocol.robustness(lambda images, net=net: net.locate(images)[:2], dataset)
    if robustness:
        typer.echo(f"\n{'NME':24}" + "".join(f"  {name:>14}" for name in tables))
        for condition in tables[name]:
            typer.echo(f"{condition:24}" + "".join(f"  {table[condition].nme:14.4f}" for table in tables.values()))
    if out is not None:
        protocol.write_report(results, out, tables)


@app.command()
def landmarks(
    source: Annotated[Path, typer.Argument(help="folder with train.rec, .rec or .bin file, or folder of images")],
    weights: Annotated[Path, typer.Option(help="landmark network: weights file, or output folder of train-dfa")],
    out: Annotated[Path | None, typer.Option(help="file to write, instead of the one beside the source")] = None,
    overlay: Annotated[int, typer.Option(help="also write a PNG of so many faces with their points")] = 0,
    batch_size: Annotated[int, typer.Option(help="crops a forward pass")] = 64,
    num_workers: Annotated[int, typer.Option(help="processes that read images, on every rank")] = 2,
) -> None:
    """Predict the landmarks of a set of crops: ldmk_5points.csv beside it, with a score for every face.

    Start it again to go on after an interruption. Several processes: torchrun --nproc_per_node=N -m
    insightface_kprpe.cli landmarks ...
    """
    from .data.landmark_csv import read_landmark_csv
    from .dfa import load_dfa
    from .landmarks import contact_sheet, open_crops, predict_landmarks, write_contact_sheet
    from .partial_fc import rank_and_world_size
    from .training.loop import process_group

    with process_group() as device:
        crops = open_crops(source)
        options = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
        file = predict_landmarks(crops, load_dfa(weights), out, **options)
        if rank_and_world_size()[0] != 0:
            return
        keypoints, scores = read_landmark_csv(file, crops.count)
        low = int((scores < SCORE_THRESHOLD).sum())
        typer.echo(f"{file}: {crops.count} faces, {low} of them with a score below {SCORE_THRESHOLD}")
        if overlay > 0:
            write_contact_sheet(file.with_suffix(".png"), contact_sheet(crops, keypoints, scores, overlay))
            typer.echo(f"{file.with_suffix('.png')}: look at it")


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
    from .deployment.detector_export import export_detector
    from .deployment.onnx_export import export_onnx
    from .deployment.weights import load_run
    from .dfa.weights import holds_dfa, load_dfa

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
    from .deployment.model_pack import build_from_network
    from .deployment.weights import load_run

    folder = build_from_network(load_run(run), detector, name, root, licence, detector_licence, aligner)
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
