"""The settings of GradientMask: what is refused, what warns, and that a mask is a plain frozen value."""

import dataclasses
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from gmscale.errors import UsageError
from gmscale.masking import GradientMask, inhibition


def wavy(rows: int = 9, cols: int = 12) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# -- refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("operator", "lgo", {}),
        ("operator", None, {}),
        ("strength", -0.1, {}),
        ("strength", 1.01, {}),
        ("strength", float("nan"), {}),
        ("strength", "half", {}),
        ("gate", "hrad", {}),
        ("kappa", 0.0, {}),
        ("kappa", -1.0, {}),
        ("kappa", float("nan"), {}),
        ("kappa", float("inf"), {}),
        ("sigma", 0.0, {"operator": "log"}),
        ("sigma", -1.0, {"operator": "dog"}),
        ("sigma", float("nan"), {"operator": "log"}),
        ("sigma", float("inf"), {"operator": "log"}),
        ("sigma", "wide", {"operator": "log"}),
        ("ratio", 1.0, {"operator": "dog"}),
        ("ratio", 0.5, {"operator": "dog"}),
        ("ratio", float("nan"), {"operator": "dog"}),
        ("ratio", float("inf"), {"operator": "dog"}),
        ("kernel_size", 0, {"operator": "log"}),
        ("kernel_size", -7, {"operator": "log"}),
        ("kernel_size", 8, {"operator": "log"}),
        ("kernel_size", 8, {"operator": "dog"}),
        ("kernel_size", 4, {"operator": "licnn"}),
        ("kernel_size", 7.5, {"operator": "log"}),
        ("licnn_a", float("nan"), {"operator": "licnn"}),
        ("licnn_a", float("inf"), {"operator": "licnn"}),
        ("licnn_b", -1.0, {"operator": "licnn"}),
        ("random_like", "random", {"operator": "random"}),
        ("random_like", "pol", {"operator": "random"}),
        ("norm", "l3", {}),
        ("block", 0, {}),
        ("block", -16, {}),
        ("block", 2.5, {}),
        ("error_feedback", "no", {}),
        ("rescale", True, {"error_feedback": True}),
        ("include", "conv*", {}),
        ("exclude", "head", {}),
    ],
)
def test_bad_value_names_the_field(field: str, value: Any, others: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"\b{field}\b") as caught:
        GradientMask(**{field: value}, **others)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [("operator", "lgo", "log"), ("operator", "pol", "pool"), ("gate", "hrad", "hard"), ("norm", "L2", "l2")],
)
def test_bad_choice_names_the_nearest(field: str, value: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        GradientMask(**{field: value})


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [("strenght", "strength"), ("kernelsize", "kernel_size"), ("error_feedbak", "error_feedback")],
)
def test_unknown_keyword_names_the_nearest(unknown: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"{unknown}.*did you mean '{meant}'"):
        GradientMask(**{unknown: 1})


@pytest.mark.parametrize(("operator", "sigma", "size"), [("log", 1.0, 3), ("log", 3.0, 7), ("dog", 2.0, 3)])
def test_kernel_without_negative_lobe_is_refused(operator: str, sigma: float, size: int) -> None:
    with pytest.raises(UsageError, match="kernel_size") as caught:
        GradientMask(operator=operator, sigma=sigma, kernel_size=size)
    assert "sigma" in str(caught.value)
    build = inhibition.log_kernel if operator == "log" else inhibition.dog_kernel
    with pytest.raises(UsageError, match="kernel_size"):
        build(sigma, kernel_size=size)


def test_a_sigma_whose_kernel_no_map_can_use_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(UsageError, match="sigma"):
        GradientMask(operator="log", sigma=1e5)


def test_rescale_without_error_feedback_is_accepted() -> None:
    assert GradientMask(rescale=True, error_feedback=False).rescale


