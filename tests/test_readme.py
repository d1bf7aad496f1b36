"""What the README says is true: its snippets run, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dgs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_snippets_run(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with dgs.serve("127.0.0.1:0") as handle:
        monkeypatch.setenv("DGS_SERVER", handle.address)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        names = {"dgs": dgs, "torch": torch, "model": model}
        exec(SNIPPETS[number].replace("10.0.0.1:7070", handle.address), names)
        opt = names["opt"]
        assert isinstance(opt, dgs.DistributedOptimizer)
        for _ in range(8):
            opt.zero_grad()
            model(torch.randn(8, 4)).sum().backward()
            opt.step()
        opt.close()
        assert opt.stats.exchanges >= 1


def test_the_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert target in targets
    commands = {p.stem for p in (ROOT / "dgs" / "cli").glob("*.py")}
    for command in re.findall(r"\bdgs (server|launch|pull|status|demo|bench)\b", README):
        assert command in commands
