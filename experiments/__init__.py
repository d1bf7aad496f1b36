"""One folder a claim: what was measured, with what command, and what came out."""
