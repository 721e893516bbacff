"""Verbs that deploy a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .app import app

SOURCE = (
    "weights: arcface_torch's model.pt, a CVLface folder, a snapshot from the Hugging Face Hub, "
    "hf:OWNER/NAME[/PATH][@REVISION], a training run, or the output of convert"
)
Root = Annotated[Path, typer.Option(help="InsightFace's root folder")]
Network = Annotated[str | None, typer.Option(help="name of the network, if the weights alone do not determine it")]
Cache = Annotated[Path | None, typer.Option(help="folder for downloads from the Hub")]
Offline = Annotated[bool, typer.Option("--offline", help="download nothing, use only the cache")]
Pack = Annotated[str, typer.Argument(help="name of an installed pack, or its folder")]


class BuildUnlessNamed(TyperGroup):
    """A group whose first verb may be left out: `pack X --detector D` is `pack build X --detector D`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Insert the verb if there is none."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["build", *args]
        return super().parse_args(ctx, args)


pack_app = typer.Typer(
    cls=BuildUnlessNamed,
    help="Build, inspect, verify and remove packs for FaceAnalysis; `pack X ...` is short for `pack build X ...`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(pack_app, name="pack")


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a training run, of a DFA too; or whatever convert reads")],
    out: Annotated[Path, typer.Argument(help="ONNX file to write")],
    image_only: Annotated[
        bool,
        typer.Option(help="take images only: keypoints come from the built-in aligner (*_dfa), else from the template"),
    ] = False,
    licence: Annotated[str | None, typer.Option(help="of the weights, stored in the file")] = None,
) -> None:
    """Export a trained network to ONNX (images + keypoints -> embedding) and check it against torch.

    A DFA becomes a detector for crops of one face, which insightface.model_zoo loads without changes.
    """
    from ..deployment.detector_export import export_detector
    from ..deployment.onnx_export import export_onnx
    from ..dfa import DFA
    from ..weights.sources import load_published

    net, description = load_published(run, licence=licence)
    if isinstance(net, DFA):
        typer.echo(f"{export_detector(net, out, description.licence)}: a detector for crops of one face")
        return
    report = export_onnx(net, out, image_only, description.licence)
    typer.echo(f"{report.path}: {' + '.join(report.inputs)} -> embedding, cosine to torch >= {report.cosine:.6f}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    out: Annotated[Path, typer.Argument(help="NAME.safetensors, or a new folder for model.pt and config.json")],
    network: Network = None,
    licence: Annotated[str | None, typer.Option(help="license of the weights, if the source does not name it")] = None,
    cache: Cache = None,
    offline: Offline = False,
) -> None:
    """Check the architecture of published weights, convert them, and describe them.

    export, evaluate and pack accept the folder as a training run; its model.pt has arcface_torch's format.
    """
    from ..weights.sources import convert as write
    from ..weights.sources import load_published

    net, description = load_published(source, network, cache, offline, licence)
    typer.echo(f"{description.text()}\nwritten      {write(net, description, out)}")


@pack_app.command("build")
def build_pack(
    source: Annotated[str | None, typer.Argument(help="the same as --recognition")] = None,
    recognition: Annotated[str | None, typer.Option(help=f"{SOURCE}; or an ArcFace ONNX file")] = None,
    detector: Annotated[
        str,
        typer.Option(
            help="InsightFace pack (buffalo_l), ONNX file (also hf:) or folder; or dfa: use the aligner, for crops"
        ),
    ] = ...,
    aligner: Annotated[
        str | None,
        typer.Option(
            help="DFA, ONNX or weights, that refines the detector's landmarks once register() has been called"
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="name of the pack, for FaceAnalysis(name=...)")] = "kprpe",
    root: Root = Path("~/.insightface"),
    precision: Annotated[str, typer.Option(help="precision of the recognition files: fp32, fp16 or int8")] = "fp32",
    evaluate: Annotated[
        Path | None,
        typer.Option(help="verification set (.bin), to write thresholds at FPR 1e-3 to 1e-5 into the manifest"),
    ] = None,
    extra_tasks: Annotated[
        str | None,
        typer.Option(
            "--with", help="other models to include: genderage, landmark_2d_106, landmark_3d_68 (comma-separated)"
        ),
    ] = None,
    extra_pack: Annotated[
        str | None, typer.Option("--from", help="InsightFace pack (buffalo_l) or folder to take the --with models from")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="license of the recognition weights, if they do not name it")
    ] = None,
    detector_licence: Annotated[
        str | None, typer.Option(help="license of the detector, if it does not name it")
    ] = None,
    network: Network = None,
    cache: Cache = None,
    offline: Offline = False,
) -> None:
    """Build a pack for FaceAnalysis(name=NAME): export, check against torch, add the detector, write the manifest."""
    import logging

    from ..deployment.installed_packs import describe
    from ..deployment.model_pack import build

    logging.getLogger("insightface_kprpe.deployment").setLevel(logging.INFO)  # its steps take minutes
    if (source is None) == (recognition is None):
        raise ValueError(
            "pack takes the recognition weights exactly once: as --recognition X, or as the first argument"
        )
    folder = build(
        recognition=recognition or source,
        detector=detector,
        aligner=aligner,
        name=name,
        root=root,
        precision=precision,
        evaluate=evaluate,
        extra_tasks=[task.strip() for task in (extra_tasks or "").split(",") if task.strip()],
        extra_pack=extra_pack,
        licence=licence,
        detector_licence=detector_licence,
        network=network,
        cache=cache,
        offline=offline,
    )
    typer.echo(f"{describe(folder)}\n\nuse it with: FaceAnalysis(name={name!r}, root={str(root)!r})")


@pack_app.command("inspect")
def inspect_pack(pack: Pack, root: Root = Path("~/.insightface")) -> None:
    """Show what each file of a pack is, where it came from, and its license."""
    from ..deployment.installed_packs import describe
    from ..packs.layout import find_pack

    typer.echo(describe(find_pack(pack, root)))


@pack_app.command("verify")
def verify_pack(pack: Pack, root: Root = Path("~/.insightface")) -> None:
    """Check a pack: hashes, how InsightFace loads each file, and one run of each model."""
    from ..deployment.installed_packs import verify
    from ..packs.layout import find_pack

    folder = find_pack(pack, root)
    if problems := verify(folder):
        raise ValueError(f"{folder}: " + "; ".join(problems))
    typer.echo(f"{folder}: files unchanged, loaded as intended, and working")


@pack_app.command("remove")
def remove_pack(pack: Pack, root: Root = Path("~/.insightface")) -> None:
    """Delete a pack that this package built."""
    from ..deployment.installed_packs import remove
    from ..packs.layout import find_pack

    folder = find_pack(pack, root)
    remove(folder)
    typer.echo(f"{folder}: removed")
