"""The step that `pretrain_step` is timed beside: MoCo v2 of lightly's parts on torchvision's DenseNet-121.

Run by `pretrain_step` in an environment of its own (`pip install torch==2.14.1 torchvision==0.29.1 lightly==1.6.0`);
prints milliseconds of each step as JSON.
"""

from __future__ import annotations

import copy
import json
import sys
import time

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum


def main(batch: int, size: int, queue: int, steps: int, warmup: int) -> list[float]:
    """Milliseconds of each of `steps` steps."""
    features = torchvision.models.densenet121().features
    features.conv0 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    pool = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    query = torch.nn.Sequential(features, pool, MoCoProjectionHead(1024, 1024, 128))
    query = query.to(memory_format=torch.channels_last)
    key = copy.deepcopy(query)
    deactivate_requires_grad(key)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(queue, 128))
    optimizer = torch.optim.SGD(query.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    views = [torch.rand(batch, 1, size, size).to(memory_format=torch.channels_last) for _ in range(2)]
    taken = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        update_momentum(query, key, 0.999)
        with torch.no_grad():
            keys = key(views[1])
        loss = criterion(query(views[0]), keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken.append(1e3 * (time.perf_counter() - start))
    return taken[warmup:]


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
