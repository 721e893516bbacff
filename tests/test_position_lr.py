"""Position tables that learn at their own pace, and what is told of a network that ignores its keypoints."""

from __future__ import annotations

import json

import pytest
import torch
from test_trainer import TINY, stop_after, tiny_config, weights

from insightface_kprpe.backbones import get_model
from insightface_kprpe.backbones.attention_terms import attention_terms
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS
from insightface_kprpe.losses import ArcFace
from insightface_kprpe.partial_fc import PartialFC
from insightface_kprpe.training import keypoint_watch, trainer
from insightface_kprpe.training.config import ConfigError, load_config
from insightface_kprpe.training.keypoint_watch import KeypointWatch, keypoint_use
from insightface_kprpe.training.plan import format_plan, plan_training
from insightface_kprpe.training.state import Schedule, build_state

EVEN = {**TINY, "drop_path_rate": 0.0, "mask_ratio": 0.0}


def make_state(network, *overrides):
    config = load_config("quickstart", [f"network={network}", "lr=0.01", "warmup_epoch=1", "num_epoch=3", *overrides])
    net = get_model(network, num_features=8, **EVEN)
    return net, build_state(config, net, PartialFC(ArcFace(), 8, 5), Schedule(4, 3), torch.device("cpu"))


def faces(count=4):
    generator = torch.Generator().manual_seed(0)
    keypoints = torch.tensor(CANONICAL_KEYPOINTS) + 0.1 * torch.randn(count, 5, 2, generator=generator)
    return torch.rand(count, 3, 112, 112, generator=generator) * 2 - 1, keypoints


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("network", ["vit_n_kprpe", "vit_n_irpe"])
def test_tables_are_a_group_with_a_rate_of_its_own(network, optimizer):
    net, state = make_state(network, "position_lr_scale=30", f"optimizer={optimizer}", "weight_decay=0.1")
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    (group,) = (g for g in state.optimizer.param_groups if names.get(id(g["params"][0])) in net.position_tables())
    assert {names[id(parameter)] for parameter in group["params"]} == net.position_tables()
    assert group["weight_decay"] == 0 and group["initial_lr"] == pytest.approx(0.3)
    assert all(g["initial_lr"] == 0.01 for g in state.optimizer.param_groups if g is not group)


def test_a_plain_network_has_no_such_group():
    _, state = make_state("vit_n", "position_lr_scale=30")
    assert {group["initial_lr"] for group in state.optimizer.param_groups} == {0.01}


def test_rates_keep_their_ratio_through_warm_up_and_schedule():
    net, state = make_state("vit_n_kprpe", "position_lr_scale=7")
    table = next(i for i, g in enumerate(state.optimizer.param_groups) if g["initial_lr"] != 0.01)
    rates = []
    for _ in range(12):
        rate = [group["lr"] for group in state.optimizer.param_groups]
        assert rate[table] == pytest.approx(7 * rate[0])
        rates.append(rate[0])
        state.optimizer.step()
        state.scheduler.step()
    assert rates[0] == pytest.approx(0.01 / 4) and max(rates) == pytest.approx(0.01) and rates[-1] < 0.001
    state.go_to(2)
    assert state.optimizer.param_groups[table]["lr"] == pytest.approx(7 * 0.01 * 3 / 4)


def test_the_first_step_of_adamw_moves_tables_by_the_scaled_rate():
    net, state = make_state("vit_n_kprpe", "position_lr_scale=30", "warmup_epoch=0")
    net(*faces()).square().sum().backward()
    qkv = net.blocks[0].attn.qkv.weight
    before = qkv.detach().clone()
    state.optimizer.step()
    assert net.keypoint_linear.weight.abs().max().item() == pytest.approx(0.3, rel=1e-3)
    assert (qkv - before).abs().max().item() == pytest.approx(0.01, rel=0.1)


def test_an_interrupted_run_keeps_the_rate(tmp_path, monkeypatch):
    scale = "position_lr_scale=20"
    trainer.train(tiny_config(tmp_path / "whole", scale))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 5)
        trainer.train(tiny_config(tmp_path / "parts", scale))
    trainer.train(tiny_config(tmp_path / "parts", scale, "resume=True"))
    expected, slow = weights(tmp_path / "whole"), tmp_path / "slow"
    for key, value in weights(tmp_path / "parts").items():
        assert torch.equal(value, expected[key]), key
    trainer.train(tiny_config(slow, "position_lr_scale=1"))
    grown = [weights(folder)["keypoint_linear.weight"].abs().mean() for folder in (tmp_path / "whole", slow)]
    assert grown[0] > 10 * grown[1] > 0


