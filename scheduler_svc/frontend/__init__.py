"""Public gRPC front end: validation, tokenising, stream fan-out."""
