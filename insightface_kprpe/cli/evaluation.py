"""Verbs that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app

evaluate_app = typer.Typer(help="Measure a model on a protocol.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("bin")
def evaluate_bin(
    sets: Annotated[list[str], typer.Argument(help=".bin files of pairs, or synthetic / synthetic_unaligned")],
    model: Annotated[Path, typer.Option(help="output folder of a training run")],
    batch_size: Annotated[int, typer.Option(help="crops a forward pass")] = 64,
    flip: Annotated[bool, typer.Option(help="add the embedding of the mirrored crop")] = True,
) -> None:
    """10-fold verification accuracy on InsightFace .bin sets; landmarks from NAME_ldmk_5points.csv beside each."""
    from ..deployment.weights import load_run
    from ..evaluation.embedding import TorchEmbedder
    from ..evaluation.verification import open_verification, verify

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

    from ..data.landmark_dataset import LandmarkDataset
    from ..dfa import load_dfa
    from ..dfa.network import count_parameters_and_flops
    from ..evaluation import landmarks as protocol

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
