"""The regularisers of the paper's validation, each as the loss of one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipdyn_torch.experiments.data import Images
from lipdyn_torch.integrations._extras import need

__all__ = ["PLAIN", "REGULARISERS", "Regulariser"]

#: ``(model, twin, x, y, images) -> loss``; the twin is for passes that must not be seen by the monitor.
Loss = Callable[[nn.Module, nn.Module, Tensor, Tensor, Images], Tensor]

MIXUP_ALPHA = 0.4
LABEL_SMOOTHING = 0.1
FGSM_STEP = 0.03  # in pixels between 0 and 1
WEIGHT_DECAY = 0.001
DROPOUT = (0.2, 0.3)  # after convolutions, after the first linear layer


def _plain(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, images: Images) -> Tensor:
    return functional.cross_entropy(model(x), y)


def _mixup(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, images: Images) -> Tensor:
    """One weight and one permutation per batch, as in the original."""
    # Beta(a, a) from two Gamma draws of torch's generator, so that the seed of torch decides.
    gammas = torch._standard_gamma(torch.full((2,), MIXUP_ALPHA, dtype=torch.float64)).clamp_min(1e-12)
    weight = float(gammas[0] / gammas.sum())
    other = torch.randperm(len(x)).to(x.device)
    logits = model(weight * x + (1 - weight) * x[other])
    return weight * functional.cross_entropy(logits, y) + (1 - weight) * functional.cross_entropy(logits, y[other])


def _label_smoothing(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, images: Images) -> Tensor:
    return functional.cross_entropy(model(x), y, label_smoothing=LABEL_SMOOTHING)


def _fgsm(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, images: Images) -> Tensor:
    """Train on the images moved by one signed gradient step, kept between black and white."""
    moved = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(functional.cross_entropy(twin(moved), y), moved)
    mean, sd = images.mean[:, None, None], images.sd[:, None, None]
    pixels = (x * sd + mean + FGSM_STEP * slope.sign()).clamp(0, 1)
    return functional.cross_entropy(model((pixels - mean) / sd), y)


def _auto_augment(model: nn.Module, twin: nn.Module, x: Tensor, y: Tensor, images: Images) -> Tensor:
    mean, sd = images.mean[:, None, None], images.sd[:, None, None]
    pixels = augment((x * sd + mean).clamp(0, 1))
    return functional.cross_entropy(model((pixels - mean) / sd), y)


@torch.no_grad()
def augment(pixels: Tensor) -> Tensor:
    """AutoAugment with the CIFAR-10 policy on pixels (M, C, H, W) between 0 and 1.

    kornia draws one sub-policy per call, so the batch is cut into small groups with a draw each.
    """
    channels = pixels.shape[1]
    colour = pixels.expand(-1, 3, -1, -1) if channels == 1 else pixels  # some of the policy's steps need colours
    policy = need("kornia.augmentation.auto", "experiments").AutoAugment("cifar10")
    groups = colour.split(max(8, len(pixels) // 16))
    done = torch.cat([policy(group) for group in groups]).clamp(0, 1)
    return done.mean(1, keepdim=True) if channels == 1 else done


@dataclass(frozen=True)
class Regulariser:
    """A way to regularise: what it adds to the network, to the loss and to the optimiser."""

    name: str
    title: str
    loss: Loss = _plain
    model: dict[str, object] = field(default_factory=dict)
    weight_decay: float = 0.0


PLAIN = Regulariser("none", "no regulariser")
REGULARISERS = {
    r.name: r
    for r in (
        PLAIN,
        Regulariser("batch-norm", "batch normalisation", model={"batch_norm": True}),
        Regulariser("mixup", "mixup, alpha 0.4", _mixup),
        Regulariser("label-smoothing", "label smoothing 0.1", _label_smoothing),
        Regulariser("fgsm", "FGSM training, 0.03", _fgsm),
        Regulariser("weight-decay", "weight decay 0.001", weight_decay=WEIGHT_DECAY),
        Regulariser("dropout", "dropout 0.2 / 0.3", model={"dropout": DROPOUT}),
        Regulariser("autoaugment", "AutoAugment, CIFAR-10", _auto_augment),
    )
}
