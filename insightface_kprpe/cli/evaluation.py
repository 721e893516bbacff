"""Verbs that measure."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .app import app

if TYPE_CHECKING:
    from ..evaluation.result import Result
    from ..inference.embedding import EmbedOptions
    from ..inference.models import Embedder

evaluate_app = typer.Typer(help="Measure a model on a protocol.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate_app, name="evaluate")


@dataclass(frozen=True)
class Embedding:
    """The options of every verb that embeds images."""

    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "--model-prefix",
            help="[NAME=]PATH: training run, weights, .onnx, pack, or hf:OWNER/NAME; may be repeated",
        ),
    ]
    network: Annotated[str | None, typer.Option(help="backbone of the weights, if nothing else determines it")] = None
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for torch models")] = "fp32"
    batch_size: Annotated[int, typer.Option(help="crops per forward pass")] = 64
    flip: Annotated[bool, typer.Option(help="add the embedding of the mirrored crop")] = True
    aligner: Annotated[
        Path | None, typer.Option(help="DFA that predicts the keypoints: weights file, or output folder of train-dfa")
    ] = None
    missing: Annotated[
        str, typer.Option(help="what to do about missing or damaged images: fail, or skip (with a warning)")
    ] = "fail"
    cache: Annotated[
        Path | None, typer.Option(help="folder to cache embeddings in, so that an interrupted evaluation can resume")
    ] = None
    num_workers: Annotated[int, typer.Option(help="worker processes per rank that read images")] = 2


@dataclass(frozen=True)
class Measuring(Embedding):
    """The options of every verb that measures embeddings."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--result-dir", help="folder for the report: text, Markdown, JSON, curves, hardest pairs"
        ),
    ] = None


Fusion = Annotated[str, typer.Option(help="average, norm, detector, norm_detector, landmark, or all")]


