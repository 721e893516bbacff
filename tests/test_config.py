import ast
import json
import re
from pathlib import Path

import pytest

from insightface_kprpe.training.config import _RANGES, ConfigError, configs_folder, dump_config, load_config

ARCFACE_TORCH_STYLE = """
from easydict import EasyDict as edict

config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "vit_t_dp005_mask0"
config.resume = False
config.output = None
config.embedding_size = 512
config.sample_rate = 1
config.fp16 = True
config.weight_decay = 0.1
config.batch_size = 512
config.optimizer = "adamw"
config.lr = 0.001
config.verbose = 2000
config.dali = False
config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 40
config.warmup_epoch = config.num_epoch // 10
config.val_targets = ["lfw", "agedb_30"]
"""


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "my_run.py"
        path.write_text("from easydict import EasyDict as edict\nconfig = edict()\n" + text)
        return path

    return write


def test_a_config_in_arcface_torchs_style_works_unchanged(tmp_path):
    path = tmp_path / "wf42m.py"
    path.write_text(ARCFACE_TORCH_STYLE)
    config = load_config(path)
    assert config.output == str(Path("work_dirs") / "wf42m")
    assert config.precision == "fp16" and config.loss == "margin"
    assert config.warmup_epoch == 4.0 and isinstance(config.sample_rate, float)
    assert config.val_targets == ("lfw", "agedb_30")
    assert config.clip_grad == 5.0  # from base.py


def test_momentum_without_optimizer_means_sgd_as_in_arcface_torch(config_file):
    assert load_config(config_file("config.momentum = 0.9")).optimizer == "sgd"
    assert load_config(config_file('config.momentum = 0.9\nconfig.optimizer = "adamw"')).optimizer == "adamw"
    assert load_config(config_file("config.lr = 0.1")).optimizer == "adamw"


def test_a_path_that_does_not_exist_is_never_another_config():
    for path in ("/home/me/wf4m_vit_s_kprpe.py", "configs/quickstart.py", "mine/wf4m_vit_s_kprpe"):
        with pytest.raises(ConfigError, match="which does not exist"):
            load_config(path)
    assert load_config("recognition_configs/wf4m_vit_s_kprpe.py").network == "vit_s_kprpe"


def test_a_recipes_augmentation_can_be_replaced_by_settings():
    assert load_config("wf4m_vit_s_kprpe", ["augment={}"]).augment == {}
    assert load_config("wf4m_vit_s_kprpe", ["augment={'rotation': 10.0}"]).augment == {"rotation": 10.0}


def test_overrides_win_and_take_the_type_of_the_default(config_file):
    config = load_config(
        config_file("config.lr = 0.1"),
        ["lr=1", "rec=/data/a b", "val_targets=('lfw',)", "resume=True", "network_kwargs={'num_keypoints': 3}"],
    )
    assert config.lr == 1.0 and isinstance(config.lr, float)
    assert (config.rec, config.val_targets, config.resume) == ("/data/a b", ("lfw",), True)
    assert config.network_kwargs == {"num_keypoints": 3}
    assert load_config(config_file(""), ["val_targets=lfw"]).val_targets == ("lfw",)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("config.learning_rte = 1", [], "unknown config key 'learning_rte'"),
        ("config.bach_size = 1", [], "did you mean batch_size"),
        ("config.batch_size = 1.5", [], "batch_size must be int"),
        ("config.resume = 1", [], "resume must be bool"),
        ("config.rec = 3", [], "rec must be str"),
        ("", ["lr"], "must be key=value"),
        ("", ["optimizer=lamb"], "optimizer must be one of"),
        ("", ["precision=int8"], "precision must be one of"),
        ("", ["sample_rate=0"], "sample_rate"),
        ("", ["gradient_acc=0"], "gradient_acc must be positive"),
        ("", ["scheduler=step"], "decay_epochs"),
        ("1 / 0", [], "ZeroDivisionError"),
        ("del config", [], "must define `config = edict\\(\\)`, with strings as keys; got None"),
        ("config = 3", [], "must define `config = edict.*got 3"),
        ("config = ['lr']", [], r"must define `config = edict.*got \['lr'\]"),
        ("config = {3: 4}", [], "with strings as keys; got {3: 4}"),
    ],
)
def test_mistakes_are_named(config_file, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file(text), overrides)


