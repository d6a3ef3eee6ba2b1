"""Site single: one process, masked once a step as soon as a gradient is complete."""

import pytest
import timm
import torch
from torch import Tensor, nn

import gmscale
from gmscale import GradientMask
from gmscale.errors import UsageError


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10)
    )


def backward(model: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 6, 6, generator=generator)
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_two_lines_mask_every_weight_and_nothing_else():
    plain, masked = make(), make()
    mask = GradientMask(strength=1.0, error_feedback=False)
    attachment = gmscale.attach(masked, mask, site="single")
    backward(plain)
    backward(masked)
    for name, gradient in gradients(plain).items():
        expected = mask.apply(gradient) if gradient.ndim > 1 else gradient
        assert torch.equal(gradients(masked)[name], expected)
    assert [t.name for t in attachment.touched] == ["0.weight", "3.weight", "5.weight"]
    assert set(attachment.passed) == {"0.bias", "1.weight", "1.bias", "3.bias", "5.bias"}
    assert set(attachment.report().layers) == {"0.weight", "3.weight", "5.weight"}


def test_accumulated_micro_batches_are_masked_once_as_their_sum():
    plain, masked = make(), make()
    mask = GradientMask(strength=1.0, error_feedback=False)
    attachment = gmscale.attach(masked, mask, site="single")
    for step in range(3):
        backward(plain, step)
    with attachment.no_sync():
        backward(masked, 0)
        backward(masked, 1)
    backward(masked, 2)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(masked)[name], mask.apply(gradient))


def test_detached_and_strength_zero_are_the_plain_gradient():
    plain, detached, zero = make(), make(), make()
    gmscale.attach(detached, GradientMask(strength=1.0), site="single").detach()
    gmscale.attach(zero, GradientMask(strength=0.0), site="single")
    for model in (plain, detached, zero):
        backward(model)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(detached)[name], gradient)
        assert torch.equal(gradients(zero)[name], gradient)


def test_error_feedback_sends_later_what_it_holds_back():
    plain, masked = make(), make()
    attachment = gmscale.attach(masked, GradientMask(strength=1.0), site="single")
    sent = {name: torch.zeros_like(p) for name, p in masked.named_parameters()}
    received = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for step in range(4):
        for model, total in ((plain, received), (masked, sent)):
            model.zero_grad()
            model[1].reset_running_stats()
            backward(model, step)
            for name, gradient in gradients(model).items():
                total[name] += gradient
    for name, residual in attachment.state_dict()["residuals"].items():
        assert residual.abs().max() > 0
        torch.testing.assert_close(sent[name] + residual, received[name])


def test_what_is_held_back_follows_the_loss_scale():
    model = make()
    attachment = gmscale.attach(model, GradientMask(strength=1.0), site="single")
    attachment.at(0, grad_scale=4.0)
    backward(model)
    before = attachment.state_dict()["residuals"]["0.weight"].clone()
    attachment.at(1, grad_scale=2.0)
    assert torch.equal(attachment.state_dict()["residuals"]["0.weight"], before / 2)


def test_a_schedule_that_ends_sends_everything_it_held():
    model = make()
    attachment = gmscale.attach(model, GradientMask(strength=1.0, end=0.5), site="single")
    attachment.at(0, 2)
    backward(model)
    assert attachment.state_dict()["residuals"]
    attachment.at(1, 2)
    backward(model)
    assert not attachment.state_dict()["residuals"]


def test_what_is_held_survives_a_non_finite_gradient_after_the_schedules_end():
    model = make()
    attachment = gmscale.attach(model, GradientMask(strength=1.0, end=0.5), site="single")
    attachment.at(0, 4)
    backward(model)
    held = {name: r.clone() for name, r in attachment.state_dict()["residuals"].items()}
    model.zero_grad()
    attachment.at(3, 4)
    (model(torch.ones(4, 3, 6, 6)).sum() * float("inf")).backward()
    kept = attachment.state_dict()["residuals"]
    assert torch.equal(kept["5.weight"], held["5.weight"])


def test_a_mask_that_depends_on_time_asks_for_the_step():
    for mask in (GradientMask(warmup=0.1), GradientMask(operator="random")):
        model = make()
        gmscale.attach(model, mask, site="single")
        with pytest.raises(UsageError, match=r"call attachment\.at\(step"):
            backward(model)
    attachment = gmscale.attach(make(), GradientMask(warmup=0.1), site="single")
    with pytest.raises(UsageError, match="total_steps"):
        attachment.at(3)


def test_random_draws_depend_on_step_and_seed_only():
    def masked(seed: int, step: int) -> Tensor:
        model = make()
        mask = GradientMask(operator="random", strength=1.0, error_feedback=False, seed=seed)
        gmscale.attach(model, mask, site="single").at(step, 10)
        backward(model)
        return model[3].weight.grad

    assert torch.equal(masked(0, 3), masked(0, 3))
    assert not torch.equal(masked(0, 3), masked(0, 4))
    assert not torch.equal(masked(0, 3), masked(1, 3))


def test_include_and_exclude_choose_by_name():
    def touched(**settings: tuple[str, ...]) -> list[str]:
        return [t.name for t in gmscale.attach(make(), GradientMask(**settings), site="single").touched]

    assert touched(include=("3.*", "5.*")) == ["3.weight", "5.weight"]
    assert touched(exclude=("0.*",)) == ["3.weight", "5.weight"]
    with pytest.raises(UsageError, match=r"matches no parameter; did you mean '3\.weight'"):
        touched(include=("3.weigth",))
    with pytest.raises(UsageError, match=r"1-D parameters need mask\.mask_1d"):
        touched(include=("1.*",))


def test_frozen_parameters_are_not_touched():
    model = make()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter that requires a gradient"):
        gmscale.attach(model, GradientMask(), site="single")


def test_state_of_another_model_is_refused():
    attachment = gmscale.attach(make(), GradientMask(), site="single")
    with pytest.raises(UsageError, match=r"0\.weight"):
        attachment.load_state_dict({"grad_scale": 1.0, "residuals": {"0.weight": torch.zeros(2, 2)}})


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_timm_models_mask_convolution_linear_and_attention_weights(name):
    model = timm.create_model(name, num_classes=10)
    attachment = gmscale.attach(model, GradientMask(mask_1d=True), site="single")
    touched = {t.name for t in attachment.touched}
    assert not touched & {"cls_token", "pos_embed", "reg_token"}
    weights = {
        f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }  # fmt: skip
    assert weights <= touched
