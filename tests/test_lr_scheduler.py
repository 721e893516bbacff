import pytest
import torch

from insightface_kprpe.training.lr_scheduler import build_scheduler, lr_factor


def test_warm_up_then_cosine_to_zero():
    factor = lr_factor("cosine", total_steps=110, warmup_steps=10)
    assert factor(0) == pytest.approx(0.1) and factor(9) == factor(10) == 1.0
    assert factor(60) == pytest.approx(0.5) and factor(110) == pytest.approx(0)


def test_polynomial_is_linear():
    factor = lr_factor("polynomial", total_steps=100)
    assert [factor(step) for step in (0, 25, 100, 200)] == [1.0, 0.75, 0.0, 0.0]


def test_steps_divide_by_ten():
    factor = lr_factor("step", total_steps=100, decay_steps=[30, 60])
    assert [factor(step) for step in (29, 30, 60)] == pytest.approx([1.0, 0.1, 0.01])


def test_unknown_scheduler():
    with pytest.raises(ValueError, match="scheduler must be one of"):
        lr_factor("exponential", 10)


def test_the_torch_scheduler_resumes_where_it_was():
    def make():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        return optimizer, build_scheduler(optimizer, "cosine", 20, 4)

    optimizer, scheduler = make()
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.5) and rates[4] == pytest.approx(2.0)
    other_optimizer, other = make()
    other.load_state_dict(scheduler.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