# -- warned ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value", "operator"),
    [
        ("sigma", 2.0, "pool"),
        ("sigma", 1.0, "licnn"),
        ("kappa", 0.7, "log"),
        ("gate", "soft", "dog"),
        ("ratio", 2.0, "log"),
        ("kernel_size", 7, "pool"),
        ("licnn_a", 0.2, "dog"),
        ("licnn_b", 0.2, "pool"),
        ("random_like", "log", "pool"),
        ("sigma", 2.0, "random"),
    ],
)
def test_setting_that_the_operator_ignores_warns(field: str, value: Any, operator: str) -> None:
    with pytest.warns(UserWarning, match=field) as caught:
        GradientMask(operator=operator, **{field: value})
    assert caught[0].filename == __file__, "the warning points at the caller"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate": "soft", "kappa": 0.5},
        {"operator": "log", "sigma": 0.7, "kernel_size": 9},
        {"operator": "dog", "sigma": 0.7, "ratio": 2.0, "kernel_size": 9},
        {"operator": "licnn", "kernel_size": 5, "licnn_a": 0.2, "licnn_b": 0.5},
        {"operator": "random", "random_like": "log", "sigma": 2.0},
        {"operator": "random", "kappa": 0.7},
    ],
    ids=str,
)
def test_settings_that_are_read_do_not_warn(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = GradientMask(**settings)
        assert dataclasses.replace(mask, strength=0.25).strength == 0.25
        assert pickle.loads(pickle.dumps(mask)) == mask


# -- the authors' kernel ----------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [3, 5, 7, 9, 11])
def test_paper_kernel_is_that_of_scipy(sigma: int) -> None:
    impulse = np.zeros((5, 5))
    impulse[2, 2] = 1
    expected = -ndimage.gaussian_laplace(impulse, sigma)
    expected /= np.abs(expected).sum()
    np.testing.assert_allclose(inhibition.paper_kernel(sigma).numpy(), expected, rtol=1e-8, atol=1e-14)
    with pytest.warns(UserWarning, match="paper_compat"):
        GradientMask(operator="log", sigma=sigma, paper_compat=True)


@pytest.mark.parametrize("sigma", [None, 5, 11])
def test_paper_kernel_of_large_sigma_keeps_everything(sigma: float | None) -> None:
    with pytest.warns(UserWarning, match="paper_compat"):
        mask = GradientMask(operator="log", sigma=sigma, paper_compat=True)
    assert (mask.keep_map(wavy()) == 1).all()


def test_paper_kernel_of_sigma_3_does_not() -> None:
    with pytest.warns(UserWarning, match="paper_compat"):
        mask = GradientMask(operator="log", sigma=3, paper_compat=True)
    s = torch.zeros(9, 9, dtype=torch.float64)
    s[4, 4] = 1
    assert (mask.keep_map(s) == 0).any()


def test_paper_compat_of_another_operator_warns() -> None:
    with pytest.warns(UserWarning, match="paper_compat"):
        GradientMask(operator="dog", paper_compat=True)


# -- defaults and identity ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("plain", "spelled"),
    [
        ({}, {"operator": "pool", "gate": "hard", "kappa": 1.0}),
        ({"gate": "soft"}, {"gate": "soft", "kappa": 0.5}),
        ({"operator": "log"}, {"operator": "log", "sigma": 1.0, "kernel_size": 7}),
        ({"operator": "dog"}, {"operator": "dog", "sigma": 1.0, "ratio": 1.6, "kernel_size": 11}),
        ({"operator": "licnn"}, {"operator": "licnn", "kernel_size": 7, "licnn_a": 0.1, "licnn_b": 0.9}),
    ],
    ids=str,
)
def test_unset_means_the_documented_default(plain: dict[str, Any], spelled: dict[str, Any]) -> None:
    s = wavy(20, 20)
    assert torch.equal(GradientMask(**plain).keep_map(s), GradientMask(**spelled).keep_map(s))


def test_frozen_hashable_equal_and_keyword_only() -> None:
    mask = GradientMask(operator="log", sigma=0.7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.strength = 0.1  # type: ignore[misc]
    assert mask == GradientMask(operator="log", sigma=0.7)
    assert hash(mask) == hash(GradientMask(operator="log", sigma=0.7))
    with pytest.raises(TypeError):
        GradientMask("log")  # type: ignore[misc]


def test_replace_checks_again() -> None:
    mask = GradientMask(operator="log", sigma=0.7)
    assert dataclasses.replace(mask, sigma=0.5) == GradientMask(operator="log", sigma=0.5)
    with pytest.raises(UsageError, match="strength"):
        dataclasses.replace(mask, strength=2.0)
    with pytest.warns(UserWarning, match="sigma"):
        dataclasses.replace(mask, operator="pool")


def test_pickle_survives_a_warning_setting_silently() -> None:
    with pytest.warns(UserWarning, match="paper_compat"):
        mask = GradientMask(operator="log", sigma=3, paper_compat=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = pickle.loads(pickle.dumps(mask))
    assert copy == mask
    assert torch.equal(copy.keep_map(wavy()), mask.keep_map(wavy()))