def test_the_key_is_checked():
    assert load_config("wf4m_vit_l_kprpe").position_lr_scale == 1  # as published
    with pytest.raises(ConfigError, match="position_lr_scale must be positive"):
        load_config("quickstart", ["position_lr_scale=0"])


def test_the_plan_tells_the_rate():
    changes = ["num_classes=10", "num_image=320", "lr=0.001", "position_lr_scale=30", "network_kwargs={}"]
    plan = plan_training(load_config("quickstart", changes))
    assert plan.table_parameters == 6 * 4 * 49 * 11
    assert "0.0M of these parameters, at a learning rate of up to 0.03: position_lr_scale is 30" in format_plan(plan)
    assert "position tables" not in format_plan(plan_training(load_config("quickstart", ["network=vit_n", *changes])))


def test_attention_terms_are_those_of_the_network():
    net = get_model("vit_n_kprpe", num_features=8, **{**EVEN, "depth": 2})
    torch.nn.init.normal_(net.keypoint_linear.weight)
    images, keypoints = faces()
    seen = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **kwargs):
        seen.append(q @ k.mT * q.shape[-1] ** -0.5 + attn_mask)
        return inner(q, k, v, attn_mask=attn_mask, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        net.eval()(images, keypoints)
    terms = list(attention_terms(net.train(), images, keypoints))
    assert net.training and len(terms) == 2
    for logits, term in zip(seen, terms, strict=True):
        torch.testing.assert_close(term.similarity + term.bias, logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="irpe"):
        next(attention_terms(get_model("vit_n_irpe", **EVEN), images))


def test_use_of_keypoints():
    net = get_model("vit_n_kprpe", num_features=8, **EVEN)
    images, keypoints = faces()
    state = torch.get_rng_state()
    assert keypoint_use(net, images, keypoints) == {"keypoints/attention_share": 0, "keypoints/template_shift": 0}
    with torch.no_grad():
        net.keypoint_linear.weight.normal_(generator=torch.Generator().manual_seed(1))
        net.keypoint_linear.bias.fill_(5)  # the same for all keys: attention does not see it
    before = {key: value.clone() for key, value in net.state_dict().items()}
    use = keypoint_use(net, images, keypoints)
    assert 0.5 < use["keypoints/attention_share"] < 1 and 0 < use["keypoints/template_shift"] < 2
    template = torch.tensor(CANONICAL_KEYPOINTS).expand(4, -1, -1)
    assert keypoint_use(net, images, template)["keypoints/template_shift"] == 0
    assert torch.equal(torch.get_rng_state(), state) and net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_one_warning_where_keypoints_are_ignored(tmp_path, caplog):
    net = get_model("vit_n_kprpe", num_features=8, **EVEN)
    watch = KeypointWatch(net)
    assert watch.values() == {}
    watch.warn_if_ignored()
    assert not caplog.records
    watch(*faces())
    watch.values()
    watch.warn_if_ignored()
    (record,) = caplog.records
    assert "ignores its keypoints" in record.message and "position_lr_scale" in record.message
    caplog.clear()
    watch.shift = 0.06
    watch.warn_if_ignored()
    assert not caplog.records


@pytest.mark.parametrize("ignored", [True, False])
def test_a_run_logs_and_warns(tmp_path, monkeypatch, caplog, ignored):
    if not ignored:
        monkeypatch.setattr(keypoint_watch, "LEAST_SHIFT", 1e-6)
    trainer.train(tiny_config(tmp_path, "augment={'rotation': 40.0, 'translation': 0.2}"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (use,) = (row for row in rows if "keypoints/template_shift" in row)
    assert use["step"] == 16 and 1e-6 < use["keypoints/template_shift"] < 0.05
    assert 0 < use["keypoints/attention_share"] < 1
    assert (caplog.text.count("ignores its keypoints") == 1) == ignored
