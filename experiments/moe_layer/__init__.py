"""The mixture-of-experts layer: what it costs, and what it sends."""
