"""Whether a model fits a mapping, and which layers a stage has: integers only."""

from __future__ import annotations

from moe.errors import LayoutError
from moe.model_config import ModelConfig
from moe.parallel.dims import ParallelDims
from moe.parallel.groups import ProcessGroups
from moe.parallel.tensor import shares

__all__ = ["check_mapping", "stage_layers"]


def check_mapping(config: ModelConfig, dims: ParallelDims) -> None:
    """Refuse a mapping over which the model cannot be shared out.

    Args:
        config: of the model.
        dims: the mapping.

    Raises:
        LayoutError: heads, widths, vocabulary or experts do not divide, or there are fewer layers
            than pipeline stages; the same on every rank, as it depends on nothing else.

    Example:
        >>> from moe.model_config import AttentionConfig, FeedForwardConfig
        >>> attention, dense = AttentionConfig(4, 2, head_dim=8), FeedForwardConfig(inner=64)
        >>> check_mapping(ModelConfig(100, 32, 2, attention, dense), ParallelDims(world=4, tp=4))
        Traceback (most recent call last):
        ...
        moe.errors.LayoutError: 2 key and value heads do not divide over tp=4; a tp that fits this \
model is one of 1, 2
    """
    attention, feed_forward = config.attention, config.feed_forward
    counts = {
        "query heads": attention.heads,
        "key and value heads": attention.kv_heads,
        "entries of the vocabulary": config.vocabulary,
    }
    if any(feed_forward.moe_of(n) is None for n in range(config.num_layers)):
        counts["inner width of dense layers"] = feed_forward.inner
    fits = [tp for tp in range(1, dims.world + 1) if not any(n % tp for n in counts.values())]
    for name, count in counts.items():
        if count % dims.tp:
            told = f"{count} {name}" if name != "inner width of dense layers" else f"{name} {count}"
            raise LayoutError(
                f"{told} do not divide over tp={dims.tp}; a tp that fits this model is one of "
                f"{', '.join(map(str, fits))}"
            )
    if feed_forward.moe is not None:
        dims.local_experts(feed_forward.moe.router.num_experts)
        inner = feed_forward.moe.experts.intermediate
        if inner % dims.etp:
            raise LayoutError(
                f"the experts' inner width of {inner} does not divide over etp={dims.etp}"
            )
    if config.num_layers < dims.pp:
        raise LayoutError(
            f"{config.num_layers} layers are fewer than pp={dims.pp} stages; give pp of at most "
            f"{config.num_layers}"
        )


def stage_layers(num_layers: int, groups: ProcessGroups, layers: range | None = None) -> range:
    """Return the layers of a rank's pipeline stage.

    Args:
        num_layers: of the whole model.
        groups: of the mapping.
        layers: those that were asked for; None: an even share, earlier stages get more.

    Raises:
        LayoutError: the model has no such layers.

    Example:
        >>> from moe.parallel.groups import single
        >>> stage_layers(3, single())
        range(0, 3)
    """
    if layers is not None:
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= num_layers:
            raise LayoutError(f"{layers} are not layers of a model that has {num_layers}")
        return layers
    sizes = shares(num_layers, groups.dims.pp)
    stage = groups.dims.coordinates(groups.rank)["pp"]
    first = sum(sizes[:stage])
    return range(first, first + sizes[stage])
