"""In a skorch net our optimizers do what they do in a plain loop."""

from __future__ import annotations

import pickle

import pytest
from torch import nn
from torch.optim import AdamW

from steppe.optim import GSAM, SAM, FriendlySAM

from .common import BATCH, FAMILY, assert_same, batches, data, decay, network, plain_loop

skorch = pytest.importorskip("skorch", reason="needs the extra steppe[skorch]")

CLIP = 0.5


class Net(skorch.NeuralNetRegressor):
    def get_params_for_optimizer(self, prefix, named_parameters):
        args, kwargs = super().get_params_for_optimizer(prefix, named_parameters)
        return args, {**kwargs, "model": self.module_}  # for the statistics of BatchNorm


def net(cls, **options):
    return Net(
        network(),
        optimizer=cls,
        optimizer__base=AdamW,
        optimizer__rho=0.1,
        **{"lr": 0.05, "batch_size": BATCH, "max_epochs": 2, "train_split": None, "verbose": 0, **options},
    )


def reference(cls, **options):
    model = network()
    # skorch passes parameters without their names
    optimizer = cls(model.parameters(), base=AdamW, lr=0.05, rho=0.1, model=model)
    steps = [[batch] for batch in batches()] * 2
    return model, plain_loop(model, optimizer, steps, scheduler=decay(optimizer), **options)


def schedule():
    return skorch.callbacks.LRScheduler("StepLR", step_size=2, gamma=0.7, step_every="batch")


def clipping():
    return skorch.callbacks.GradientNormClipping(CLIP)


@pytest.mark.parametrize("cls", FAMILY)
def test_is_the_plain_loop(cls):
    trained = net(cls, callbacks=[schedule()]).fit(*data())
    expected, losses = reference(cls)
    assert_same(trained.module_, expected)
    # the history keeps the losses at the unperturbed weights
    assert trained.history[:, "batches", :, "train_loss"] == [
        pytest.approx(losses[:4]),
        pytest.approx(losses[4:]),
    ]


def test_clipping_of_each_pass_is_clipping_of_the_step_for_a_rule_without_memory():
    trained = net(SAM, callbacks=[schedule(), clipping()]).fit(*data())
    assert_same(trained.module_, reference(SAM, clip=CLIP)[0], rtol=1e-4, atol=1e-5)


def test_clipping_of_what_the_base_gets():
    class Clipping(skorch.callbacks.Callback):
        def on_train_begin(self, net, **_):
            def clip(*_):
                nn.utils.clip_grad_norm_(net.module_.parameters(), CLIP)

            net.optimizer_.base.register_step_pre_hook(clip)

    trained = net(GSAM, callbacks=[schedule(), Clipping()]).fit(*data())
    assert_same(trained.module_, reference(GSAM, clip=CLIP)[0])


def test_saved_and_loaded_it_goes_on_to_the_same_bits(tmp_path):
    files = {"f_params": str(tmp_path / "params"), "f_optimizer": str(tmp_path / "optimizer")}
    whole = net(FriendlySAM).fit(*data())
    first = net(FriendlySAM, max_epochs=1).fit(*data())
    first.save_params(**files)
    second = net(FriendlySAM, max_epochs=1).initialize()
    second.load_params(**files)
    second.partial_fit(*data())
    assert_same(second.module_, whole.module_)
    pickled = pickle.loads(pickle.dumps(first)).partial_fit(*data())
    assert_same(pickled.module_, whole.module_)


def test_hyper_parameters_are_parameters_of_the_net():
    from sklearn.model_selection import GridSearchCV

    trained = net(SAM, optimizer__weight_decay=0.1).initialize()
    assert trained.optimizer_.param_groups[0]["weight_decay"] == 0.1
    trained.set_params(optimizer__rho=0.3)
    assert trained.optimizer_.param_groups[0]["rho"] == 0.3

    x, y = data()
    search = GridSearchCV(net(SAM), {"optimizer__rho": [0.05, 100.0]}, cv=2, scoring="neg_mean_squared_error")
    assert search.fit(x.numpy(), y.numpy()).best_params_ == {"optimizer__rho": 0.05}
