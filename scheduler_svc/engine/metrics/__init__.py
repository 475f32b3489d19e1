"""The Prometheus endpoint over all processes: what is counted, what it is called, who asks."""
