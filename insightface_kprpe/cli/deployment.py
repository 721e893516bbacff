"""Verbs that bring a network into use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .app import app

SOURCE = (
    "weights: arcface_torch's model.pt, a CVLface folder, a snapshot of the Hugging Face Hub, "
    "hf:OWNER/NAME[/PATH][@REVISION], a training run, or what convert wrote"
)
Root = Annotated[Path, typer.Option(help="InsightFace's root folder")]
Network = Annotated[str | None, typer.Option(help="name of the network, where the weights do not tell it")]
Cache = Annotated[Path | None, typer.Option(help="folder for downloads from the Hub")]
Offline = Annotated[bool, typer.Option("--offline", help="download nothing, use what is in the cache")]
Pack = Annotated[str, typer.Argument(help="name of an installed pack, or its folder")]


class BuildUnlessNamed(TyperGroup):
    """A group whose first verb may be left out: `pack X --detector D` is `pack build X --detector D`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Put the verb in front where there is none."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["build", *args]
        return super().parse_args(ctx, args)


pack_app = typer.Typer(
    cls=BuildUnlessNamed,
    help="Packs for FaceAnalysis: build (which may be left out: pack X --detector D), inspect, verify and remove them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(pack_app, name="pack")


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a training run, of a DFA too; or whatever convert reads")],
    out: Annotated[Path, typer.Argument(help="ONNX file to write")],
    image_only: Annotated[
        bool, typer.Option(help="one input: keypoints are found by the aligner inside (*_dfa), else the template's")
    ] = False,
    licence: Annotated[str | None, typer.Option(help="of the weights, stored in the file")] = None,
) -> None:
    """Export a trained network to ONNX (images + keypoints -> embedding) and check it against torch.

    A DFA becomes a detector for crops of one face, which insightface.model_zoo loads as it is.
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
    licence: Annotated[str | None, typer.Option(help="of the weights, where the source does not say it")] = None,
    cache: Cache = None,
    offline: Offline = False,
) -> None:
    """Convert published weights, once their architecture has been checked, and say what they are.

    The folder is what export, evaluate and pack take for a training run; its model.pt is arcface_torch's.
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
            help="InsightFace pack (buffalo_l), ONNX file (also hf:) or folder; or dfa: the aligner, for crops"
        ),
    ] = ...,
    aligner: Annotated[
        str | None, typer.Option(help="DFA that refines the detector's landmarks after register(): ONNX or weights")
    ] = None,
    name: Annotated[str, typer.Option(help="what FaceAnalysis(name=...) will say")] = "kprpe",
    root: Root = Path("~/.insightface"),
    precision: Annotated[str, typer.Option(help="of the recognition files: fp32, fp16 or int8")] = "fp32",
    evaluate: Annotated[
        Path | None, typer.Option(help="verification set (.bin): thresholds at FPR 1e-3 to 1e-5 for the manifest")
    ] = None,
    extra_tasks: Annotated[
        str | None,
        typer.Option("--with", help="models to take over: genderage, landmark_2d_106, landmark_3d_68 (commas)"),
    ] = None,
    extra_pack: Annotated[
        str | None, typer.Option("--from", help="InsightFace pack (buffalo_l), or folder, that they are taken from")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="of the recognition weights, where they do not say")] = None,
    detector_licence: Annotated[str | None, typer.Option(help="of the detector, where it does not say")] = None,
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
        raise ValueError("pack takes the recognition weights once: as --recognition X, or as the first argument")
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
    typer.echo(f"{describe(folder)}\n\nuse it: FaceAnalysis(name={name!r}, root={str(root)!r})")


@pack_app.command("inspect")
def inspect_pack(pack: Pack, root: Root = Path("~/.insightface")) -> None:
    """Say what every file of a pack is, where it came from, and under which licence."""
    from ..deployment.installed_packs import describe
    from ..packs.layout import find_pack

    typer.echo(describe(find_pack(pack, root)))


@pack_app.command("verify")
def verify_pack(pack: Pack, root: Root = Path("~/.insightface")) -> None:
    """Check a pack: hashes, how InsightFace takes each file, and one run of everything."""
    from ..deployment.installed_packs import verify
    from ..packs.layout import find_pack

    folder = find_pack(pack, root)
    if problems := verify(folder):
        raise ValueError(f"{folder}: " + "; ".join(problems))
    typer.echo(f"{folder}: files unchanged, taken as intended, and working")


@pack_app.command("remove")
def remove_pack(pack: Pack, root: Root = Path("~/.insightface")) -> None:
    """Delete a pack that this package built."""
    from ..deployment.installed_packs import remove
    from ..packs.layout import find_pack

    folder = find_pack(pack, root)
    remove(folder)
    typer.echo(f"{folder}: removed")
