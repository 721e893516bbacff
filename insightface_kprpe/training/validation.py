"""Validations of a run: when they are due, without changing or ending the run."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..distributed import wait_for_rank_0
from .checkpoint import Checkpointer
from .random_state import random_numbers_of_its_own
from .run_folder import TrainingError
from .state import Schedule, TrainingState

logger = logging.getLogger(__name__)


class Validation:
    """Measures a run at regular intervals and at its end, each time after its state was saved.

    Training continues bit for bit as if there had been none, even if it fails. One that was due but not done, because
    of a signal or a kill, is made up for on resuming.

    Args:
        measure: on rank 0, which measures: called with the number of steps done; returns a score (higher is better), or
            None. None on the other ranks, which wait.
        every: steps between validations.
        state: of the run, as it is after the steps that are done.
        schedule: how long the run is.
        checkpoints: receives the score of each.
        at_start: also before the first step.
    """

    def __init__(
        self,
        measure: Callable[[int], float | None] | None,
        every: int,
        state: TrainingState,
        schedule: Schedule,
        checkpoints: Checkpointer,
        at_start: bool = False,
    ) -> None:
        self.measure, self.every, self.checkpoints = measure, every, checkpoints
        self.state, self.schedule = state, schedule
        self.at_start = at_start
        self.failed: list[int] = []

    def due(self, step: int) -> bool:
        """Whether to validate after this step."""
        return step % self.every == 0 or step == self.schedule.total_steps

    def __call__(self, step: int) -> None:
        """Validate; every rank calls it and returns when rank 0 is done."""
        if self.measure is not None:
            self._measure(step)
        wait_for_rank_0()

    def start(self, step: int) -> None:
        """Make up for a missing validation when a run resumes; called like a validation."""
        if self.measure is not None:
            undone = step > 0 and self.due(step) and step not in self.checkpoints.scores
            if undone or self.at_start:
                self._measure(step)
        wait_for_rank_0()

    def warn_if_failed(self) -> None:
        """Warn once at the end of a run if validations failed."""
        if self.failed:
            logger.warning(
                "%d validations failed, after steps %s (see above); model.pt is complete and can be measured with "
                "`insightface-kprpe evaluate`",
                len(self.failed), ", ".join(map(str, self.failed)),
            )  # fmt: skip

    def _measure(self, step: int) -> None:
        try:
            with random_numbers_of_its_own():
                score = self.measure(step)
        except Exception as error:  # whatever the error, training is more important
            self._note(step, error)
            return
        self.checkpoints.wait()  # a checkpoint that could not be written does end the run
        try:
            self.checkpoints.add_score(step, self.state, self.schedule, score)
        except TrainingError as error:
            self._note(step, error)

    def _note(self, step: int, error: Exception) -> None:
        self.failed.append(step)
        explained = isinstance(error, ValueError | OSError | TrainingError)
        logger.error(
            "VALIDATION FAILED after step %d, training continues: %s: %s",
            step, type(error).__name__, error, exc_info=None if explained else error,
        )  # fmt: skip
