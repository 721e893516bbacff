"""Every reader of files that come from users, by name."""

from __future__ import annotations

from fuzz.data_readers import DATA_READERS
from fuzz.harness import Reader
from fuzz.model_readers import MODEL_READERS
from fuzz.protocol_readers import PROTOCOL_READERS
from fuzz.run_readers import RUN_READERS

READERS: dict[str, Reader] = {**DATA_READERS, **MODEL_READERS, **PROTOCOL_READERS, **RUN_READERS}
