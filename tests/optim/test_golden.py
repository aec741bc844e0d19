"""The trajectories of the official implementations, to 1e-10."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steppe.optim import create

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no shared/golden beside the repository")

# file -> registry key, and the file's hyper-parameters in our names
CASES = {
    "sam_sgd": ("sam", lambda h: {"rho": h["rho"]}),
    "sam-adaptive_sgd": ("sam", lambda h: {"rho": h["rho"], "adaptive": True}),
    "sam-groups_sgd": ("sam", lambda h: {}),
    "asam_sgd": ("asam", lambda h: {"rho": h["rho"], "eta": h["eta"]}),
    "gsam_sgd": ("gsam", lambda h: {"rho": h["rho_t"][0], "alpha": h["alpha"]}),
    "gsam-linrho_sgd": ("gsam", lambda h: {"rho": h["rho_t"][0], "alpha": h["alpha"]}),
    "gam_sgd": (
        "gam",
        lambda h: {
            "rho": h["grad_norm_rho"],
            "rho_prime": h["grad_rho"],
            "alpha": h["grad_beta_1"],
            "beta": h["grad_beta_0"],
            "gamma": h["grad_gamma"],
        },
    ),
    "gam-paper_sgd": ("gam", lambda h: {"form": "paper", **h}),
    "fsam_sgd": ("friendly_sam", lambda h: {k: h[k] for k in ("rho", "sigma", "lmbda")}),
    "fsam-paper-sigma0.5_sgd": ("friendly_sam", lambda h: {"form": "paper", **h}),
    "vasso_sgd": ("vasso", lambda h: {"rho": h["rho"], "theta": h["theta"]}),
    "wsam_sgd": ("wsam", lambda h: {k: h[k] for k in ("rho", "gamma", "decouple", "adaptive")}),
    "wsam-coupled_sgd": ("wsam", lambda h: {k: h[k] for k in ("rho", "gamma", "decouple", "adaptive")}),
    "sagm_sgd": ("sagm", lambda h: h),
    "usam_sgd": ("usam", lambda h: {"rho": h["rho"], "lmbda": h["lambd"]}),
    "unifiedsam-0.5_sgd": ("usam", lambda h: {"rho": h["rho"], "lmbda": h["lambd"]}),
    "ssam-mask0.5_sgd": ("ssam", lambda h: {"rho": h["rho"], "update_every": None}),
    "crsam_sgd": ("cr_sam", lambda h: h),
    "lookbehind_sgd": ("lookbehind", lambda h: {"rho": h["rho"], "k": h["k_steps"], "alpha": h["alpha"]}),
    "looksam_sgd": ("looksam", lambda h: h),
    "temperon_sgd": (
        "late_sam",
        lambda h: {
            "ramp": h["rho_ramp_steps"],
            **{k: h[k] for k in ("total_steps", "tail_frac", "rho")},
        },
    ),
}


def network(problem: dict, start: list[float]) -> torch.nn.Sequential:
    net = torch.nn.Sequential()
    net.add_module("fc1", torch.nn.Linear(4, 8, dtype=torch.float64))
    net.add_module("tanh", torch.nn.Tanh())
    net.add_module("fc2", torch.nn.Linear(8, 1, dtype=torch.float64))
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in problem["param_order"]]
    load(net, start)
    return net


def load(net: torch.nn.Module, flat: list[float]) -> None:
    torch.nn.utils.vector_to_parameters(torch.tensor(flat, dtype=torch.float64), net.parameters())


def flat(net: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def groups(net: torch.nn.Module, hyper: dict) -> object:
    if "groups" not in hyper:
        return net.named_parameters()
    params = dict(net.named_parameters())
    return [
        {**group, "params": [(name, params[name]) for name in group["params"]]} for group in hyper["groups"]
    ]


@pytest.mark.parametrize("driver", ["closure", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_trajectory(name: str, driver: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    key, rename = CASES[name]
    hyper, expected = golden["hyperparameters"], golden["trajectory"]
    net = network(golden["problem"], expected["weights"][0])
    x = torch.tensor(golden["problem"]["inputs"], dtype=torch.float64)
    y = torch.tensor(golden["problem"]["targets"], dtype=torch.float64)
    optimizer = create(key, groups(net, hyper), **rename(hyper), **golden["base"]["kwargs"])
    if "mask" in hyper:
        masks = torch.tensor(hyper["mask"]).split([p.numel() for p in net.parameters()])
        optimizer.ascent.set_masks(m.view(p.shape) for m, p in zip(masks, net.parameters(), strict=True))
    handed: list[torch.Tensor] = []
    optimizer.base.register_step_pre_hook(
        lambda *_: handed.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    )
    evaluated: list[torch.Tensor] = []

    def backward() -> torch.Tensor:
        evaluated.append(flat(net))
        loss = (net(x).squeeze(-1) - y).square().mean()
        loss.backward()
        return loss

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward()

    for t in range(golden["steps"]):
        if "rho_t" in hyper:
            for group in optimizer.param_groups:
                group["rho"] = hyper["rho_t"][t]
        evaluated.clear()
        if driver == "closure":
            loss = optimizer.step(closure)
            assert abs(loss.item() - expected["loss"][t]) < 1e-10
        else:
            for _ in optimizer.passes():
                backward()
            optimizer.step()
        assert len(evaluated) == len(expected["eval_weights"][t])
        for got, want in zip(evaluated, expected["eval_weights"][t], strict=True):
            close(got, want)
        close(handed[-1], expected["base_grad"][t])
        close(flat(net), expected["weights"][t + 1])


def close(got: torch.Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-10)
