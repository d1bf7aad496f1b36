"""Nothing lost: simulated faults, real processes under faults, and what recovery costs."""
