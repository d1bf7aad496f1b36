"""The library against the paper's printed equations."""

from __future__ import annotations

import numpy as np
import pytest

from dgs.config import WorkerConfig
from tests.helpers.oracle import PaperServer, PaperWorker
from tests.helpers.sites import SHAPES, Site, make_servers, server_model, space_of


@pytest.mark.parametrize("download_density", [0.1, 1.0])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(("momentum", "density"), [(0.7, 0.05), (0.9, 0.3), (0.45, 1.0)])
def test_hundreds_of_interleaved_steps_follow_the_printed_equations(
    momentum: float, density: float, num_shards: int, download_density: float
) -> None:
    rng = np.random.default_rng(5)
    space = space_of(SHAPES)
    layers = [slice(a, b) for a, b in zip(space.offsets[:-1], space.offsets[1:], strict=True)]
    start = rng.standard_normal(space.size).astype(np.float32)
    target = rng.standard_normal(space.size)
    servers = make_servers(num_shards)
    config = WorkerConfig(
        momentum=momentum,
        density=density,
        download_density=download_density,
        selection="exact",
    )
    names = ["a", "b", "c", "d"]
    sites = {k: Site(k, servers, config, start) for k in names}
    secondary = None if download_density == 1.0 else download_density
    paper = PaperServer(start.astype(np.float64), layers, secondary)
    papers = {k: PaperWorker(paper.join(k), layers, momentum, density) for k in names}

    for _ in range(400):
        k = names[rng.integers(len(names))]
        noise = rng.standard_normal(space.size)
        step = 0.02 * (papers[k].theta - target + 0.3 * noise)
        papers[k].apply(paper.receive(k, papers[k].update(step)))
        step32 = (0.02 * (sites[k].base - target + 0.3 * noise)).astype(np.float32)
        sites[k].exchange(step32)
        np.testing.assert_allclose(sites[k].base, papers[k].theta, rtol=0, atol=3e-5)

    np.testing.assert_allclose(server_model(servers), paper.theta_0 + paper.m_t, rtol=0, atol=3e-5)
