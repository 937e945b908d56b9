"""Measurements of `pq_ao`; `results/` holds what they wrote, and the README's tables are made from it."""
