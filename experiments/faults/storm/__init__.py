"""A storm of kills in virtual time: this library beside synchronous groups under the same storm.

The parameter server with its log and its recovery, the workers, their frames and what they learn
are real; time, links, disks and kills are not. ``python -m experiments.faults storm``.
"""
