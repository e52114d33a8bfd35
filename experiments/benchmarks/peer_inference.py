"""The other side of `inference.py`: the same network of torchvision's parts, in an environment of its own.

    python peer_inference.py {small_resnet,densenet121,mobilenetv3small} SIZE THREADS

Needs torch and torchvision, and nothing of this project. First it prints a line of JSON with the number of trained
parameters; then, for each line "BATCH SECONDS" that it reads, one with the median milliseconds of a call: "contiguous"
and "channels_last".
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
import torchvision
from torch import nn

MEAN, STD = 0.5020 * 255, 0.0856 * 255


def normalized(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch-norm."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, 1e-3))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = normalized(inputs, outputs, 3, stride), normalized(outputs, outputs, 3)
        self.shortcut = nn.Identity() if stride == 1 else normalized(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of half the size where the stride is 2."""
        made = self.second(torch.relu(self.first(x)))
        return torch.relu(made + self.shortcut(x))


class SmallResNet(nn.Module):
    """`small_resnet`; its strided convolutions pad on both sides, where TensorFlow's pad below and to the right."""

    channels = (16, 24, 48, 96, 128)

    def __init__(self) -> None:
        super().__init__()
        self.stem = normalized(1, 16, 3, 2)
        deepest = nn.Sequential(Block(96, 128, 2), Block(128, 128, 1))
        self.stages = nn.ModuleList([Block(16, 24, 2), Block(24, 48, 2), Block(48, 96, 2), deepest])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of strides 2 to 32."""
        levels = [torch.relu(self.stem(x))]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return levels


class DenseNet(nn.Module):
    """torchvision's DenseNet-121 for one channel."""

    channels = (64, 256, 512, 1024, 1024)

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.densenet121().features
        self.features.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of strides 2 to 32."""
        net = self.features
        levels = [torch.relu(net.norm0(net.conv0(x)))]
        x = net.pool0(levels[0])
        for i in (1, 2, 3):
            transition = getattr(net, f"transition{i}")
            levels.append(torch.relu(transition.norm(getattr(net, f"denseblock{i}")(x))))
            x = transition.pool(transition.conv(levels[-1]))
        return [*levels, torch.relu(net.norm5(net.denseblock4(x)))]


class MobileNet(nn.Module):
    """torchvision's MobileNetV3Small for one channel."""

    channels = (16, 16, 24, 48, 576)

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.mobilenet_v3_small().features
        self.features[0][0] = nn.Conv2d(1, 16, 3, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of strides 2 to 32."""
        net = self.features
        before = net[0][1](net[0][0](x))
        x = net[0][2](before)
        levels = [before]
        for i, layer in enumerate(net[1:], start=1):
            x = layer(x)
            if i in (1, 3, 8):
                levels.append(x)
        return [*levels, x]


class MultiTask(nn.Module):
    """An encoder with both heads, as `cxr_tf.multitask` makes it."""

    def __init__(self, encoder: nn.Module, classes: int = 4) -> None:
        super().__init__()
        self.encoder = encoder
        *skips, deepest = encoder.channels
        self.logits = nn.Sequential(nn.Linear(deepest, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, classes))
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.steps = nn.ModuleList()
        inputs = deepest
        for skip, outputs in zip((*skips[::-1], 0), (256, 128, 64, 32, 16), strict=True):
            first, second = normalized(inputs + skip, outputs, 3), normalized(outputs, outputs, 3)
            self.steps.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()))
            inputs = outputs
        self.mask_logits = nn.Conv2d(16, 1, 1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """What an exported form gives."""
        levels = self.encoder(image * (1.0 / STD) - MEAN / STD)
        logits = self.logits(levels[-1].mean((2, 3)))
        x = levels.pop()
        for step in self.steps:
            x = self.enlarge(x)
            x = step(torch.cat([x, levels.pop()], 1) if levels else x)
        mask = torch.sigmoid(self.mask_logits(x))
        return {"logits": logits, "probabilities": torch.softmax(logits / 1.3, 1), "mask": mask}


def main(encoder: str, size: int, threads: int) -> None:
    """Answers on standard output."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind = {"small_resnet": SmallResNet, "densenet121": DenseNet, "mobilenetv3small": MobileNet}[encoder]
    models = {"contiguous": MultiTask(kind()).eval()}
    models["channels_last"] = MultiTask(kind()).eval().to(memory_format=torch.channels_last)
    print(json.dumps({"parameters": sum(p.numel() for p in models["contiguous"].parameters())}), flush=True)
    for line in sys.stdin:
        batch, seconds = int(line.split()[0]), float(line.split()[1])
        films = 255 * torch.rand(batch, size, size, 1)
        print(json.dumps({name: timed(model, films, seconds) for name, model in models.items()}), flush=True)


@torch.inference_mode()
def timed(model: nn.Module, films: torch.Tensor, seconds: float) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for value in model(films.permute(0, 3, 1, 2)).values():
            value.numpy()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
