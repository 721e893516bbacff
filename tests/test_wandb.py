"""What the run tells Weights & Biases, which a stand-in plays."""

from __future__ import annotations

import json
import sys
import types

import pytest

from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.trainer import train


class StandIn(types.ModuleType):
    """The part of the wandb module that training uses; notes every call."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return types.SimpleNamespace(
                id=kwargs.get("id") or f"id{len(self.calls)}",
                log=lambda values, step: self.calls.append(("log", (step,), values)),
                finish=lambda: self.calls.append(("finish", (), {})),
                log_artifact=lambda artifact: self.calls.append(("log_artifact", (), {})),
                add_file=lambda path: self.calls.append(("add_file", (path,), {})),
            )

        return call

    def named(self, name: str) -> list[tuple]:
        return [call for call in self.calls if call[0] == name]


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def config_of(output, *overrides):
    return load_config(
        "quickstart",
        [
            "num_classes=4", "num_image=32", "batch_size=8", "num_epoch=1", "num_workers=0", "frequent=2",
            "rec=synthetic", "val_targets=()", "network=vit_n", "network_kwargs={'depth': 1}", "embedding_size=16",
            "warmup_epoch=0", "using_wandb=True", f"output={output}", *overrides,
        ],
    )  # fmt: skip


def test_a_run_is_logged_and_resumed_under_its_name(wandb, tmp_path):
    keys = ("wandb_key=secret", "wandb_entity=team", "wandb_project=faces", "suffix_run_name=a", "notes=why")
    train(config_of(tmp_path / "run", *keys, "save_artifacts=True"))
    assert wandb.named("login") == [("login", (), {"key": "secret"})]
    (_, _, opened) = wandb.named("init")[0]
    assert (opened["entity"], opened["project"], opened["notes"]) == ("team", "faces", "why")
    assert (opened["name"], opened["id"], opened["resume"]) == ("run_a", None, None)
    assert opened["config"]["lr"] and "wandb_key" not in opened["config"]
    assert "secret" not in (tmp_path / "run" / "config.json").read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for _, (step,), values in wandb.named("log")] == rows
    assert {2, 4} == {row["step"] for row in rows if "loss" in row}
    assert wandb.named("add_file") == [("add_file", (str(tmp_path / "run" / "model.pt"),), {})]
    assert [name for name, *_ in wandb.calls[-2:]] == ["log_artifact", "finish"]

    train(config_of(tmp_path / "run", "num_epoch=2", "resume=True"))
    (_, _, again) = wandb.named("init")[1]
    assert (again["id"], again["resume"]) == ((tmp_path / "run" / "wandb_run_id").read_text(), "allow")
    assert again["id"] == "id2" and len(wandb.named("login")) == 1
    train(config_of(tmp_path / "run"))
    assert wandb.named("init")[2][2]["id"] is None


def test_without_wandb_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[wandb\]"):
        train(config_of(tmp_path / "run"))
