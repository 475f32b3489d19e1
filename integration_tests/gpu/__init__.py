"""Kernels on a real device, against plain torch in float32."""
