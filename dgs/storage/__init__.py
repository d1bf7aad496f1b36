"""What a server keeps on disk: a log of the requests that changed its state, and snapshots."""

__all__: list[str] = []
