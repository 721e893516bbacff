"""Weights & Biases beside the metrics file, by the keys of arcface_torch's configs; imported only where asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from easydict import EasyDict as edict

from .config import SECRETS

RUN_ID = "wandb_run_id"  # a file in the run's folder, so that a resumed run goes on under its name


def start_wandb(config: edict, output: Path, resumed: bool) -> Any:
    """Open the run of a config at Weights & Biases, or go on with the one that this output folder had.

    Args:
        config: its ``wandb_key``, ``wandb_entity``, ``wandb_project``, ``wandb_resume``, ``suffix_run_name`` and
            ``notes`` are used; all of it but the key is sent along.
        output: the run's folder, after which the run is named.
        resumed: training goes on from a checkpoint, so that the run does too.

    Raises:
        ImportError: wandb is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError("using_wandb=True needs: pip install 'insightface-kprpe[wandb]'") from error
    if config.wandb_key is not None:
        wandb.login(key=config.wandb_key)
    remembered = output / RUN_ID
    again = (resumed or config.wandb_resume) and remembered.is_file()
    run = wandb.init(
        entity=config.wandb_entity,
        project=config.wandb_project,
        name="_".join(filter(None, (output.name, config.suffix_run_name))),
        notes=config.notes,
        dir=str(output),
        config={key: value for key, value in config.items() if key not in SECRETS},
        id=remembered.read_text().strip() if again else None,
        resume="allow" if again else None,
    )
    remembered.write_text(run.id)
    return run


def save_artifact(run: Any, path: Path) -> None:
    """Upload the network of a finished run, as arcface_torch's ``save_artifacts`` asks for."""
    artifact = importlib.import_module("wandb").Artifact(f"{path.parent.name}_model", type="model")
    artifact.add_file(str(path))
    run.log_artifact(artifact)
