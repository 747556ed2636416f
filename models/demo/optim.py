"""Muon for matrices, AdamW for the rest, under one schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalised(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to g, (n, rows, columns), by quintic Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of equal shape are taken together."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalised(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-scale)


class Optimisers:
    """Both optimisers of a model, with a learning rate factor shared by them."""

    def __init__(self, model: nn.Module, matrix_lr: float = 0.02, other_lr: float = 2e-3) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            plain = p.ndim == 2 and not any(k in name for k in ("embed", "position", "head", "cls"))
            (matrices if plain else others).append(p)
        self.muon = Muon(matrices, matrix_lr)
        self.adam = torch.optim.AdamW(others, other_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.params = matrices + others
        self.base = [(g, g["lr"]) for o in (self.muon, self.adam) for g in o.param_groups]

    def step(self, factor: float) -> None:
        """Clip, update with the base rates times `factor`, clear the gradients."""
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for group, lr in self.base:
            group["lr"] = lr * factor
        self.muon.step()
        self.adam.step()
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """From a checkpoint."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
