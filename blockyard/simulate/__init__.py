"""The scheduler on a virtual clock: a trace, a device that is a cost model, and no I/O."""
