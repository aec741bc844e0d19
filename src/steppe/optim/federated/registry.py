"""One line per federated method. Importing this module does not import torch."""

from __future__ import annotations

from steppe.core.spec import Registry, Spec

__all__ = ["METHODS"]

_FEDERATED = "federated"

METHODS = Registry(
    "federated method",
    {
        "fedavg": Spec(
            "steppe.optim.federated.methods:FedAvg",
            _FEDERATED,
            "local SGD, averaged",
            "McMahan et al. 2017, arXiv:1602.05629",
            evals=1,
            demos=({}, {"server_lr": 0.5}),
        ),
        "fedsam": Spec(
            "steppe.optim.federated.methods:FedSAM",
            _FEDERATED,
            "local SAM, averaged",
            "Qu et al. 2022, arXiv:2206.02618",
            evals=2,
            demos=({}, {"rho": 0.5, "server_lr": 0.5}),
        ),
        "mofedsam": Spec(
            "steppe.optim.federated.methods:MoFedSAM",
            _FEDERATED,
            "FedSAM whose local steps carry the last round's direction as momentum",
            "Qu et al. 2022, arXiv:2206.02618",
            evals=2,
            demos=({}, {"rho": 0.5, "alpha": 0.6}),
        ),
        "fedgamma": Spec(
            "steppe.optim.federated.methods:FedGAMMA",
            _FEDERATED,
            "FedSAM with control variates against client drift",
            "Dai et al. 2023, doi:10.1109/TNNLS.2023.3304453",
            evals=2,
            demos=({}, {"rho": 0.5, "server_lr": 0.5}),
        ),
        "fedspeed": Spec(
            "steppe.optim.federated.methods:FedSpeed",
            _FEDERATED,
            "local SAM with a proximal term and its correction by a dual variable",
            "Sun et al. 2023, arXiv:2302.10429",
            evals=2,
            demos=({}, {"rho": 0.5, "lmbda": 0.3}),
        ),
        "fedsmoo": Spec(
            "steppe.optim.federated.methods:FedSMOO",
            _FEDERATED,
            "FedSpeed whose perturbations agree between clients by dual variables of their own",
            "Sun et al. 2023, arXiv:2305.11584",
            evals=2,
            demos=({}, {"rho": 0.5, "lmbda": 0.3}),
        ),
    },
)
