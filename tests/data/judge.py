"""The classifier that judges sampled digits: a small convolutional network trained on MNIST.

Its weights, ``judge.safetensors`` beside this file, come from ``scripts/train_digits.py judge``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Images [N, 1, 32, 32] in [-1, 1] -> logits of the ten digits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y: Tensor = self.layers(x)
        return y

    @torch.no_grad()
    def agreement(self, x: Tensor, labels: Tensor) -> float:
        """Fraction of the images in which the judge sees the requested digit."""
        seen = torch.cat([self(part).argmax(dim=1) for part in x.float().split(500)])
        return float((seen == labels).float().mean())


def load_judge() -> Judge:
    """The committed judge, in float32."""
    judge = Judge()
    judge.load_state_dict({key: weight.float() for key, weight in load_file(WEIGHTS).items()})
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, accuracy: float) -> None:
    """Commit the weights in float16, with the accuracy on the test set beside them."""
    weights = {key: weight.half().contiguous() for key, weight in judge.state_dict().items()}
    save_file(weights, WEIGHTS, {"mnist_test_accuracy": f"{accuracy:.4f}"})


def judge_accuracy() -> float:
    """Accuracy on MNIST's 10,000 test images, as recorded when the judge was trained."""
    with safe_open(WEIGHTS, framework="pt") as file:
        return float(file.metadata()["mnist_test_accuracy"])
