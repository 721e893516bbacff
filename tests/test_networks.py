import itertools

import pytest
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.app import networks


def test_a_row_says_family_size_cost_and_publisher():
    facts = networks.describe_network("ir_18")
    assert (facts.family, facts.parameters, facts.weights) == ("IResNet, BGR", 24_020_352, "AdaFace (for BGR)")
    # By hand, convolutions and the last layer alone: 43.4 + 1618.5 + 3 x 1168.8 + 25.7 million.
    assert facts.flops / 1e9 == pytest.approx(5.194, rel=1e-3)
    assert networks.describe_network("vit_n_kprpe").family == "ViT, KPRPE"
    assert networks.describe_network("mbf").family == "MobileFaceNet"
    assert networks.describe_network("r50").flops / 2e9 == pytest.approx(6.3, abs=0.05)  # arcface_torch's README


def test_speed_is_of_the_median_batch(monkeypatch):
    ticks = itertools.accumulate(itertools.cycle([0.0, 9.0, 0.0, 2.0, 0.0, 4.0, 0.0, 4.0, 0.0, 4.0, 0.0, 80.0]))
    assert networks.images_per_second("vit_n", batch_size=2, clock=lambda: next(ticks)) == 0.5


def test_names_and_patterns():
    assert networks.choose_networks(["r?8", "mbf"]) == ["mbf", "r18"]
    result = CliRunner().invoke(cli.app, ["models", "vit_n*", "--speed"], catch_exceptions=False)
    header, *rows = result.output.splitlines()
    assert "images/s" in header and [row.split()[0] for row in rows] == [
        "vit_n", "vit_n_irpe", "vit_n_kprpe", "vit_n_kprpe_dfa",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="got 'r5'; did you mean r50"):
        networks.choose_networks(["r5"])
