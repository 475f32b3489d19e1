"""The engine process: the scheduling loop, and the service that front ends connect to."""
