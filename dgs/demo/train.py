"""Train one model together with other workers: what ``dgs demo`` starts, and an example to copy.

A usual training loop; what is particular to `dgs` are the lines that make and close the optimizer.
The launcher's environment says where the server is (``DGS_SERVER``) and who this worker is
(``DGS_WORKER``, ``DGS_RANK``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import dgs
from dgs.demo.data import Images, batches, load_cifar10, load_digits, random_crop_flip
from dgs.demo.models import digits_net, resnet18
from dgs.demo.plan import learning_rate_share
from dgs.metrics import Stats

__all__ = ["evaluate", "load_images", "main", "make_model", "make_parser", "train"]

EVALUATION_BATCH = 100


def load_images(task: str, data_dir: Path | None) -> Images:
    """Load what a task trains on."""
    return load_digits() if task == "digits" or data_dir is None else load_cifar10(data_dir)


def make_model(task: str) -> nn.Module:
    """Build the network of a task."""
    return digits_net() if task == "digits" else resnet18()


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Return accuracy and mean loss of a model on the test images; leaves it in `eval` mode."""
    model.eval()
    correct, loss = 0, 0.0
    for first in range(0, len(images.test), EVALUATION_BATCH):
        part = slice(first, first + EVALUATION_BATCH)
        scores, labels = model(images.scaled(images.test[part])), images.test_labels[part]
        correct += int((scores.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
    return correct / len(images.test), loss / len(images.test)


def train(args: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Train, and return what was counted meanwhile.

    Args:
        args: as `make_parser` reads them.
        rank: number of this worker, from 0; decides the order in which it sees the images.
    """
    torch.set_num_threads(1)  # the workers of one machine share its cores
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    images = load_images(args.task, args.data_dir).to(device)
    model = make_model(args.task).to(device)
    opt = dgs.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.lr, weight_decay=args.weight_decay),
        named_parameters=model.named_parameters(),
        named_buffers=model.named_buffers(),
        rule=args.rule,
        momentum=args.momentum,
        density=args.density,
        download_density=args.download_density,
        values=args.values,
    )
    schedule = LambdaLR(opt, lambda s: learning_rate_share(s, args.steps, args.warmup))
    generator = torch.Generator().manual_seed(1000 * args.seed + rank + 1)
    stream = batches(len(images.train), args.batch, generator)
    losses = torch.zeros(args.steps, device=device)
    began = time.time()
    for step in range(args.steps):
        chosen = next(stream).to(device)
        pixels = images.train[chosen]
        if args.task == "cifar10":
            pixels = random_crop_flip(pixels, generator)
        opt.zero_grad()
        loss = F.cross_entropy(model(images.scaled(pixels)), images.train_labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        opt.step()
        schedule.step()
        losses[step] = loss.detach()
    ended = time.time()
    opt.close()
    return _summary(opt.stats, losses, began, ended)


def _summary(stats: Stats, losses: Tensor, began: float, ended: float) -> dict[str, Any]:
    tenth = max(1, len(losses) // 10)
    return {
        "steps": stats.steps,
        "exchanges": stats.exchanges,
        "bytes_up": stats.bytes_up,
        "bytes_down": stats.bytes_down,
        "setup_bytes": stats.setup_bytes,
        "resyncs": stats.resyncs,
        "loss_first": float(losses[:tenth].mean()),
        "loss_last": float(losses[-tenth:].mean()),
        "began": began,
        "ended": ended,
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--warmup", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rule", default="samomentum")
    parser.add_argument("--momentum", type=float, default=0.7)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--download-density", type=float, default=0.01)
    parser.add_argument("--values", default="float32")
    parser.add_argument("--out", type=Path, required=True, help="file for the counts, as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says and write the counts to a file."""
    args = make_parser().parse_args(argv)
    counts = train(args, rank=int(os.environ.get("DGS_RANK", "0")))
    args.out.write_text(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
