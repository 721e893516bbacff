import functools

import pytest
import torch

import insightface_kprpe as ik
from insightface_kprpe.data.augmentation import Augmentation, build_augmentation
from insightface_kprpe.losses import AdaFace, CombinedMarginLoss
from insightface_kprpe.partial_fc import PartialFC
from insightface_kprpe.training import recipes
from insightface_kprpe.training.build import margin_loss
from insightface_kprpe.training.config import ConfigError, configs_folder, load_config
from insightface_kprpe.training.state import Schedule, build_state

FILES = [path for path in sorted(configs_folder().glob("[!_]*.py")) if not path.stem.startswith("dfa_")]
NAMES = sorted({*recipes.names(), *(path.stem for path in FILES)})


@functools.cache
def backbone(network, options):
    with torch.device("meta"):
        return ik.get_model(network, **dict(options))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds(name):
    config = load_config(name)
    with torch.device("meta"):
        loss = PartialFC(margin_loss(config), config.embedding_size, config.num_classes or 10, config.sample_rate)
    options = tuple(sorted({**config.network_kwargs, "num_features": config.embedding_size}.items()))
    net = backbone(config.network, options)
    state = build_state(config, net, loss, Schedule(100, config.num_epoch), torch.device("cpu"))
    assert isinstance(build_augmentation(config.augment), Augmentation)
    decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    spared = {key for key, parameter in net.named_parameters() if decay[id(parameter)] == 0}
    for key, parameter in net.named_parameters():
        table = any(word in key for word in ("pos_embed", "lookup_table", "keypoint_linear", "mask_token"))
        assert (key in spared) == (parameter.ndim == 1 or table), key
    assert all(decay[id(parameter)] == config.weight_decay > 0 for parameter in loss.parameters())


def test_the_recipe_is_table_6():
    small, large = load_config("wf12m_vit_s_kprpe"), load_config("wf42m_vit_l_irpe")
    table = {
        "lr": (0.001, 0.0001), "num_epoch": (34, 36), "sample_rate": (1.0, 0.6), "repeated_augmentation": (0.5, 0.1),
        "weight_decay": (0.05, 0.05), "scheduler": ("cosine", "cosine"), "optimizer": ("adamw", "adamw"),
        "warmup_epoch": (3.0, 3.0), "clip_grad": (5.0, 5.0), "augment": ("paper", "paper"), "loss": ("adaface",) * 2,
        "adaface_m": (0.4, 0.4), "adaface_h": (0.333, 0.333), "network": ("vit_s_kprpe", "vit_l_irpe"),
        "num_classes": (617970, 2059906), "num_image": (12720066, 42474557),
    }  # fmt: skip
    for key, values in table.items():
        assert (small[key], large[key]) == values, key
    assert small.batch_size * 4 == 512 and large.batch_size * 8 == 1024  # on the ranks that the headers name
    assert small.network_kwargs == {"drop_path_rate": 0.1, "mask_ratio": 0.1}
    assert large.network_kwargs == {"drop_path_rate": 0.05, "mask_ratio": 0.05}


@pytest.mark.parametrize(
    ("end", "kind", "margins"),
    [("arcface", CombinedMarginLoss, (0.5, 0.0)), ("cosface", CombinedMarginLoss, (0.0, 0.4))],
)
def test_losses_by_name(end, kind, margins):
    config = load_config(f"ms1mv2_vit_b_kprpe_{end}")
    assert (config.rec, config.num_classes, config.network) == ("faces_emore", 85742, "cvlface_vit_b_kprpe")
    loss = margin_loss(config)
    assert isinstance(loss, kind) and tuple(config.margin_list[1:]) == margins
    assert isinstance(margin_loss(load_config("ms1mv2_vit_b_kprpe")), AdaFace)
    assert loss.scale == 64


@pytest.mark.parametrize("loss", ["adaface", "margin"])
def test_logits_have_the_scale_of_the_config(loss):
    config = load_config("base", [f"loss={loss}", "logit_scale=24"])
    assert margin_loss(config).scale == 24
    with pytest.raises(ConfigError, match="logit_scale must be positive and finite, got 0"):
        load_config("base", ["logit_scale=0"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_and_names_agree(path):
    if recipes.by_name(path.stem) is not None:
        assert load_config(path) == load_config(path.stem) == load_config(f"recognition_configs/{path.name}")
        assert {**load_config(path), **recipes.by_name(path.stem)} == load_config(path)
    if path.stem != "base":
        header = path.read_text().split('"""')[1]
        assert path.stem in header and "Command:" in header and "Result:" in header


def test_a_recipe_needs_no_file_and_takes_overrides():
    config = load_config("recognition_configs/wf42m_vit_b_irpe_cosface.py", ["batch_size=64", "rec=/data/42m"])
    assert (config.batch_size, config.rec, config.num_classes) == (64, "/data/42m", 2059906)
    assert config.output == "work_dirs/wf42m_vit_b_irpe_cosface"
    with pytest.raises(ConfigError, match="wf12m_vit_b_kprpe_cosface; got wf42m_vit_x"):
        load_config("wf42m_vit_x")
    with pytest.raises(ValueError, match="got 'vit_h'"):
        recipes.paper("wf4m", "vit_h")
    assert len(recipes.names()) == 5 * 3 * 3 * 3
