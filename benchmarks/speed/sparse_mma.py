"""2:4 weights on the sparse tensor cores, from Gluon: do the operands hold, and does it pay? Not in the package.

    out[t, n] = sum_k x[t, k] * W[n, k]          W [N, K] 2:4, bf16

The instruction is mma.sp::ordered_metadata.m16n8k32: 16 weight rows, 8 tokens, 32 columns of which 16 are stored. Every
operand lies in memory in the order in which the threads of a warp hold it (PTX ISA, fragments of sparse mma.m16n8k32),
so that all copies are linear and 16 bytes wide. A lane is 4 * g + q.

    values    int32 [N / rows, K / 64, s 2, MT, WARPS, lane 32, 4]    word v: the two kept weights of group
                                                                      8 * s + 4 * (v // 2) + q of row g + 8 * (v % 2)
    metadata  int32 [N / rows, K / 64, WARPS, lane 32, MT]            four bits a group, its kept columns, lower one
                                                                      first: groups 4 * q to 4 * q + 3 of rows g, g + 8
    tokens    int32 [T / columns, K / 64, s 2, NT, lane 32, 4]        word v: columns 32 * s + 8 * v + 2 * q and the
                                                                      next of token g

rows = 16 * MT * WARPS and columns = 8 * NT are what one program makes. Tokens in this order are a gift: in a layer they
would have to be brought into it. What the kernel reaches is therefore a bound, and where it does not beat the dense
product clearly, no kernel of this form will.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moesparse_kernels import NMWeight

__all__ = ["Tile", "pack_tokens", "pack_weight", "sparse_matmul", "sparse_matmul_torch"]

_MMA = """{
mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32
{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, $16, %d;
}"""
_MMA_0, _MMA_1 = gl.constexpr(_MMA % 0), gl.constexpr(_MMA % 1)
_OPERANDS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r")
# renamed in Triton 3.7 and 3.9
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@dataclass(frozen=True)
class Tile:
    """What one program makes.

    Attributes:
        row_fragments: MT, of 16 weight rows, in each warp.
        token_fragments: NT, of 8 tokens.
        warps: each has rows of its own.
        stages: steps of 64 columns that are held in shared memory.
    """

    row_fragments: int = 4
    token_fragments: int = 8
    warps: int = 4
    stages: int = 3

    @property
    def rows(self) -> int:
        return 16 * self.row_fragments * self.warps

    @property
    def tokens(self) -> int:
        return 8 * self.token_fragments

    def constants(self) -> dict[str, int]:
        """The kernel's, by name."""
        return {
            "MT": self.row_fragments,
            "NT": self.token_fragments,
            "WARPS": self.warps,
            "STAGES": self.stages,
        }


def pack_weight(weight: NMWeight, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, metadata) of one expert's weight.

    Args:
        weight: (1, N, K), 2:4, bf16, "row" order; N a multiple of `tile.rows`, K of 64.
        tile: of the kernel that will read it.
    """
    _, N, K = weight.shape
    if (weight.n, weight.m, weight.order) != (2, 4, "row") or N % tile.rows or K % 64:
        raise ValueError(
            f'weight must be 2:4 in "row" order with N a multiple of {tile.rows} and K of 64, got {weight!r}'
        )
    # tile, warp, mt, row half, g, K / 64, then the 16 groups of 64 columns
    rows = (N // tile.rows, tile.warps, tile.row_fragments, 2, 8, K // 64)
    words = weight.values[0].view(torch.int32).view(*rows, 2, 2, 4)  # s, hi, q
    values = words.permute(0, 5, 6, 2, 1, 4, 8, 7, 3).contiguous()  # tile K/64 s mt warp g q hi half
    bits = torch.stack([weight.index[0] & 15, weight.index[0] >> 4], dim=-1).view(*rows, 4, 4).long()  # q, c
    lower = sum((column * (bits & (2 * 2**column - 1) == 2**column) for column in range(4)), torch.zeros_like(bits))
    upper = sum(column * (bits >> column == 1) for column in range(4))
    shifts = 16 * torch.arange(2, device=bits.device).view(2, 1, 1, 1, 1) + 4 * torch.arange(4, device=bits.device)
    lanes = ((lower | upper << 2) << shifts).sum(dim=(-1, 3))  # tile warp mt g K/64 q
    metadata = lanes.to(torch.int32).permute(0, 4, 1, 3, 5, 2).contiguous()  # tile K/64 warp g q mt
    shape = (N // tile.rows, K // 64)
    return (
        values.view(*shape, 2, tile.row_fragments, tile.warps, 32, 4),
        metadata.view(*shape, tile.warps, 32, tile.row_fragments),
    )


def pack_tokens(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """x (T, K) bf16 in fragment order; T a multiple of `tile.tokens`, K of 64."""
    T, K = x.shape
    if x.dtype != torch.bfloat16 or T % tile.tokens or K % 64:
        raise ValueError(f"x must be bf16 with T a multiple of {tile.tokens} and K of 64, got {x.dtype} {(T, K)}")
    words = x.contiguous().view(torch.int32).view(T // tile.tokens, tile.token_fragments, 8, K // 64, 2, 4, 4)
    fragments = words.permute(0, 3, 4, 1, 2, 6, 5).contiguous()  # tile K/64 s nt g q v
    return fragments.view(T // tile.tokens, K // 64, 2, tile.token_fragments, 32, 4)


@gluon.jit
def _words(tile, layout: gl.constexpr):
    """The four words of every lane, (a, lane, b, 4) -> four (a, lane, b) in `layout`; no register moves."""
    even, odd = gl.split(gl.reshape(tile, (tile.shape[0], 32, tile.shape[2], 2, 2)))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        gl.convert_layout(w0, layout, assert_trivial=True),
        gl.convert_layout(w1, layout, assert_trivial=True),
        gl.convert_layout(w2, layout, assert_trivial=True),
        gl.convert_layout(w3, layout, assert_trivial=True),
    )


@gluon.jit
def _copy_step(
    a_smem,
    e_smem,
    x_smem,
    a_ptrs,
    e_ptrs,
    x_ptrs,
    step,
    k_steps,
    A_WORDS: gl.constexpr,
    E_WORDS: gl.constexpr,
    X_WORDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Start the copies of one step of 64 columns, none behind the last one, as a group of their own."""
    inside = step < k_steps
    stage = step % STAGES
    for s in gl.static_range(2):
        offset = step * A_WORDS + s * (A_WORDS // 2)
        _copy(a_smem.index(2 * stage + s), a_ptrs + offset, mask=inside)
        offset = step * X_WORDS + s * (X_WORDS // 2)
        _copy(x_smem.index(2 * stage + s), x_ptrs + offset, mask=inside)
    _copy(e_smem.index(stage), e_ptrs + step * E_WORDS, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _sparse_matmul_kernel(
    values_ptr,  # (N / rows, K / 64, 2, MT, WARPS, 32, 4) int32
    metadata_ptr,  # (N / rows, K / 64, WARPS, 32, MT) int32
    tokens_ptr,  # (T / columns, K / 64, 2, NT, 32, 4) int32
    out_ptr,  # (T, N) bf16
    N,
    k_steps,  # K / 64
    MT: gl.constexpr,
    NT: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid (N / rows, T / columns): one program makes `rows` outputs of `columns` tokens."""
    # axes (warp, lane, mt, nt) of the product; a fragment is four registers, four tensors here
    PRODUCT: gl.constexpr = gl.BlockedLayout([1, 1, MT, NT], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(3, PRODUCT)
    COLUMNS: gl.constexpr = gl.SliceLayout(2, PRODUCT)
    A: gl.constexpr = gl.BlockedLayout([1, 1, MT, 4], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    X: gl.constexpr = gl.BlockedLayout([1, 1, NT, 4], [1, 32, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SHAPE: gl.constexpr = [WARPS, 32, MT, NT]
    A_WORDS: gl.constexpr = 2 * MT * WARPS * 128
    E_WORDS: gl.constexpr = WARPS * 32 * MT
    X_WORDS: gl.constexpr = 2 * NT * 128
    a_smem = gl.allocate_shared_memory(gl.int32, [2 * STAGES, A_WORDS // 2], LINEAR)
    e_smem = gl.allocate_shared_memory(gl.int32, [STAGES, E_WORDS], LINEAR)
    x_smem = gl.allocate_shared_memory(gl.int32, [2 * STAGES, X_WORDS // 2], LINEAR)

    row_tile = gl.program_id(0)
    token_tile = gl.program_id(1)
    # int64, because N * K / 4 words pass 2**31 for the largest experts
    a_ptrs = values_ptr + row_tile.to(gl.int64) * k_steps * A_WORDS + gl.arange(0, A_WORDS // 2, layout=FOUR)
    e_ptrs = metadata_ptr + row_tile.to(gl.int64) * k_steps * E_WORDS + gl.arange(0, E_WORDS, layout=ONE)
    x_ptrs = tokens_ptr + token_tile.to(gl.int64) * k_steps * X_WORDS + gl.arange(0, X_WORDS // 2, layout=FOUR)

    for step in gl.static_range(STAGES - 1):
        _copy_step(a_smem, e_smem, x_smem, a_ptrs, e_ptrs, x_ptrs, step, k_steps, A_WORDS, E_WORDS, X_WORDS, STAGES)
    c0 = gl.zeros(SHAPE, gl.float32, PRODUCT)
    c1 = c0
    c2 = c0
    c3 = c0
    for step in range(k_steps):
        async_copy.wait_group(STAGES - 2)
        # the copies of all threads have come, and nobody reads the stage that is written next
        _barrier()
        ahead = step + STAGES - 1
        _copy_step(a_smem, e_smem, x_smem, a_ptrs, e_ptrs, x_ptrs, ahead, k_steps, A_WORDS, E_WORDS, X_WORDS, STAGES)
        stage = step % STAGES
        metadata = gl.expand_dims(e_smem.index(stage).reshape((WARPS, 32, MT)).load(ROWS), 3).broadcast_to(SHAPE)
        for s in gl.static_range(2):
            a = a_smem.index(2 * stage + s).reshape((MT, WARPS, 32, 4)).permute((1, 2, 0, 3)).load(A)
            x = x_smem.index(2 * stage + s).reshape((NT, 1, 32, 4)).permute((1, 2, 0, 3)).load(X)
            a0, a1, a2, a3 = _words(a, ROWS)
            x0, x1, x2, x3 = _words(x, COLUMNS)
            c0, c1, c2, c3 = gl.inline_asm_elementwise(
                _MMA_0 if s == 0 else _MMA_1,
                _OPERANDS,
                [
                    gl.expand_dims(a0, 3).broadcast_to(SHAPE),
                    gl.expand_dims(a1, 3).broadcast_to(SHAPE),
                    gl.expand_dims(a2, 3).broadcast_to(SHAPE),
                    gl.expand_dims(a3, 3).broadcast_to(SHAPE),
                    gl.expand_dims(x0, 2).broadcast_to(SHAPE),
                    gl.expand_dims(x1, 2).broadcast_to(SHAPE),
                    gl.expand_dims(x2, 2).broadcast_to(SHAPE),
                    gl.expand_dims(x3, 2).broadcast_to(SHAPE),
                    c0,
                    c1,
                    c2,
                    c3,
                    metadata,
                ],
                dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
                is_pure=True,
                pack=1,
            )

    WARP_AXIS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PRODUCT)))
    LANE_AXIS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PRODUCT)))
    ROW_AXIS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, PRODUCT)))
    TOKEN_AXIS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PRODUCT)))
    warp = gl.arange(0, WARPS, layout=WARP_AXIS)[:, None, None, None]
    lane = gl.arange(0, 32, layout=LANE_AXIS)[None, :, None, None]
    mt = gl.arange(0, MT, layout=ROW_AXIS)[None, None, :, None]
    nt = gl.arange(0, NT, layout=TOKEN_AXIS)[None, None, None, :]
    row = row_tile * (WARPS * MT * 16) + (warp * MT + mt) * 16 + lane // 4
    token = token_tile * (NT * 8) + nt * 8 + (lane % 4) * 2
    # word 0, 1: row g, tokens 2 q and 2 q + 1; 2, 3: row g + 8
    out_ptrs = out_ptr + token.to(gl.int64) * N + row
    gl.store(out_ptrs, c0.to(gl.bfloat16))
    gl.store(out_ptrs + N, c1.to(gl.bfloat16))
    gl.store(out_ptrs + 8, c2.to(gl.bfloat16))
    gl.store(out_ptrs + N + 8, c3.to(gl.bfloat16))


def sparse_matmul(values: torch.Tensor, metadata: torch.Tensor, tokens: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The product (T, N) bf16, accumulated in fp32; the arguments as `pack_weight` and `pack_tokens` give them."""
    N, T, k_steps = values.shape[0] * tile.rows, tokens.shape[0] * tile.tokens, values.shape[1]
    out = torch.empty(T, N, dtype=torch.bfloat16, device=tokens.device)
    grid = (values.shape[0], tokens.shape[0])
    _sparse_matmul_kernel[grid](values, metadata, tokens, out, N, k_steps, **tile.constants(), num_warps=tile.warps)
    return out


def sparse_matmul_torch(values: torch.Tensor, metadata: torch.Tensor, tokens: torch.Tensor, tile: Tile) -> torch.Tensor:
    """`sparse_matmul` (T, N) in float64, lane by lane as the PTX manual lays its fragments out; for small sizes."""
    row_tiles, k_steps, token_tiles = *values.shape[:2], tokens.shape[0]
    weight = torch.zeros(row_tiles, tile.warps, tile.row_fragments, 16, 64 * k_steps, dtype=torch.float64)
    x = torch.zeros(token_tiles, tile.token_fragments, 8, 64 * k_steps, dtype=torch.float64)
    pairs = values.view(torch.bfloat16).unflatten(-1, (4, 2)).double()
    words = tokens.view(torch.bfloat16).unflatten(-1, (4, 2)).double()
    for step, s, lane, word in itertools.product(range(k_steps), range(2), range(32), range(4)):
        g, q = divmod(lane, 4)
        first = 64 * step + 32 * s
        # the selector names the lanes that hold the metadata of this half: 2 s and 2 s + 1 of every four
        group = q + 4 * (word // 2)
        codes = metadata[:, step, :, 4 * g + 2 * s + group // 4] >> (16 * (word % 2) + 4 * (group % 4)) & 15
        for kept, code in enumerate((codes & 3, codes >> 2)):
            column = first + 4 * group + code.long()
            value = pairs[:, step, s, :, :, lane, word, kept].transpose(1, 2)  # (row tile, warp, mt)
            weight[..., g + 8 * (word % 2), :].scatter_(-1, column[..., None], value[..., None])
        start = first + 8 * word + 2 * q
        x[:, :, g, start : start + 2] = words[:, step, s, :, lane, word]
    return x.flatten(0, 2) @ weight.flatten(0, 3).T
