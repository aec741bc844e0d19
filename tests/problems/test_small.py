import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from steppe.problems.small import SMALL

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden" / "published_examples.json"


def value(small, model):
    with torch.no_grad():
        return float(small.loss(model, (small.x, small.y)))


@pytest.mark.parametrize("name", SMALL)
def test_global_random_streams_are_left_alone(name):
    before = torch.get_rng_state(), np.random.get_state()
    small = SMALL[name]()
    small.model()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1][1]).all()
    assert small.name == name
    assert parameters_to_vector(small.model().parameters()).tolist() == small.start.tolist()


@pytest.mark.parametrize(
    ("name", "key", "first"),
    [
        ("linear_regression", "nine_optimizers_gd_linear_regression", "loss"),
        ("logistic_line", "nine_optimizers_nag_logistic", "loss"),
        ("xor", "nine_optimizers_momentum_xor", "loss"),
    ],
)
def test_starts_are_the_published_ones(name, key, first):
    if not GOLDEN.exists():
        pytest.skip("the golden data are not beside the repository")
    golden = json.loads(GOLDEN.read_text("utf-8"))
    golden = golden.get("experiments", golden)[key]
    small = SMALL[name]()
    assert value(small, small.model()) == pytest.approx(golden[first][0], rel=1e-12)


def test_linear_regression_has_the_least_squares_floor():
    small = SMALL["linear_regression"]()
    assert small.floor == pytest.approx(0.9924386487246482, rel=1e-12)
    assert small.minima[0] == pytest.approx([4.222151077447231, 2.9684675107010183], rel=1e-12)


def test_mini_batches_pass_over_all_samples():
    small = SMALL["logistic"]()
    assert small.start.tolist() == pytest.approx(
        [0.3577873603482833, 0.5607845263682344, 1.083051243175277], rel=1e-15
    )
    batches = list(small.batches(torch.Generator().manual_seed(0)))
    assert [len(x) for x, _ in batches] == [10] * 10
    assert sorted(torch.cat([x for x, _ in batches])[:, 0].tolist()) == sorted(small.x[:, 0].tolist())


class TestAutoencoder:
    def test_check_digits(self):
        small = SMALL["autoencoder"]()
        assert small.start[:3].tolist() == pytest.approx([0.04967142, -0.01382643, 0.06476885], abs=5e-9)
        assert float(small.x[0, 0]) == pytest.approx(-0.24286, abs=5e-6)
        assert float(small.x[0, 1]) == pytest.approx(-934.16, abs=5e-3)

    def test_its_floor_is_reached_and_nothing_goes_below(self):
        # Levenberg-Marquardt, here: damped Gauss-Newton on the 64 residuals with derivatives by hand
        small = SMALL["autoencoder"]()
        x = small.x.numpy()

        def residuals(w):
            first, second, bias = w[:4].reshape(2, 2), w[4:8].reshape(2, 2), w[8:]
            before = x @ first.T
            hidden = np.maximum(before, 0)
            on = before > 0
            left = hidden @ second.T + bias - x
            slope = np.zeros((len(x), 2, 10))
            for out in range(2):
                for unit in range(2):
                    slope[:, out, 2 * unit : 2 * unit + 2] = (second[out, unit] * on[:, unit])[:, None] * x
                    slope[:, out, 4 + 2 * out + unit] = hidden[:, unit]
                slope[:, out, 8 + out] = 1
            return left.ravel(), slope.reshape(-1, 10)

        ends = []
        random = np.random.RandomState(0)
        for w in [small.start.numpy(), *random.uniform(-1, 1, (3, 10))]:
            damping = 1e-3
            r, j = residuals(w)
            for _ in range(200):
                a = j.T @ j
                move = np.linalg.lstsq(a + damping * np.diag(np.diag(a) + 1e-12), -j.T @ r, rcond=None)[0]
                tried, slope = residuals(w + move)
                better = tried @ tried < r @ r
                damping *= 0.3 if better else 4.0
                if better:
                    w, r, j = w + move, tried, slope
            model = small.model()
            vector_to_parameters(torch.from_numpy(w), model.parameters())
            assert value(small, model) == pytest.approx(np.square(r).mean(), rel=1e-9)
            ends.append(value(small, model))
        assert min(ends) == pytest.approx(small.floor, rel=1e-9)
        assert min(ends) > small.floor * (1 - 1e-12)
        assert min(ends) > small.printed["simulated annealing"]
