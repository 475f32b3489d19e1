"""Rotary embedding, optional query and key norms, and the KV cache write, in one kernel."""

from __future__ import annotations

from typing import Final

from cupy_kernels.device import Device
from cupy_kernels.launch import Launch
from cupy_kernels.shape import AttentionShape
from cupy_kernels.source import Variant
from cupy_kernels.tensors import DeviceTensor, address

_THREADS: Final = 256


def write_kv_variant(shape: AttentionShape) -> Variant:
    """The kernel for a model."""
    return Variant("write_kv", shape.defines)


class WriteKv:
    """Launches of sources/write_kv.cu for one model."""

    def __init__(self, device: Device, shape: AttentionShape, rms_norm_eps: float) -> None:
        """Load the kernel; rms_norm_eps is that of query and key norms."""
        self._shape = shape
        self._eps = rms_norm_eps
        self._kernel = device.load(write_kv_variant(shape))

    def pack(
        self,
        *,
        qkv: DeviceTensor,
        angles: DeviceTensor,
        positions: DeviceTensor,
        slot_mapping: DeviceTensor,
        pool: DeviceTensor,
        layer: int,
        q_norm: DeviceTensor | None = None,
        k_norm: DeviceTensor | None = None,
    ) -> Launch:
        """Rotate the queries of `qkv` in place; store rotated keys and values of `layer`.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] of the shape's element
                type. Keys and values in it stay as they are.
            angles: [positions, head_dim] float32, cosines, then sines.
            positions: [num_tokens] int32, each a row of `angles`.
            slot_mapping: [num_tokens] int32, block_id * block_size + offset; below 0: not stored.
            pool: [num_blocks, block_bytes] uint8.
            layer: whose part of the blocks to write.
            q_norm, k_norm: [head_dim] weights of the RMS norm of each head, before rotation.
        """
        shape = self._shape
        num_tokens = qkv.shape[0]
        norms = [
            0 if norm is None else address(norm, shape.element, shape.head_dim)
            for norm in (q_norm, k_norm)
        ]
        params = {
            "qkv": address(qkv, shape.element, num_tokens, shape.qkv_size),
            "angles": address(angles, "float32", None, shape.head_dim),
            "positions": address(positions, "int32", num_tokens),
            "slot_mapping": address(slot_mapping, "int32", num_tokens),
            "q_norm": norms[0],
            "k_norm": norms[1],
            "pool": layer_address(pool, shape, layer),
            "block_bytes": shape.block_bytes,
            "num_tokens": num_tokens,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "block_size": shape.block_size,
            "rms_norm_eps": self._eps,
        }
        return Launch(self._kernel, self._blocks(num_tokens), _THREADS, params)

    def resize(self, launch: Launch, num_tokens: int) -> Launch:
        """The launch for another number of tokens, at most those that it was packed for."""
        return launch.resize(self._blocks(num_tokens), num_tokens=num_tokens)

    def _blocks(self, num_tokens: int) -> int:
        shape = self._shape
        num_slices = shape.num_heads + 2 * shape.num_kv_heads
        threads_per_head = 1 << (shape.head_dim // 16 - 1).bit_length()
        return -(-num_tokens * num_slices * threads_per_head // _THREADS)


def layer_address(pool: DeviceTensor, shape: AttentionShape, layer: int) -> int:
    """Address of a layer's part of block 0 in pool [num_blocks, block_bytes] uint8."""
    assert 0 <= layer < shape.num_layers, layer
    return address(pool, "uint8", None, shape.block_bytes) + layer * shape.layer_bytes
