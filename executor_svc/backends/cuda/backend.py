"""The Backend protocol on an NVIDIA GPU: cuBLAS products through torch, and our own kernels.

Every buffer is allocated once, for the largest step, so a step allocates nothing and every launch
is packed once: later steps only change its grid. The same calls enqueue a step or capture it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cupy_kernels.decode import Decode, DecodeWork, SplitPlanner, item_capacity
from cupy_kernels.device import Device
from cupy_kernels.glue import AddRmsNorm, SiluMul
from cupy_kernels.launch import Launch
from cupy_kernels.prefill import Prefill
from cupy_kernels.shape import AttentionShape, ElementType
from cupy_kernels.staging import StageTokens, TokenColumns
from cupy_kernels.write_kv import WriteKv
from executor_svc.backends.base import Linear
from executor_svc.backends.cuda.streams import new_stream
from executor_svc.model.config import ModelConfig

_VECTOR: Final = 8  # elements in 16 bytes, which the sampler reads at once


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What the buffers must hold."""

    max_tokens: int  # in one step
    max_rows: int
    max_model_len: int
    max_blocks_per_row: int


def attention_shape(config: ModelConfig, block_size: int, element: ElementType) -> AttentionShape:
    """What the kernels are built for. Raises UnsupportedShapeError."""
    return AttentionShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        element=element,
    )


