"""What must hold of an installed autowu, next to torch alone: import, ten steps, a state saved and loaded, the command line."""

import io
import subprocess
import sysconfig
from pathlib import Path

import torch

import autowu
from autowu.optim import LARS

assert Path(autowu.__file__).is_relative_to(sysconfig.get_path("purelib")), f"{autowu.__file__} is not the installed one"
assert (Path(autowu.__file__).parent / "py.typed").exists()


def made():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = LARS(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    return model, optimizer, autowu.AutoWU(optimizer, total_steps=200, model=model)


def train(model, optimizer, scheduler, steps):
    for step in range(steps):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    return scheduler.get_last_lr()


first, second = made(), made()
begun = first[2].get_last_lr()
assert train(*first, 10) > begun, "the warm-up does not raise the LR"
file = io.BytesIO()
torch.save([part.state_dict() for part in first], file)
file.seek(0)
for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
    part.load_state_dict(state)
assert train(*first, 150) == train(*second, 150), "the resumed run has other LRs"
assert first[2].switch is not None

command = Path(sysconfig.get_path("scripts")) / "autowu"
said = subprocess.run([command, "--help"], check=True, capture_output=True, text=True).stdout
assert "replay" in said
print(f"autowu {autowu.__version__} with torch {torch.__version__}: all is well")
