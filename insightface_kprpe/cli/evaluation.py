"""Verbs that measure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .app import app

if TYPE_CHECKING:
    from ..evaluation.result import Result
    from ..inference.embedding import EmbedOptions
    from ..inference.models import Embedder

evaluate_app = typer.Typer(help="Measure a model on a protocol.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate_app, name="evaluate")


Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        "--model-prefix",
        help="[NAME=]PATH: training run, weights, .onnx, or pack; several: repeat it",
    ),
]
Network = Annotated[str | None, typer.Option(help="backbone that the weights are of, where nothing else says")]
Precision = Annotated[str, typer.Option(help="fp32, or bf16 for torch models")]
BatchSize = Annotated[int, typer.Option(help="crops a forward pass")]
Flip = Annotated[bool, typer.Option(help="add the embedding of the mirrored crop")]
Aligner = Annotated[
    Path | None, typer.Option(help="DFA that finds the keypoints: weights file, or output folder of train-dfa")
]
Missing = Annotated[str, typer.Option(help="images that are missing or damaged: fail, or skip them and say so")]
Cache = Annotated[Path | None, typer.Option(help="folder for embeddings, which an interrupted evaluation resumes")]
Workers = Annotated[int, typer.Option(help="processes that read images, on every rank")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "--result-dir", help="folder for the report: text, Markdown, JSON, curves, hardest pairs"),
]
Fusion = Annotated[str, typer.Option(help="average, norm, detector, norm_detector, landmark, or all of them")]


@evaluate_app.command("bin")
def evaluate_bin(
    sets: Annotated[list[str], typer.Argument(help=".bin files of pairs, or synthetic / synthetic_unaligned")],
    model: Models,
    network: Network = None,
    precision: Precision = "fp32",
    batch_size: BatchSize = 64,
    flip: Flip = True,
    aligner: Aligner = None,
    missing: Missing = "fail",
    cache: Cache = None,
    num_workers: Workers = 0,
    out: Out = None,
) -> None:
    """10-fold verification accuracy on InsightFace .bin sets; landmarks from NAME_ldmk_5points.csv beside each."""
    from ..data.verification_pairs import open_verification
    from ..evaluation.protocols import run_pairs

    opened = [open_verification(name) for name in sets]
    _measure(
        lambda embed, options: [result for pairs in opened for result in run_pairs(embed, pairs, options, out)],
        _Settings(model, network, precision, batch_size, flip, aligner, missing, cache, num_workers, out),
    )


@evaluate_app.command("ijb")
def evaluate_ijb(
    model: Models,
    folder: Annotated[
        Path | None, typer.Argument(help="folder with meta/ and loose_crop/, InsightFace's layout")
    ] = None,
    image_path: Annotated[Path | None, typer.Option(help="the same, as arcface_torch's eval_ijbc.py has it")] = None,
    target: Annotated[str, typer.Option(help="IJBC or IJBB")] = "IJBC",
    fusion: Fusion = "norm_detector",
    network: Network = None,
    precision: Precision = "fp32",
    batch_size: BatchSize = 64,
    flip: Flip = True,
    aligner: Aligner = None,
    missing: Missing = "fail",
    cache: Cache = None,
    num_workers: Workers = 2,
    out: Out = None,
) -> None:
    """IJB-B or IJB-C: 1:1, and 1:N where its lists are in meta/. Many images: torchrun -m insightface_kprpe.cli ..."""
    from ..evaluation.protocols import choose_fusions, run_ijb
    from ..evaluation.report import format_arcface_torch

    if (folder is None) == (image_path is None):
        raise ValueError("name the folder with meta/ and loose_crop/ once: evaluate ijb FOLDER, or --image-path FOLDER")
    if target.upper() not in ("IJBC", "IJBB"):
        raise ValueError(f"target must be IJBC or IJBB, got {target}")
    fusions = choose_fusions(fusion)
    results = _measure(
        lambda embed, options: run_ijb(embed, folder or image_path, target.upper(), fusions, options, out),
        _Settings(model, network, precision, batch_size, flip, aligner, missing, cache, num_workers, out),
    )
    if image_path is not None and results:
        typer.echo("\n" + format_arcface_torch(results, target.upper()))


@evaluate_app.command("ijbs")
def evaluate_ijbs(
    folder: Annotated[Path, typer.Argument(help="folder with images.csv and a folder for each protocol")],
    model: Models,
    fusion: Fusion = "landmark",
    network: Network = None,
    precision: Precision = "fp32",
    batch_size: BatchSize = 64,
    flip: Flip = True,
    aligner: Aligner = None,
    missing: Missing = "fail",
    cache: Cache = None,
    num_workers: Workers = 2,
    out: Out = None,
) -> None:
    """IJB-S from plain CSV files, whose form insightface_kprpe/evaluation/ijbs.py describes; use --cache."""
    from ..evaluation.protocols import choose_fusions, run_ijbs

    fusions = choose_fusions(fusion)
    _measure(
        lambda embed, options: run_ijbs(embed, folder, fusions, options),
        _Settings(model, network, precision, batch_size, flip, aligner, missing, cache, num_workers, out),
    )


@evaluate_app.command("tinyface")
def evaluate_tinyface(
    folder: Annotated[Path, typer.Argument(help="folder with Probe, Gallery_Match, Gallery_Distractor; or above it")],
    model: Models,
    network: Network = None,
    precision: Precision = "fp32",
    batch_size: BatchSize = 64,
    flip: Flip = True,
    aligner: Aligner = None,
    missing: Missing = "fail",
    cache: Cache = None,
    num_workers: Workers = 2,
    out: Out = None,
) -> None:
    """TinyFace: rank-1, -5 and -20 among distractors; keypoints from --aligner, else the canonical template."""
    from ..evaluation.protocols import run_tinyface

    _measure(
        lambda embed, options: run_tinyface(embed, folder, options),
        _Settings(model, network, precision, batch_size, flip, aligner, missing, cache, num_workers, out),
    )


@app.command("embed")
def embed_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of crops; also train.rec or a .bin file")],
    model: Models,
    out: Annotated[Path, typer.Option(help=".npz or .parquet file to write")],
    network: Network = None,
    precision: Precision = "fp32",
    batch_size: BatchSize = 64,
    flip: Flip = True,
    aligner: Aligner = None,
    missing: Missing = "fail",
    cache: Cache = None,
    num_workers: Workers = 2,
) -> None:
    """Embed aligned 112x112 crops: names, embeddings, norms, keypoints and face scores in one file."""
    from ..inference.embedding_file import embed_to_file

    if len(model) != 1:
        raise ValueError(f"embed takes one --model, got {len(model)}")
    settings = _Settings(model, network, precision, batch_size, flip, aligner, missing, cache, num_workers, None)
    with _rank(settings) as (options, models):
        rows = [embed_to_file(embed, source, out, options) for embed in models]
        if _is_first():
            typer.echo(f"{out}: {rows[0]} embeddings")


class _Settings(NamedTuple):
    """What all verbs that embed are told, in the order of their options."""

    models: list[str]
    network: str | None
    precision: str
    batch_size: int
    flip: bool
    aligner: Path | None
    missing: str
    cache: Path | None
    num_workers: int
    out: Path | None


def _measure(run: Callable[[Embedder, EmbedOptions], list[Result]], settings: _Settings) -> list[Result]:
    """Run a protocol on every model; print the tables and write the report. Returns the results, on the first rank."""
    from ..evaluation.report import format_text, write_report
    from ..evaluation.sanity import results_of_training, sanity_warnings

    with _rank(settings) as (options, models):
        results, known = [], []
        for embed, (_, path) in zip(models, _named(settings.models), strict=True):
            results += run(embed, options)
            known += results_of_training(embed.name, path)
        if not _is_first():
            return []
        typer.echo(format_text(results))
        for warning in sanity_warnings([*known, *results]):
            typer.echo(f"warning: {warning}", err=True)
        if settings.out is not None:
            write_report(results, settings.out)
            typer.echo(f"report: {settings.out}")
        return results


@contextlib.contextmanager
def _rank(settings: _Settings) -> Iterator[tuple[EmbedOptions, Iterator[Embedder]]]:
    """This rank's options, and the models, each opened when the one before is done with."""
    from ..dfa import load_dfa
    from ..distributed import process_group
    from ..inference.embedding import EmbedOptions
    from ..inference.models import open_model

    named = _named(settings.models)
    with process_group() as device:
        options = EmbedOptions(
            settings.batch_size,
            settings.flip,
            settings.num_workers,
            None if settings.aligner is None else load_dfa(settings.aligner).to(device),
            f"DFA {settings.aligner}",
            settings.missing,
            settings.cache,
            share=True,
        )
        yield options, (open_model(path, settings.network, settings.precision, device, name) for name, path in named)


def _named(models: list[str]) -> list[tuple[str, str]]:
    """(name, path) of each ``[NAME=]PATH``."""
    from ..inference.models import default_name

    named = []
    for text in models:
        name, equals, path = text.partition("=")
        is_named = equals and name and not Path(text).exists()
        named.append((name, path) if is_named else (default_name(text), text))
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ValueError(f"models must have different names, got {', '.join(names)}; give --model NAME=PATH")
    return named


def _is_first() -> bool:
    from ..distributed import rank_and_world_size

    return rank_and_world_size()[0] == 0


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