OUT_OF_RANGE = {
    "-1": "num_classes num_image num_workers save_every seed weight_decay momentum repeated_augmentation adaface_m "
    "adaface_t_alpha max_bad_images init_min_match interclass_filtering_threshold",
    "0": "batch_size gradient_acc num_epoch frequent verbose keep_checkpoints embedding_size lr clip_grad sample_rate "
    "position_lr_scale adaface_h",
    "2.0": "sample_rate momentum repeated_augmentation adaface_m max_bad_images init_min_match adaface_t_alpha",
    "1e999": "warmup_epoch lr weight_decay clip_grad adaface_m adaface_h adaface_t_alpha position_lr_scale momentum",
    "-2": "warmup_epoch",
    "1.0": "momentum repeated_augmentation",
    str(2**32): "seed",
}


@pytest.mark.parametrize(
    ("value", "key"), [(value, key) for value, keys in OUT_OF_RANGE.items() for key in keys.split()]
)
def test_every_number_has_a_range(value, key):
    with pytest.raises(
        ConfigError, match=f"^command line: {key} must be .*, got {re.escape(str(ast.literal_eval(value)))}"
    ):
        load_config("base", [f"{key}={value}"])


def test_numbers_in_a_file_may_not_be_nan(config_file):
    for key in ("adaface_m", "lr", "warmup_epoch", "clip_grad", "sample_rate"):
        with pytest.raises(ConfigError, match=f"{key} must be .*, got nan"):
            load_config(config_file(f'config.{key} = float("nan")'))


def test_every_number_of_the_bases_is_checked():
    for base in ("base", "dfa_base"):
        config = load_config("quickstart" if base == "base" else "dfa_small", base=base)
        numbers = {key for key, value in config.items() if type(value) in (int, float)}
        assert numbers <= _RANGES.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("margin_list=(1,2)", "margin_list must be three numbers"),
        ("margin_list=('a',0,0)", "margin_list must hold numbers"),
        ("margin_list=(1.0,1e999,0.0)", "margin_list must hold finite numbers"),
        ("decay_epochs=(3,0)", "decay_epochs must be positive"),
        ("val_targets=(1,)", "val_targets must be names or paths"),
        ("network_kwargs=[1]", r"network_kwargs must be dict, got list \[1\]"),
        ("network_kwargs={'drop_path_rate': 1e999}", "network_kwargs must hold finite numbers"),
        ("network_kwargs={1: 2}", "network_kwargs must have strings as keys"),
        ("augment={'rotation': 'a'}", "augment must hold numbers"),
        ("rec=''", "rec must not be empty"),
        ("output=''", "output must not be empty"),
    ],
)
def test_values_that_are_no_single_number_are_checked_too(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("base", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must hold an object, got list"), ("3", "got int"), ("{", "as JSON"), ("[" * 99999, "too deeply")],
)
def test_a_config_json_that_is_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json .*{message}"):
        load_config(tmp_path / "config.json")


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(ConfigError, match=f"got the folder {tmp_path}; a run's is {tmp_path}/config.json"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="File name too long"):
        load_config("a" * 5000)


def test_a_missing_file_lists_the_shipped_configs():
    with pytest.raises(ConfigError, match="quickstart"):
        load_config("no_such_config.py")


def test_the_dumped_config_gives_the_same_run(config_file, tmp_path):
    config = load_config(config_file("config.lr = 0.5"), ["margin_list=(1.0,0.0,0.35)"])
    dump_config(config, tmp_path / "out" / "config.json")
    assert load_config(tmp_path / "out" / "config.json") == config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lr"] == 0.5


RECOGNITION = [path for path in sorted(configs_folder().glob("[!_]*.py")) if not path.stem.startswith("dfa_")]


@pytest.mark.parametrize("path", RECOGNITION, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_its_network_exists(path):
    import torch

    import insightface_kprpe as ik

    config = load_config(path)
    assert load_config(path.stem).lr == config.lr  # by name too
    with torch.device("meta"):
        ik.get_model(config.network, num_features=config.embedding_size, **config.network_kwargs)
    header = path.read_text().split('"""')[1]
    if path.stem != "base":
        assert "Command:" in header and "Result:" in header