class CudaBackend:
    """One GPU. Calls come from one thread at a time; all work goes to `stream`, in order."""

    def __init__(
        self, device: Device, config: ModelConfig, shape: AttentionShape, sizes: StepSizes
    ) -> None:
        """Load the kernels and allocate every buffer.

        Raises KernelError, or torch.OutOfMemoryError if the device lacks memory.
        """
        self.torch_device = torch.device("cuda", device.ordinal)
        self.dtype = getattr(torch, shape.element)
        self.shape = shape
        self.stream = new_stream(self.torch_device)
        self._handle: int = self.stream.cuda_stream
        self._sizes = sizes
        self._intermediate = config.intermediate_size
        self._hidden = config.hidden_size
        self._stage = StageTokens(device, shape.block_size)
        self._planner = SplitPlanner(device, shape)
        self._decode = Decode(device, shape)
        self._prefill = Prefill(device, shape)
        self._write_kv = WriteKv(device, shape, config.rms_norm_eps)
        self._add_rms_norm = AddRmsNorm(device, shape.element, config.rms_norm_eps)
        self._silu_mul = SiluMul(device, shape.element)
        self._launches: dict[Hashable, Launch] = {}
        self._sized: dict[str, Launch] = {}  # the step's first launch of each kernel
        self._outputs: dict[int, _TokenRows] = {}  # of projections, by width
        self._token_rows: list[_TokenRows] = []
        self._pool = torch.empty(0)
        self._num_tokens = self._num_decode_rows = 0
        self._items: Tensor | None = None
        self._allocate(config, device.num_sms)

    def _allocate(self, config: ModelConfig, num_sms: int) -> None:
        sizes, shape = self._sizes, self.shape
        angles = torch.from_numpy(config.rope.angles(sizes.max_model_len))
        self._angles = angles.to(self.torch_device)
        self._residual = self._rows(config.hidden_size)
        self._normed = self._rows(config.hidden_size)
        self._activated = self._rows(config.intermediate_size)
        self._attended = self._rows(shape.num_heads * shape.head_dim)
        self.block_table = self._ints(sizes.max_rows, sizes.max_blocks_per_row)
        self.last_tokens = self._ints(sizes.max_rows)
        names = [column.name for column in dataclasses.fields(TokenColumns)]
        self._columns = {name: self._ints(sizes.max_tokens) for name in names}
        capacity = item_capacity(sizes.max_rows, shape.num_kv_heads, num_sms)
        self._work = DecodeWork(
            items=self._ints(capacity, 8),
            partial_out=self._floats(capacity, shape.group, shape.head_dim),
            partial_norms=self._floats(capacity, shape.group, 2),
            arrivals=self._ints(sizes.max_rows, shape.num_kv_heads),
        )

    def _rows(self, width: int) -> _TokenRows:
        rows = _TokenRows(self._elements(self._sizes.max_tokens, width))
        self._token_rows.append(rows)
        return rows

    def _elements(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.torch_device)

    def _floats(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.torch_device)

    def _ints(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self.torch_device)

    def use_pool(self, blocks: Tensor) -> None:
        """Keep keys and values in blocks [num_blocks, block_bytes] uint8.

        Graphs captured before still use the blocks of then.
        """
        assert blocks.shape[1] == self.shape.block_bytes
        self._pool = blocks
        self._launches.clear()

    @property
    def normed(self) -> Tensor:
        """The last step's hidden states, as the head takes them: the first of [max_tokens, hidden].

        Overwritten by the next step.
        """
        return self._normed.all

    def place(self, weight: Tensor) -> Tensor:
        """See Backend."""
        return weight.to(self.torch_device, self.dtype)

    def pack_linear(self, weight: Tensor, bias: Tensor | None, codes: object = None) -> Linear:
        """See Backend. Projections of one width share an output: none is used after the next."""
        width = len(weight)
        if width not in self._outputs:
            self._outputs[width] = self._rows(width)
        return _linear(weight, bias, self._outputs[width])

    def pack_head(self, weight: Tensor, codes: object = None) -> Linear:
        """See Backend. Logits are rows of a buffer [max_rows, vocab_size rounded up to 8]."""
        stride = -(-len(weight) // _VECTOR) * _VECTOR
        self.logits = self._elements(self._sizes.max_rows, stride)
        transposed, logits = weight.t(), self.logits[:, : len(weight)]
        return lambda x: torch.mm(x, transposed, out=logits[: len(x)])

    # ---- one step

    def stage(self, tokens: Tensor) -> None:
        """Take the step's tokens [T, 4], see cupy_kernels.staging."""
        launch = self._packed(
            "stage",
            lambda: self._stage.pack(
                tokens=tokens,
                last_tokens=self.last_tokens,
                block_table=self.block_table,
                columns=TokenColumns(**self._columns),
            ),
        )
        self._stage.resize(launch, len(tokens)).run(self._handle)

    def begin(self, num_tokens: int, num_decode_rows: int, items: Tensor | None) -> None:
        """Lay out the step of the tokens staged.

        Args:
            num_tokens: T.
            num_decode_rows: rows of one token each that stand first.
            items: [n, 4] int32, prefill.prefill_items of the other rows, if any.
        """
        self._num_tokens, self._num_decode_rows = num_tokens, num_decode_rows
        self._items = items
        self._sized.clear()
        for rows in self._token_rows:
            rows.use(num_tokens)
        if num_decode_rows:
            columns = self._columns
            launch = self._packed(
                "plan",
                lambda: self._planner.pack(
                    rows=columns["rows"][: self._sizes.max_rows],
                    seq_lens=columns["seq_lens"][: self._sizes.max_rows],
                    work=self._work,
                ),
            )
            self._planner.resize(launch, num_decode_rows).run(self._handle)

    def embed(self, table: Tensor) -> Tensor:
        """Rows of table [vocab_size, hidden] for the tokens staged: [T, hidden]."""
        token_ids = self._columns["token_ids"][: self._num_tokens]
        return torch.index_select(table, 0, token_ids, out=self._residual.now)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Backend."""
        return self._norm(x, None, weight)

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """See Backend."""
        return self._norm(residual, delta, weight)

    def _norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        out = self._normed.now
        self._run(
            "norm",
            (weight.data_ptr(), residual.data_ptr(), delta is not None and delta.data_ptr()),
            lambda: self._add_rms_norm.pack(residual=residual, delta=delta, weight=weight, out=out),
            lambda launch: self._add_rms_norm.resize(launch, self._num_tokens),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See Backend."""
        out = self._activated.now
        self._run(
            "silu_mul",
            gate_up.data_ptr(),
            lambda: self._silu_mul.pack(gate_up=gate_up, out=out),
            lambda launch: self._silu_mul.resize(launch, self._num_tokens, self._intermediate),
        )
        return out

    def write_kv(
        self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
    ) -> None:
        """See Backend."""
        num_tokens, columns = self._num_tokens, self._columns
        self._run(
            "write_kv",
            (layer, qkv.data_ptr()),
            lambda: self._write_kv.pack(
                qkv=qkv,
                angles=self._angles,
                positions=columns["positions"][:num_tokens],
                slot_mapping=columns["slot_mapping"][:num_tokens],
                pool=self._pool,
                layer=layer,
                q_norm=q_norm,
                k_norm=k_norm,
            ),
            lambda launch: self._write_kv.resize(launch, num_tokens),
        )

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """See Backend."""
        place = layer, qkv.data_ptr()
        if num_rows := self._num_decode_rows:
            self._run(
                "decode",
                place,
                lambda: self._decode.pack(**self._attention(qkv), layer=layer, work=self._work),
                lambda launch: self._decode.resize(launch, num_rows),
            )
        if (items := self._items) is not None:
            self._run(
                "prefill",
                place,
                lambda: self._prefill.pack(**self._attention(qkv), layer=layer, items=items),
                lambda launch: self._prefill.resize(launch, items),
            )
        return self._attended.now

    def _attention(self, qkv: Tensor) -> dict[str, Tensor]:
        return {
            "query": qkv,
            "out": self._attended.all,
            "pool": self._pool,
            "block_table": self.block_table,
        }

    def _run(
        self,
        kernel: str,
        place: Hashable,
        pack: Callable[[], Launch],
        resize: Callable[[Launch], Launch],
    ) -> None:
        """Enqueue a kernel at one place in the model, where its buffers begin as they always do.

        A step resizes the first launch of each kernel; the other layers' are of the same size.
        """
        launch = self._packed((kernel, place), pack)
        sized = self._sized.get(kernel)
        if sized is None:
            self._sized[kernel] = resize(launch)
        else:
            launch.resize_as(sized)
        launch.run(self._handle)

    def _packed(self, key: Hashable, pack: Callable[[], Launch]) -> Launch:
        """The launch of one place in the model; its buffers begin where they always do."""
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = pack()
        return launch


class _TokenRows:
    """A buffer with a row for each token, and the rows of the step under way.

    Sliced once a step: to slice a tensor costs the host as much as a launch.
    """

    __slots__ = ("all", "now")

    def __init__(self, tensor: Tensor) -> None:
        self.all = tensor  # [max_tokens, width]
        self.now = tensor  # [T, width]

    def use(self, num_tokens: int) -> None:
        """Begin a step."""
        self.now = self.all[:num_tokens]


def _linear(weight: Tensor, bias: Tensor | None, output: _TokenRows) -> Linear:
    transposed = weight.t()
    if bias is None:
        return lambda x: torch.mm(x, transposed, out=output.now)
    return lambda x: torch.addmm(bias, x, transposed, out=output.now)
