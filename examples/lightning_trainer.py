"""A Lightning Trainer with GSAM over AdamW: one line of ``configure_optimizers`` changes, and nothing of the Trainer.

Lightning hands its optimizer a closure, and GSAM calls it once per pass. Schedulers, ``global_step``, checkpoints and
resuming work as with AdamW. The Trainer's ``gradient_clip_val`` clips the gradient of every pass, which changes nothing
for SAM and is not what GSAM means: clip in a hook of the base, ``optimizer.base.register_step_pre_hook(clip)``.
``accumulate_grad_batches`` must stay 1, since a closure knows one micro-batch only: give ``optimizer.step`` of manual
optimization a closure that loops over them.
Run: ``python examples/lightning_trainer.py``, after ``pip install steppe[lightning]``.
"""

import lightning as L
import torch
from torch import nn

from steppe.optim import GSAM


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        # the changed line; with model=self the statistics of BatchNorm are those of the unperturbed weights
        optimizer = GSAM(self.named_parameters(), base=torch.optim.AdamW, lr=1e-2, rho=0.05, model=self)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)]


torch.manual_seed(0)
angle, side = torch.rand(400) * torch.pi, torch.arange(400) % 2
moons = torch.stack([angle.cos() + side - 0.5, (1 - 2 * side) * (angle.sin() - 0.25)], 1)
moons += 0.2 * torch.randn(400, 2)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(moons, side), batch_size=50, shuffle=True)
model = Classifier()


def loss():
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval().net(moons), side).item()


before = loss()
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=10, accelerator="cpu", enable_checkpointing=False, **quiet)
trainer.fit(model.train(), loader)
print(f"loss before {before:.4f}, after {trainer.global_step} steps {loss():.4f}")
assert loss() < 0.3 < before