def _with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``settings`` of a verb by command-line options, one per field of its class."""
    hints = get_type_hints(verb, include_extras=True)
    of_class = hints["settings"]
    parameters = [
        value.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, value in inspect.signature(verb).parameters.items()
        if name != "settings"
    ]
    class_hints = get_type_hints(of_class, include_extras=True)
    names = [field.name for field in fields(of_class)]
    for parameter in inspect.signature(of_class).parameters.values():
        parameters.append(
            parameter.replace(annotation=class_hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        )

    @functools.wraps(verb)
    def wrapper(**values: Any) -> None:
        settings = of_class(**{name: values.pop(name) for name in names})
        verb(**values, settings=settings)

    wrapper.__signature__ = inspect.Signature(parameters)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapper.__wrapped__  # typer would use its parameters
    return wrapper


@evaluate_app.command("bin")
@_with_options
def evaluate_bin(
    sets: Annotated[
        list[str], typer.Argument(help=".bin files, folders with pairs.txt, or synthetic / synthetic_unaligned")
    ],
    settings: Measuring,
) -> None:
    """Verification accuracy over folds, on InsightFace .bin sets or folders of crops with LFW's pairs.txt.

    Landmarks come from NAME_ldmk_5points.csv beside a .bin, ldmk_5points.csv in a folder. Example: insightface-kprpe
    evaluate bin lfw.bin lfw_aligned --model work_dirs/my_run --out report
    """
    from ..data.verification_pairs import open_verification
    from ..evaluation.protocols import run_pairs

    opened = [open_verification(name) for name in sets]
    out = settings.out
    _measure(lambda embed, options: [r for pairs in opened for r in run_pairs(embed, pairs, options, out)], settings)


@evaluate_app.command("ijb")
@_with_options
def evaluate_ijb(
    settings: Measuring,
    folder: Annotated[
        Path | None, typer.Argument(help="folder with meta/ and loose_crop/, InsightFace's layout")
    ] = None,
    image_path: Annotated[
        Path | None, typer.Option(help="same as FOLDER, spelled as in arcface_torch's eval_ijbc.py")
    ] = None,
    target: Annotated[str, typer.Option(help="IJBC or IJBB")] = "IJBC",
    fusion: Fusion = "norm_detector",
) -> None:
    """IJB-B or IJB-C: 1:1, and 1:N if its lists are in meta/. Many images: torchrun -m insightface_kprpe.cli ..."""
    from ..evaluation.protocols import choose_fusions, run_ijb
    from ..evaluation.report import format_arcface_torch

    if (folder is None) == (image_path is None):
        raise ValueError(
            "give the folder with meta/ and loose_crop/ exactly once: evaluate ijb FOLDER, or --image-path FOLDER"
        )
    if target.upper() not in ("IJBC", "IJBB"):
        raise ValueError(f"target must be IJBC or IJBB, got {target}")
    source, fusions = folder or image_path, choose_fusions(fusion)
    results = _measure(
        lambda embed, options: run_ijb(embed, source, target.upper(), fusions, options, settings.out), settings
    )
    if image_path is not None and results:
        typer.echo("\n" + format_arcface_torch(results, target.upper()))


@evaluate_app.command("ijbs")
@_with_options
def evaluate_ijbs(
    folder: Annotated[Path, typer.Argument(help="folder with images.csv and a folder for each protocol")],
    settings: Measuring,
    fusion: Fusion = "landmark",
) -> None:
    """IJB-S from plain CSV files, in the format that docs/ijbs.md describes; use --cache."""
    from ..evaluation.protocols import choose_fusions, run_ijbs

    fusions = choose_fusions(fusion)
    _measure(lambda embed, options: run_ijbs(embed, folder, fusions, options), settings)


@evaluate_app.command("tinyface")
@_with_options
def evaluate_tinyface(
    folder: Annotated[
        Path, typer.Argument(help="folder with Probe, Gallery_Match and Gallery_Distractor, or its parent")
    ],
    settings: Measuring,
) -> None:
    """TinyFace: rank-1, -5 and -20 among distractors; keypoints from --aligner, else the canonical template."""
    from ..evaluation.protocols import run_tinyface

    _measure(lambda embed, options: run_tinyface(embed, folder, options), settings)


@app.command("embed")
@_with_options
def embed_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of crops, .rec or .bin file")],
    out: Annotated[Path, typer.Option(help=".npz or .parquet file to write")],
    settings: Embedding,
) -> None:
    """Embed aligned 112x112 crops: names, embeddings, norms, keypoints and face scores in one file."""
    from ..inference.embedding_file import embed_to_file

    if len(settings.model) != 1:
        raise ValueError(f"embed takes one --model, got {len(settings.model)}")
    with _rank(settings) as (options, models):
        rows = [embed_to_file(embed, source, out, options) for embed in models]
        if _is_first():
            typer.echo(f"{out}: {rows[0]} embeddings")


def _measure(run: Callable[[Embedder, EmbedOptions], list[Result]], settings: Measuring) -> list[Result]:
    """Run a protocol on every model; print the tables and write the report. Returns the results, on the first rank."""
    from ..evaluation.report import check_report_folder, format_text, write_report
    from ..evaluation.sanity import results_of_training, sanity_warnings

    with _rank(settings) as (options, models):
        if settings.out is not None and _is_first():
            check_report_folder(settings.out)
        results, known = [], []
        for embed, (_, path) in zip(models, _named(settings.model), strict=True):
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
def _rank(settings: Embedding) -> Iterator[tuple[EmbedOptions, Iterator[Embedder]]]:
    """This rank's options, and the models, each opened once the previous one is done."""
    from ..dfa import load_dfa
    from ..distributed import process_group
    from ..inference.embedding import EmbedOptions
    from ..inference.models import open_model

    named = _named(settings.model)
    with process_group() as device:
        options = EmbedOptions(
            settings.batch_size,
            settings.flip,
            settings.num_workers,
            None if settings.aligner is None else load_dfa(settings.aligner).to(device),
            f"DFA {settings.aligner}",
            settings.missing,
            settings.cache,
            all_ranks=True,
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
    data: Annotated[Path, typer.Argument(help="folder with label.txt (RetinaFace's format) and its images")],
    models: Annotated[
        list[str], typer.Argument(metavar="NAME=PATH...", help="output folders of train-dfa, or weights files")
    ],
    out: Annotated[Path | None, typer.Option(help="folder for landmarks.json and the curves (landmarks.png)")] = None,
    robustness: Annotated[bool, typer.Option(help="also measure on blurred, small, rotated and shifted crops")] = False,
) -> None:
    """Measure landmark networks: error as a fraction of sqrt(box area) (NME), failures (NME > 0.1), and size."""
    import torch

    from ..data.landmark_dataset import LandmarkDataset
    from ..dfa import load_dfa
    from ..dfa.network import count_parameters_and_flops
    from ..evaluation import landmarks as protocol
    from ..evaluation.report import check_report_folder

    if not all("=" in model for model in models):
        raise ValueError(f"models must be NAME=PATH, e.g. DFA=work_dirs/dfa_small, got {' '.join(models)}")
    if out is not None:
        check_report_folder(out)
    nets = {name: load_dfa(path) for name, _, path in (model.partition("=") for model in models)}
    results, tables = {}, {}
    typer.echo(f"{'model':24}     NME   failures   mean score   parameters   GFLOP")
    for name, net in nets.items():
        dataset = LandmarkDataset(data, net.image_size, labeled_only=True)
        parameters, flops = count_parameters_and_flops(net, torch.zeros(1, 3, net.image_size, net.image_size))
        results[name] = found = protocol.evaluate_landmarks(lambda images, net=net: net.locate(images)[:2], dataset)
        typer.echo(
            f"{name:24}  {found.nme:.4f}    {100 * found.failure_rate:5.1f} %       {found.score:.4f}   "
            f"{parameters:10,}   {flops / 1e9:5.2f}"
        )
        if robustness:
            tables[name] = protocol.robustness(lambda images, net=net: net.locate(images)[:2], dataset)
    if robustness:
        typer.echo(f"\n{'NME':24}" + "".join(f"  {name:>14}" for name in tables))
        for condition in tables[name]:
            typer.echo(f"{condition:24}" + "".join(f"  {table[condition].nme:14.4f}" for table in tables.values()))
    if out is not None:
        protocol.write_report(results, out, tables)
