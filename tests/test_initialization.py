import logging

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks
from test_trainer import TINY, tiny_config, weights

from insightface_kprpe.backbones import VisionTransformer
from insightface_kprpe.losses import AdaFace, ArcFace
from insightface_kprpe.partial_fc import PartialFC, shard_range
from insightface_kprpe.training import trainer
from insightface_kprpe.training.arcface_torch_checkpoint import find, load_centers
from insightface_kprpe.training.checkpoint import Checkpointer
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.initialization import compare, initialize
from insightface_kprpe.training.state import Schedule, build_state

CLASSES, SIZE = 7, 16
SCHEDULE = Schedule(5, 4)


def make_net(**changes):
    return VisionTransformer(**{**TINY, "drop_path_rate": 0.0, "position": None, "num_features": SIZE, **changes})


def losses_of(net, partial_fc, optimizer, steps):
    net.eval()
    values = []
    for step in steps:
        images = torch.randn(6, 3, 112, 112, generator=torch.Generator().manual_seed(step))
        loss = partial_fc(net(images), torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def write_arcface_torch(folder, ranks, optimizer="adamw"):
    """What arcface_torch's trainer would leave after epoch 2, and the losses of its next two steps."""
    torch.manual_seed(0)
    net, partial_fc = make_net(), PartialFC(ArcFace(), SIZE, CLASSES)
    groups = [{"params": net.parameters()}, {"params": partial_fc.parameters()}]
    if optimizer == "sgd":
        optim = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    else:
        optim = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    losses_of(net, partial_fc, optim, range(3))
    for rank in range(ranks):
        first, count = shard_range(CLASSES, rank, ranks)
        state = optim.state_dict()
        index = max(state["state"])
        mine = {k: v[first : first + count] if v.ndim else v for k, v in state["state"][index].items()}
        content = {
            "epoch": 2,
            "global_step": 2 * SCHEDULE.steps_per_epoch,
            "state_dict_backbone": net.state_dict(),
            "state_dict_softmax_fc": {"weight": partial_fc.class_centers.detach()[first : first + count]},
            "state_optimizer": {**state, "state": {**state["state"], index: mine}},
            "state_lr_scheduler": {"last_epoch": 10, "base_lrs": [0.01, 0.01]},
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    return losses_of(net, partial_fc, optim, range(3, 5))


def test_adafaces_checkpoints_of_arcface_torchs_scripts(tmp_path):
    """Those of this package's PartialFC, which the scripts use for AdaFace."""
    saved = PartialFC(AdaFace(), SIZE, CLASSES)
    saved.margin_loss.batch_mean.fill_(12.5)
    content = {
        "epoch": 1,
        "state_dict_backbone": {},
        "state_dict_softmax_fc": saved.state_dict(),
        "state_optimizer": {},
    }
    torch.save(content, tmp_path / "checkpoint_gpu_0.pt")
    partial_fc = PartialFC(AdaFace(), SIZE, CLASSES)
    assert load_centers(find(tmp_path), partial_fc)
    torch.testing.assert_close(dict(partial_fc.state_dict()), dict(saved.state_dict()))


def resume_on_rank(rank, folder, optimizer):
    torch.manual_seed(5 + rank)
    overrides = [f"optimizer={optimizer}", "scheduler=step", "decay_epochs=(99,)", "weight_decay=0", "warmup_epoch=0"]
    config = load_config("quickstart", [*overrides, f"lr={0.1 if optimizer == 'sgd' else 0.01}"])
    state = build_state(config, make_net(), PartialFC(ArcFace(), SIZE, CLASSES), SCHEDULE, torch.device("cpu"))
    assert Checkpointer(folder).resume(state, SCHEDULE) == 2 * SCHEDULE.steps_per_epoch
    if state.loss.world_size == 1:
        return losses_of(state.model, state.loss, state.optimizer, range(3, 5))
    images = torch.randn(6, 3, 112, 112, generator=torch.Generator().manual_seed(3))
    share = slice(6 // state.loss.world_size * rank, 6 // state.loss.world_size * (rank + 1))
    with torch.no_grad():
        loss = state.loss(state.model.eval()(images[share]), torch.arange(6)[share])
    moment = state.tensors()[f"optimizer.loss.class_centers.{'momentum_buffer' if optimizer == 'sgd' else 'exp_avg'}"]
    assert moment.shape == state.loss.class_centers.shape
    return [loss.item()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_of_arcface_torch_goes_on(tmp_path, optimizer):
    expected = write_arcface_torch(tmp_path, 3, optimizer)
    torch.testing.assert_close(resume_on_rank(0, tmp_path, optimizer), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_run_of_arcface_torch_goes_on_with_other_ranks(tmp_path):
    expected = write_arcface_torch(tmp_path, 3)
    for losses in run_on_ranks(resume_on_rank, 2, str(tmp_path), "adamw"):
        torch.testing.assert_close(losses[0], expected[0], atol=1e-4, rtol=1e-4)


def test_arcface_torch_files_that_cannot_be_used(tmp_path):
    write_arcface_torch(tmp_path, 3)
    with pytest.raises(ValueError, match='was not written with optimizer SGD; set optimizer to "sgd" or "adamw"'):
        resume_on_rank(0, tmp_path, "sgd")
    content = (tmp_path / "checkpoint_gpu_1.pt").read_bytes()
    (tmp_path / "checkpoint_gpu_1.pt").write_bytes(content[:1000])
    with pytest.raises(ValueError, match="checkpoint_gpu_1.pt could not be read as a checkpoint of arcface_torch"):
        resume_on_rank(0, tmp_path, "adamw")
    (tmp_path / "checkpoint_gpu_1.pt").unlink()
    with pytest.raises(ValueError, match="but no checkpoint_gpu_1.pt; copy those of all ranks"):
        resume_on_rank(0, tmp_path, "adamw")


def test_fine_tuning_takes_over_what_fits(tmp_path, caplog):
    torch.manual_seed(0)
    source, net = make_net(), make_net(position="kprpe")
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    state["module.feature.3.bias"] = torch.zeros(3)
    state["module.head.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "model.pt")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="insightface_kprpe"):
        match = initialize(net, PartialFC(ArcFace(), SIZE, CLASSES), tmp_path / "model.pt", 0.8)
    assert match.missing == ["keypoint_linear.weight", "keypoint_linear.bias"]
    assert match.mismatched == ["feature.3.bias (3,) instead of (16,)"] and match.unused == ["head.weight"]
    assert f"{len(match.matched)} of {len(before)} tensors match; 2 missing: keypoint_linear.weight" in caplog.text
    for key, value in net.state_dict().items():
        assert torch.equal(value, source.state_dict()[key] if key in match.matched else before[key]), key


def test_too_little_in_common_is_refused(tmp_path):
    torch.save(make_net(embed_dim=64).state_dict(), tmp_path / "model.pt")
    net = make_net()
    before = net.pos_embed.clone()
    with pytest.raises(
        ValueError, match=r"init_from must fit at least 90% .* fits \d+% .*mismatched: .*init_min_match"
    ):
        initialize(net, PartialFC(ArcFace(), SIZE, CLASSES), tmp_path)
    assert torch.equal(net.pos_embed, before)
    with pytest.raises(FileNotFoundError, match="weights not found"):
        initialize(net, PartialFC(ArcFace(), SIZE, CLASSES), tmp_path / "no.pt")


def test_weights_of_a_run_that_diverged_are_refused(tmp_path):
    net = make_net()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state["pos_embed"][0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"init_from .*model\.pt holds values that are not finite .*pos_embed"):
        initialize(net, PartialFC(ArcFace(), SIZE, CLASSES), tmp_path / "model.pt")
    assert torch.isfinite(net.pos_embed).all()


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("epoch", "two", "epoch must be a whole number from 0, got 'two'"),
        ("state_dict_backbone", {"weight": 3}, "state_dict_backbone and state_dict_softmax_fc must hold tensors"),
        ("state_dict_softmax_fc", {"other": torch.zeros(2, 2)}, "must hold tensors, with class centers"),
        ("state_optimizer", {"state": [1]}, "state_optimizer must hold the moments of each parameter"),
        ("state_dict_backbone", {"w": torch.zeros(1).expand(10**11)}, "w must be a plain tensor"),
    ],
)
def test_entries_of_arcface_torchs_checkpoints_are_checked(tmp_path, entry, value, message):
    content = {
        "epoch": 1, "state_dict_backbone": make_net().state_dict(),
        "state_dict_softmax_fc": {"weight": torch.zeros(CLASSES, SIZE)}, "state_optimizer": {"state": {}},
    }  # fmt: skip
    torch.save(content | {entry: value}, tmp_path / "checkpoint_gpu_0.pt")
    with pytest.raises(ValueError, match=rf"checkpoint_gpu_0\.pt: .*{message}"):
        initialize(make_net(), PartialFC(ArcFace(), SIZE, CLASSES), tmp_path)


def test_an_aligner_that_the_file_lacks_does_not_count():
    class Aligned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dfa, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    net = Aligned()
    match = compare(net, {"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)})
    assert match.fraction == 1 and not match.missing
    assert compare(net, net.state_dict()).fraction == 1
    assert compare(net, {"head.weight": torch.zeros(2, 2), "dfa.weight": torch.zeros(2, 2)}).fraction == 0.5


def test_fine_tuning_starts_with_the_class_centers_of_the_same_people(tmp_path):
    write_arcface_torch(tmp_path, 3)
    centers = [
        torch.load(tmp_path / f"checkpoint_gpu_{rank}.pt")["state_dict_softmax_fc"]["weight"] for rank in range(3)
    ]
    same, others = PartialFC(ArcFace(), SIZE, CLASSES), PartialFC(ArcFace(), SIZE, CLASSES + 1)
    before = others.class_centers.clone()
    for partial_fc in (same, others):
        initialize(make_net(), partial_fc, tmp_path)
    assert torch.equal(same.class_centers, torch.cat(centers)) and torch.equal(others.class_centers, before)


def start_from_run(rank, folder, classes):
    torch.manual_seed(rank)
    partial_fc = PartialFC(AdaFace(), SIZE, classes)
    before = partial_fc.class_centers.detach().clone()
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    initialize(make_net(), partial_fc, folder, group=group)
    return {"centers": partial_fc.class_centers.detach(), "before": before, **dict(partial_fc.named_buffers())}


def write_run(folder):
    """A run's folder with one checkpoint; returns its PartialFC."""
    torch.manual_seed(7)
    state = build_state(
        load_config("quickstart"), make_net(), PartialFC(AdaFace(), SIZE, CLASSES), SCHEDULE, torch.device("cpu")
    )
    state.loss.margin_loss.batch_mean.fill_(12.5)
    Checkpointer(folder).save(3, state, SCHEDULE)
    return state.loss


def test_fine_tuning_starts_with_the_class_centers_of_a_run(tmp_path, caplog):
    saved = write_run(tmp_path)
    with caplog.at_level(logging.INFO):
        same, others = start_from_run(0, tmp_path, CLASSES), start_from_run(0, tmp_path, CLASSES + 1)
    assert torch.equal(same["centers"], saved.class_centers) and same["margin_loss.batch_mean"] == 12.5
    assert torch.equal(others["centers"], others["before"]) and others["margin_loss.batch_mean"] != 12.5
    assert "its 7 class centers are used too" in caplog.text and "are of other people" in caplog.text


@pytest.mark.slow
def test_ranks_start_with_their_class_centers_of_a_run(tmp_path):
    saved = write_run(tmp_path)
    started = run_on_ranks(start_from_run, 2, tmp_path, CLASSES)
    assert [len(part["centers"]) for part in started] == [4, 3]
    assert torch.equal(torch.cat([part["centers"] for part in started]), saved.class_centers)
    assert all(part["margin_loss.batch_mean"] == 12.5 for part in started)


def test_the_trainer_starts_from_and_writes_plain_state_dicts(tmp_path):
    first = ["num_epoch=1", "network=vit_n", "num_image=16"]
    trainer.train(tiny_config(tmp_path / "first", *first))
    state = torch.load(tmp_path / "first" / "model.pt", weights_only=True)
    assert type(state) is dict or type(state).__name__ == "OrderedDict"
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in state.values())
    second = [f"init_from={tmp_path / 'first'}", "lr=1e-12", "weight_decay=0"]
    trainer.train(tiny_config(tmp_path / "second", *first, *second))
    for key, value in weights(tmp_path / "second").items():
        if value.is_floating_point() and "running" not in key:
            torch.testing.assert_close(value, state[key], atol=1e-6, rtol=1e-6)
