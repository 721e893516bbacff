"""Weights & Biases besides the metrics file, by the keys of arcface_torch's configs; imported only on request."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from easydict import EasyDict as edict

from .config import SECRETS

RUN_ID = "wandb_run_id"  # a file in the run's folder, so that a resumed run continues under its name


class WandbRun:
    """The run of a config at Weights & Biases: a new one, or the one that this output folder had.

    Args:
        config: its ``wandb_key``, ``wandb_entity``, ``wandb_project``, ``wandb_resume``, ``suffix_run_name``, ``notes``
            and ``save_artifacts`` are used; everything except the key is sent along.
        output: the run's folder, after which the run is named.
        resumed: training continues from a checkpoint, and so does the wandb run.

    Raises:
        ImportError: wandb is not installed.
        ValueError: the run could not be opened.
    """

    name = "Weights & Biases"

    def __init__(self, config: edict, output: Path, resumed: bool) -> None:
        try:
            self.wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError("using_wandb=True needs: pip install 'insightface-kprpe[wandb]'") from error
        self.artifact = output / "model.pt" if config.save_artifacts else None
        remembered = output / RUN_ID
        again = (resumed or config.wandb_resume) and remembered.is_file()
        try:
            if config.wandb_key is not None:
                self.wandb.login(key=config.wandb_key)
            self.run = self.wandb.init(
                entity=config.wandb_entity,
                project=config.wandb_project,
                name="_".join(filter(None, (output.name, config.suffix_run_name))),
                notes=config.notes,
                dir=str(output),
                config={key: value for key, value in config.items() if key not in SECRETS},
                id=remembered.read_text().strip() if again else None,
                resume="allow" if again else None,
            )
        except Exception as error:  # its own error types, for the network, the key or the project
            raise ValueError(
                f"using_wandb must be False where Weights & Biases cannot be reached, got {type(error).__name__}: "
                f"{error}; WANDB_MODE=offline keeps the numbers for later"
            ) from error
        remembered.write_text(self.run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at an optimizer step."""
        self.run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """End the run; upload the network of one that has finished, if ``save_artifacts`` is set."""
        try:
            if finished and self.artifact is not None:
                artifact = self.wandb.Artifact(f"{self.artifact.parent.name}_model", type="model")
                artifact.add_file(str(self.artifact))
                self.run.log_artifact(artifact)
        finally:
            self.run.finish()
