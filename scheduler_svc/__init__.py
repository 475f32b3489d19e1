"""The scheduler service: block mapping, admission, preemption, front ends. CPU only."""
