"""Workloads, peers and measurements: one command each, results as JSON under results/."""
