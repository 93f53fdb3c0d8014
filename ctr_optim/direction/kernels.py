"""Three Triton kernels of a step: the check of the gradients, Adam's step with its quadratic form, and the update.

In torch, ``gradients.all_finite``, ``Stack.direction`` with ``curvature.forms.quadratic``, and ``Stack.move_`` do the
same. Each kernel takes one pass over memory. Parameters and gradients are many small tensors. The kernels find them
through a table of addresses with one row ``(parameter, gradient)`` per layer. Tiles are ``(rank, wide)`` for A and for
the transpose of B, with the rank padded to a power of two. Sums run over fixed slices without atomics, so that a step
is the same in every run.
"""

import triton
import triton.language as tl


@triton.jit
def _pointer(addresses, layer, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + 2 * layer + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def find_infinite(addresses, found, numel, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Write ``found (L, slices)``: 1 if a slice of a gradient contains a number that is not finite, else 0."""
    layer, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    grad = _pointer(addresses, layer, 1, DTYPE, ALIGNED)
    bad = tl.zeros((TILE,), tl.int32)
    for start in range(piece * TILE, numel, pieces * TILE):
        at = start + tl.arange(0, TILE)
        g = tl.load(grad + at, mask=at < numel, other=0.0).to(tl.float32)
        bad = bad | tl.where(tl.abs(g) < float("inf"), 0, 1)
    tl.store(found + layer * pieces + piece, tl.max(bad, 0))


@triton.jit
def find_direction(
    addresses,
    exp_avg,
    exp_avg_sq,
    delta,
    basis,
    metric,
    diagonal,
    gram,
    square,
    cross,
    slope,
    step,
    live,
    lr,
    weight1,
    beta2,
    weight2,
    log2_beta1,
    log2_beta2,
    eps,
    weight_decay,
    rank,
    wide,
    rank_stride,
    wide_stride,
    IS_A: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write moments and step of one slice of one layer's A or B, and the slice's terms of the quadratic form.

    Inputs are the moments ``(L, *shape)``, ``basis`` and ``metric (L, r, r)`` (D for A, H for B), and
    ``diagonal (L, wide)`` (C for A, S for B). For A, ``gram (L, r, r)`` is the sum of B's outputs ``gram``.

    Outputs are the moments, ``delta (L, *shape)``, ``square (L, slices)`` with ``<delta, metric delta diagonal>``, and
    ``slope (L, slices)`` with the product of gradient and delta. For B, ``gram (L, slices, r, r)`` gets ``dB^T S B``.
    For A, ``cross (L, slices)`` gets the product of ``gram`` and ``A C dA^T``.
    """
    layer, piece, pieces = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    rows = tl.arange(0, RANK)
    known = rows < rank
    corner = rows[:, None] * rank + rows[None, :]
    in_corner = known[:, None] & known[None, :]
    Q = tl.load(basis + layer * rank * rank + corner, mask=in_corner, other=0.0)
    M = tl.load(metric + layer * rank * rank + corner, mask=in_corner, other=0.0)
    if IS_A:
        turned = rows[None, :] * rank + rows[:, None]
        P = tl.load(gram + layer * rank * rank + turned, mask=in_corner, other=0.0)
    else:
        P = tl.zeros((RANK, RANK), tl.float32)
    if LR_IS_TENSOR:
        lr = tl.load(lr).to(tl.float32)
    on = tl.load(live + layer).to(tl.int32) != 0
    # 1 - beta^n loses digits for beta near 1, so it is computed in float64.
    count = tl.maximum(tl.load(step + layer).to(tl.float64) + tl.where(on, 1.0, 0.0), 1.0)
    correction1 = 1.0 - tl.exp2(count * log2_beta1)
    correction2 = tl.sqrt(1.0 - tl.exp2(count * log2_beta2))
    length = lr * (correction2 / correction1).to(tl.float32)
    shift = (eps * correction2).to(tl.float32)
    decay = tl.where(on, lr * weight_decay, 0.0)

    parameter = _pointer(addresses, layer, 0, DTYPE, ALIGNED)
    grad = _pointer(addresses, layer, 1, DTYPE, ALIGNED)
    first = layer * rank * wide
    squares = tl.zeros((RANK, TILE), tl.float32)
    crosses = tl.zeros((RANK, TILE), tl.float32)
    slopes = tl.zeros((RANK, TILE), tl.float32)
    tiles = tl.cdiv(tl.cdiv(wide, pieces), TILE)
    for tile in range(piece * tiles, tl.minimum((piece + 1) * tiles, tl.cdiv(wide, TILE))):
        columns = tile * TILE + tl.arange(0, TILE)
        inside = known[:, None] & (columns < wide)[None, :]
        at = rows[:, None] * rank_stride + columns[None, :] * wide_stride
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + first + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + first + at, mask=inside, other=0.0)
        p = tl.load(parameter + at, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(diagonal + layer * wide + columns, mask=columns < wide, other=0.0)
        g = tl.where(on, -g if MAXIMIZE else g, 0.0)
        e = tl.dot(tl.trans(Q), g, input_precision="ieee")
        m = tl.where(on, m + weight1 * (e - m), m)
        v = tl.where(on, beta2 * v + weight2 * (e * e), v)
        tl.store(exp_avg + first + at, m, mask=inside)
        tl.store(exp_avg_sq + first + at, v, mask=inside)
        u = tl.where(inside & on, m / (tl.sqrt(v) + shift) * -length, 0.0)
        d = tl.dot(Q, u, input_precision="ieee") - decay * p
        tl.store(delta + first + at, d, mask=inside)
        slopes += g * d
        x = d * c[None, :]
        squares += tl.dot(M, d, input_precision="ieee") * x
        if IS_A:
            crosses += tl.dot(P, p, input_precision="ieee") * x
        else:
            P = tl.dot(x, tl.trans(p), P, input_precision="ieee")
    slot = layer * pieces + piece
    tl.store(square + slot, tl.sum(squares))
    tl.store(slope + slot, tl.sum(slopes))
    if IS_A:
        tl.store(cross + slot, tl.sum(crosses))
    else:
        tl.store(gram + slot * rank * rank + corner, P, mask=in_corner)


@triton.jit
def move(addresses, delta, scale, numel, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Apply ``p <- p + scale delta``, computed in float32."""
    layer = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    parameter = _pointer(addresses, layer, 0, DTYPE, ALIGNED) + at
    p = tl.load(parameter, mask=at < numel).to(tl.float32)
    d = tl.load(delta + layer * numel + at, mask=at < numel)
    tl.store(parameter, (p + tl.load(scale) * d).to(DTYPE), mask=at < numel)
